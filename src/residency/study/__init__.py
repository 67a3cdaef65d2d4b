"""Studies: every combination of named axes, each a run."""

from residency.study.cells import Cell, plan_cells
from residency.study.plan import Study, load_study

__all__ = ["Cell", "Study", "load_study", "plan_cells"]

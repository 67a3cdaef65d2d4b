"""Studies: every combination of named axes, each a run."""

from residency.study.planning.cells import Cell, plan_cells
from residency.study.planning.study_file import Study, load_study

__all__ = ["Cell", "Study", "load_study", "plan_cells"]

"""Studies: every combination of named axes, each a run."""

from residency.study.plan import Cell, Study, load_study, plan_cells

__all__ = ["Cell", "Study", "load_study", "plan_cells"]

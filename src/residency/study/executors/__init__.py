"""Where the stages of a study run."""

from residency.study.executors.base import Executor, Outcome, Resources, Task

__all__ = ["Executor", "Outcome", "Resources", "Task"]

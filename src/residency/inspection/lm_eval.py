"""General ability on benchmarks of EleutherAI's harness, through the live model: no export, no second copy."""

from __future__ import annotations

import io
import logging
import random
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from residency.core.errors import UserError
from residency.inspection.base import Observer, StageSnapshot

__all__ = ["LmEval"]


class LmEval(Observer):
    """Runs tasks of lm-eval before training and after every stage (needs the extra `lm-eval`).

    Records {benchmark: {metric, value, stderr, higher_is_better, rows}}; results.json has their deltas since before
    training, the mean and the minimum, in `general`. A task with several metrics is one benchmark per metric.

    With `include_path` only the task files (YAML) of that folder are known, and nothing is downloaded: in them,
    `dataset_path: json` with `dataset_kwargs: {data_files: ...}` reads local files. A task file may name Python code
    of its own; use files that you trust.

    Args:
        tasks: Names of tasks or groups.
        include_path: Folder of task files; `null` = the tasks that lm-eval brings, whose data come from the hub.
        rows: Rows per task; `null` = all.
        shots: Examples before the question; `null` = as the task says.
        batch_size: Requests per forward pass.
    """

    decoder_only = not_on_classifiers = "the harness is given a causal language model"

    def __init__(
        self,
        *,
        tasks: list[str],
        include_path: str | None = None,
        rows: int | None = None,
        shots: int | None = None,
        batch_size: int = 8,
    ) -> None:
        if find_spec("lm_eval") is None:
            raise UserError(
                "inspection LmEval, and the package lm-eval is not installed",
                why="the benchmarks are run by it",
                fix="install the extra: pip install 'residency[lm-eval]'",
            )
        if not tasks or (include_path is not None and not Path(include_path).is_dir()):
            raise UserError(
                f"inspection LmEval with tasks={tasks}, include_path={include_path!r}",
                why="there must be at least one task, and the folder of task files must exist",
                fix="name tasks as their files do, and give the folder that holds these files",
            )
        self.tasks = list(tasks)
        self.include_path = include_path
        self.rows = rows
        self.shots = shots
        self.batch_size = batch_size

    def after(self, snapshot: StageSnapshot) -> Mapping[str, Any]:
        """Benchmarks of the state after stage k, or before training."""
        if snapshot.k:
            return {"benchmarks": self._run(snapshot, snapshot.module.model)}
        with snapshot.pretrained() as model:
            return {"benchmarks": self._run(snapshot, model)}

    def _run(self, snapshot: StageSnapshot, model: nn.Module) -> dict[str, Any]:
        with _quiet(), _own_randomness():
            from lm_eval import simple_evaluate
            from lm_eval.models.huggingface import HFLM
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=self.include_path, include_defaults=self.include_path is None)
            unknown = [task for task in self.tasks if task not in manager.all_tasks]
            if unknown:
                raise UserError(
                    f"inspection LmEval: no task {', '.join(unknown)} in {self.include_path or 'lm-eval'}",
                    why="only tasks with a file there can be run",
                    fix=f"choose from {', '.join(sorted(manager.all_tasks)[:12]) or 'none'}",
                )
            harness = HFLM(pretrained=model, tokenizer=snapshot.module.backbone.tokenizer, batch_size=self.batch_size)
            found = simple_evaluate(
                model=harness,
                tasks=self.tasks,
                num_fewshot=self.shots,
                limit=self.rows,
                task_manager=manager,
                log_samples=False,
                bootstrap_iters=0,
                # The harness would set global generators, which are not its own.
                random_seed=None,
                numpy_random_seed=None,
                torch_random_seed=None,
            )
        return _benchmarks(found or {})


def _benchmarks(found: Mapping[str, Any]) -> dict[str, Any]:
    """{benchmark: {metric, value, stderr, higher_is_better, rows[, part_of]}} of what `simple_evaluate` returns."""
    benchmarks: dict[str, Any] = {}
    # A group's score is made of its tasks': both would count them twice. Some groups have no score of their own.
    scored = {name for name, results in found["results"].items() if any(_scored(r) for r in results.items())}
    members = (found.get("group_subtasks") or {}).items()
    groups = {task: name for name, tasks in members if name in scored for task in tasks}
    for task, results in found["results"].items():
        # Keys are "<metric>,<filter>"; standard errors, names and sample counts stand among them.
        metrics = [key for key in results if "," in key and not key.partition(",")[0].endswith("_stderr")]
        for key in metrics:
            metric, _, filtered = key.partition(",")
            name = metric if filtered == "none" else f"{metric} ({filtered})"
            benchmarks[task if len(metrics) == 1 else f"{task}: {name}"] = {
                "metric": name,
                "value": _number(results[key]),
                "stderr": _number(results.get(f"{metric}_stderr,{filtered}")),
                "higher_is_better": bool((found["higher_is_better"].get(task) or {}).get(metric, True)),
                "rows": _rows(found, task),
                **({"part_of": groups[task]} if task in groups else {}),
            }
    return benchmarks


def _scored(result: tuple[str, Any]) -> bool:
    return "," in result[0] and _number(result[1]) is not None


def _rows(found: Mapping[str, Any], task: str) -> int | None:
    count = found.get("n-samples", {}).get(task)
    return int(count["effective"]) if count else None


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _own_randomness() -> Iterator[None]:
    """The harness draws from global generators, also where it is told not to seed them."""
    python, numpy = random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


@contextmanager
def _quiet(loggers: Sequence[str] = ("lm_eval", "lm-eval", "datasets")) -> Iterator[None]:
    """Hide the harness's advice, progress bars and the deprecations of its own dependencies."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

    levels = {name: logging.getLogger(name).level for name in loggers}
    bars = is_progress_bar_enabled()
    disable_progress_bar()
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        # Its bars go to whatever standard error is when they are made.
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        if bars:
            enable_progress_bar()

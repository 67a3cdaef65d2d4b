"""How many stages a study trains, and what that will take: by what earlier stages took, or by a short measurement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from residency.runs.store.store import Store
from residency.study.planning.measure import Measured
from residency.study.planning.resolve import Resolved
from residency.study.planning.tree import Tree

__all__ = ["Counts", "Estimate", "count_stages", "describe", "estimate"]


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Stages of a study.

    Args:
        separate: Stages that separate runs would train.
        different: Different ones among them: what the study trains from an empty store.
        missing: Of those, how many are not in the store.
        evaluations: States that are scored, of those that are to be done.
    """

    separate: int
    different: int
    missing: int
    evaluations: int


def count_stages(paths: Sequence[Sequence[str]], tree: Tree) -> Counts:
    """Count.

    Args:
        paths: Keys of the trained stages of every cell, complete ones included.
        tree: What is to be done.
    """
    return Counts(
        separate=sum(len(path) for path in paths),
        different=len({key for path in paths for key in path}),
        missing=sum(node.trains is not None for node in tree.nodes.values()),
        evaluations=sum(node.scores is not None for node in tree.nodes.values()),
    )


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What is ahead; `None` where nothing comparable is in the store.

    Args:
        seconds: Of wall-clock time.
        bytes: New on disk.
        tasks: Task id -> seconds.
    """

    seconds: float | None
    bytes: int | None
    tasks: Mapping[str, float]


def estimate(
    tree: Tree, cells: Sequence[Resolved], store: Store, *, slots: int, measured: Measured | None = None
) -> Estimate:
    """From seconds per step, seconds per scored column and bytes per state of what is in the store.

    Args:
        tree: What is to be done.
        cells: The cells of its tasks.
        store: What has been done.
        slots: Tasks at once.
        measured: Stands in for what the store does not tell.
    """
    rates = _Rates(store, measured or Measured())
    by_id = {cell.cell.id: cell for cell in cells}
    tasks, total_bytes = {}, 0
    known = True
    for task, node in tree.nodes.items():
        cell, until = by_id[node.cells[0]], node.task.spec["until"]
        if until is None:
            continue
        training = rates.training(cell, until) if node.trains else 0.0
        scoring = rates.scoring(cell) if node.scores is not None else 0.0
        size = rates.size(cell, kinds=1 + (node.trains is not None)) if until else 0
        if training is None or scoring is None or size is None:
            known = False
            continue
        tasks[task] = training + scoring
        total_bytes += size
    if not known:
        return Estimate(seconds=None, bytes=None, tasks=tasks)
    return Estimate(seconds=max(sum(tasks.values()) / slots, _longest(tree, tasks)), bytes=total_bytes, tasks=tasks)


def _longest(tree: Tree, seconds: Mapping[str, float]) -> float:
    """The way through the tree that takes longest: more workers do not make it shorter."""
    ends: dict[str, float] = {}
    for task, node in tree.nodes.items():
        before = max((ends[need.node] for need in node.needs), default=0.0)
        ends[task] = before + seconds.get(task, 0.0)
    return max(ends.values(), default=0.0)


class _Rates:
    def __init__(self, store: Store, measured: Measured) -> None:
        self.measured = measured
        self.steps: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        self.sizes: dict[str, list[int]] = defaultdict(list)
        self.columns: dict[str, list[float]] = defaultdict(list)
        for _, record in store.entries("trained"):
            if record is not None:
                facts, model = record["meta"]["facts"], record["meta"]["model"]
                self.steps[model][0] += facts["train_seconds"]
                self.steps[model][1] += facts["steps"]
                self.sizes[model].append(sum(file["bytes"] for file in record["files"].values()))
        for _, record in store.entries("evaluations"):
            # Another version wrote it under another name; it says nothing about the time of this one.
            if record is not None and "evaluation_seconds" in record["meta"]:
                self.columns[record["meta"]["column"]].append(record["meta"]["evaluation_seconds"])

    def training(self, cell: Resolved, k: int) -> float | None:
        seconds, steps = self.steps[cell.keys.model]
        rate = seconds / steps if steps else self.measured.steps.get(cell.keys.model)
        return None if rate is None else cell.stage_cache.runner.stages[k - 1].steps * rate

    def scoring(self, cell: Resolved) -> float | None:
        names = [name for name, domain in cell.stage_cache.runner.data.columns.items() if domain.scorers]
        found = [self._column(name) for name in names]
        return None if None in found else sum(seconds for seconds in found if seconds is not None)

    def _column(self, name: str) -> float | None:
        seconds = self.columns[name]
        return sum(seconds) / len(seconds) if seconds else self.measured.columns.get(name)

    def size(self, cell: Resolved, *, kinds: int) -> int | None:
        sizes = self.sizes[cell.keys.model]
        if sizes:
            return kinds * sum(sizes) // len(sizes)
        size = self.measured.sizes.get(cell.keys.model)
        return None if size is None else kinds * size


def describe(counts: Counts, found: Estimate) -> list[str]:
    """The plan in sentences."""
    share = f" ({counts.different / counts.separate:.0%})" if counts.separate else ""
    lines = [
        f"stages: {counts.different} different ones{share} instead of the {counts.separate} that separate runs train; "
        f"{counts.different - counts.missing} of them need no training any more, {counts.missing} will be trained",
        f"states to score: {counts.evaluations}",
    ]
    if found.seconds is None or found.bytes is None:
        lines.append(
            "time and disk: unknown, no comparable stage is in the store yet; --dry-run --measure tries a few steps"
        )
    else:
        lines.append(f"time: about {duration(found.seconds)}; disk: about {found.bytes / 2**20:.0f} MiB")
    return lines


def duration(seconds: float) -> str:
    """Seconds for a human."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"

"""Cells -> a tree of stages -> tasks: what has to be made, in which order, and what is shared (design, section 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from residency.runs.keys import digest
from residency.runs.store.store import EntryKind, Store
from residency.study.executors.base import Resources, Task
from residency.study.planning.resolve import Resolved
from residency.study.views.events import GridCell

__all__ = ["Need", "Node", "Tree", "build_tree"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a node reads of another one.

    Args:
        node: Id of the other one.
        kind: Kind of the entry; `None` = all that the node makes.
        key: Its key. It may be there long before the node ends: scoring follows.
    """

    node: str
    kind: EntryKind | None = None
    key: str = ""


@dataclass(kw_only=True)
class Node:
    """One task of the tree.

    Args:
        task: What the executor gets.
        title: For a human.
        needs: What must be there before it starts.
        cells: Ids of the cells that need it.
        height: Nodes on the longest way from here to the end.
        trains: Key of what it trains, if it does.
        scores: Row of the score matrix that it fills, of its first cell; `None` = none.
    """

    task: Task
    title: str
    needs: list[Need]
    cells: list[str]
    height: int = 0
    trains: str | None = None
    scores: int | None = None


@dataclass(kw_only=True)
class Tree:
    """All tasks of a study, by id, in an order in which they can be run.

    Args:
        nodes: The tasks.
        grid: Cells as rows of a screen.
    """

    nodes: dict[str, Node] = field(default_factory=dict)
    grid: list[GridCell] = field(default_factory=list)


def build_tree(cells: Sequence[Resolved], *, study: str, folder: Path, store: Store, status: Path) -> Tree:
    """What has to be done for cells that are not complete.

    Args:
        cells: The cells, in the order of the study.
        study: Its name.
        folder: Where their folders lie.
        store: Where the stages lie; what is there is not made again.
        status: Folder for the tasks' status files.
    """
    builder = _Builder(study, folder, store, status)
    # Whoever scores most columns comes first and does it for those that share the state.
    for cell in sorted(cells, key=lambda c: -len(c.stage_cache.runner.data.columns)):
        builder.add(cell)
    order = {cell.cell.id: place for place, cell in enumerate(cells)}
    builder.tree.grid.sort(key=lambda row: order[row.id])
    _measure(builder.tree)
    return builder.tree


class _Builder:
    def __init__(self, study: str, folder: Path, store: Store, status: Path) -> None:
        self.study = study
        self.folder = folder
        self.store = store
        self.status = status
        self.tree = Tree()
        self.trained: dict[str, str] = {}
        self.finished: dict[str, str] = {}
        self.scored: dict[str, str] = {}

    def add(self, cell: Resolved) -> None:
        """The path of one cell: row 0, its stages, and putting its folder together."""
        last = 0 if cell.frozen else len(cell.keys.stages)
        path: list[str | None] = []
        shared: list[bool] = []
        every: list[str] = []
        for k in range(last + 1):
            found, new = self._stage(cell, k)
            path.append(found[-1] if found else None)
            shared.append(not new)
            every += found
        task = self._task(f"cell-{digest(cell.cell.id)[:16]}", cell, None)
        task = replace(task, needs=tuple(dict.fromkeys(every)))
        needs = [Need(node=one) for one in task.needs]
        title = f"{cell.cell.id}: record"
        self.tree.nodes[task.id] = Node(task=task, title=title, needs=needs, cells=[cell.cell.id])
        names = tuple(cell.domains[:last])
        self.tree.grid.append(GridCell(id=cell.cell.id, domains=names, tasks=(*path, task.id), shared=(*shared, False)))

    def _stage(self, cell: Resolved, k: int) -> tuple[list[str], bool]:
        """Nodes that make the state after stage k and its scores; whether one of them is new."""
        keys = cell.keys.stages[k - 1] if k else None
        columns = self._columns(cell, k)
        missing = [] if self._is_scored(cell, k) else [key for key in columns if key not in self.scored]
        owners = [self.scored[key] for key in columns if key in self.scored]
        if keys is not None and keys.finished in self.finished:
            owners.insert(0, self.finished[keys.finished])
        lacks_state = keys is not None and not self._has_state(keys.finished, keys.trained)
        if not missing and not lacks_state:
            return self._known(owners, cell), False
        again = bool(owners) and (keys is None or keys.finished in self.finished)
        node = self._node(cell, k, keys, evaluate=bool(missing), extra=digest(missing)[:6] if again else "")
        self.scored |= dict.fromkeys(missing, node.task.id)
        if keys is not None:
            self.finished.setdefault(keys.finished, node.task.id)
            if node.trains is not None:
                self.trained[keys.trained] = node.task.id
        self.tree.nodes[node.task.id] = node
        return [*self._known(owners, cell), node.task.id], True

    def _known(self, owners: Sequence[str], cell: Resolved) -> list[str]:
        found = list(dict.fromkeys(owners))
        for one in found:
            if cell.cell.id not in self.tree.nodes[one].cells:
                self.tree.nodes[one].cells.append(cell.cell.id)
        return found

    def _node(self, cell: Resolved, k: int, keys: Any, *, evaluate: bool, extra: str) -> Node:
        needs: list[Need] = []
        trains = None
        if keys is None:
            name, title = digest(self._columns(cell, 0))[:16], "before training"
        else:
            name, title = keys.finished[:16], f"{' > '.join(cell.domains[:k])} ({cell.cell.id})"
            if keys.finished in self.finished:
                needs.append(Need(node=self.finished[keys.finished], kind=self._kind(keys), key=keys.finished))
            elif keys.trained in self.trained:
                needs.append(Need(node=self.trained[keys.trained], kind="trained", key=keys.trained))
            elif not self.store.has("trained", keys.trained):
                trains = keys.trained
        if k > 1:
            before = cell.keys.stages[k - 2]
            if before.finished in self.finished:
                node = self.finished[before.finished]
                needs.append(Need(node=node, kind=self._kind(before), key=before.finished))
        task = self._task(f"{k}-{name}{extra and '-' + extra}", cell, k, evaluate=evaluate)
        task = replace(task, needs=tuple(dict.fromkeys(need.node for need in needs)))
        scores = k if evaluate else None
        return Node(task=task, title=title, needs=needs, cells=[cell.cell.id], trains=trains, scores=scores)

    def _task(self, name: str, cell: Resolved, until: int | None, *, evaluate: bool = True) -> Task:
        run = self.folder / cell.cell.id
        line = ["--config", str(run / "config.yaml"), "--run_dir", str(run), "--store", str(self.store.path)]
        spec = {
            "words": [*line, *self._place(cell)],
            "until": until,
            "evaluate": evaluate,
            "status": str(self.status / f"{name}.json"),
            "rows": dict(cell.rows),
        }
        needs_device = until is not None and cell.stage_cache.runner.trainers.root_device.type == "cuda"
        return Task(id=name, spec=spec, resources=Resources(gpus=int(needs_device)))

    def _place(self, cell: Resolved) -> list[str]:
        """Where W&B shows a cell, as far as its config does not say it."""
        given = cell.config.get("wandb") or {}
        words = ["--wandb.study", self.study]
        if given.get("group") is None:
            words += ["--wandb.group", cell.cell.id.removesuffix(f"-s{cell.cell.seed}")]
        return words + (["--wandb.job_type", "reference"] if cell.cell.reference is not None else [])

    # -- what is there ------------------------------------------------------------------------------------------

    @staticmethod
    def _kind(keys: Any) -> EntryKind:
        return "trained" if keys.finished == keys.trained else "finished"

    def _has_state(self, finished: str, trained: str) -> bool:
        kind: EntryKind = "trained" if finished == trained else "finished"
        return finished in self.finished or self.store.has(kind, finished)

    def _columns(self, cell: Resolved, k: int) -> list[str]:
        """Keys of the scores of a state, as far as they can be told without the model: its layout is left open."""
        runner = cell.stage_cache.runner
        options: dict[str, Any] = {
            "split": runner.settings.split,
            "settings": runner.settings.evaluation,
            "layout": "?",
        }
        scored = [name for name, domain in runner.data.columns.items() if domain.scorers]
        return [cell.keys.scores(k, name, **options) for name in scored]

    def _is_scored(self, cell: Resolved, k: int) -> bool:
        if not self.store.has("models", cell.keys.model):
            return False
        return all(self.store.has("evaluations", key) for key in cell.stage_cache.score_keys(k).values())


def _measure(tree: Tree) -> None:
    """Height of every node: what many others wait for is done first."""
    for node in reversed(list(tree.nodes.values())):
        for need in node.needs:
            other = tree.nodes[need.node]
            other.height = max(other.height, node.height + 1)

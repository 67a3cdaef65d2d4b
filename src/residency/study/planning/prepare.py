"""A study file -> everything that can be known before a stage is trained."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from residency.core.tensor_files import read_json, replace_file, write_json
from residency.runs.config import sources
from residency.runs.file_stamps import file_stamps
from residency.runs.folder import RunFolder
from residency.runs.inputs import compare_inputs, inputs_of
from residency.runs.keys import digest
from residency.runs.store.store import Store
from residency.runs.whole_run import whole_record
from residency.study.planning.cells import Cell, combinations, make_cell, plan_cells, safe_ids
from residency.study.planning.estimate import Counts, count_stages
from residency.study.planning.references import plan_references
from residency.study.planning.resolve import Resolved, Resolver
from residency.study.planning.study_file import Study
from residency.study.planning.tree import Tree, build_tree

__all__ = ["Prepared", "cells_of", "prepare"]


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A study, planned and checked.

    Args:
        study: As in its file.
        folder: Its folder.
        store: Where its stages lie.
        cells: All cells, references last.
        missing: Those without a result, with their parts.
        tree: What has to be done for them.
        counts: Stages, shared and separate.
        resolver: Has read the data.
        entries: The cells as plan.json holds them.
    """

    study: Study
    folder: Path
    store: Store
    cells: Sequence[Cell]
    missing: Sequence[Resolved]
    tree: Tree
    counts: Counts
    resolver: Resolver
    entries: Sequence[Mapping[str, Any]] = field(default_factory=list)

    def run(self, cell: Cell) -> RunFolder:
        """The folder of a cell."""
        return RunFolder(self.folder / "cells" / cell.id)

    def keep(self) -> None:
        """Write study.yaml, plan.json, the config of every cell and the rows of every domain.

        Raises:
            UserError: A cell's folder holds a run with another config.
        """
        for resolved in self.missing:
            self.run(resolved.cell).keep_config(resolved.config)
        text = yaml.safe_dump(asdict(self.study), sort_keys=False, allow_unicode=True)
        replace_file(self.folder / "study.yaml", lambda temporary: _write(temporary, text))
        counts = {"separate": self.counts.separate, "trained": self.counts.different}
        plan = {"study": asdict(self.study), "count": len(self.cells), "counts": counts, "cells": list(self.entries)}
        plan["tree"] = [_task(task, node) for task, node in self.tree.nodes.items()] or _old_tree(self.folder)
        write_json(self.folder / "plan.json", plan)
        if self.missing:
            self.resolver.keep_rows()


def cells_of(study: Study, resolver: Resolver, *, found: Mapping[str, Mapping[str, Any]] | None = None) -> list[Cell]:
    """Cells of the axes, with what a search has found for them, then references, which are not searched for.

    Raises:
        UserError: Names collide, or a config that is needed to know the domains is wrong.
    """
    domains: Sequence[str] = ()
    if study.orders != "given":
        first = combinations(study)[0]
        domains = resolver.parse(make_cell(study, first.axes, first.keys, study.seeds[0])).datamodule.order
    cells = plan_cells(study, domains=domains, found=found)
    cells += plan_references(study, resolver.config, resolver.examples)
    safe_ids(study, cells)
    return cells


def prepare(
    study: Study, *, folder: Path, store: Path, found: Mapping[str, Mapping[str, Any]] | None = None
) -> Prepared:
    """Plan and check a study; nothing is written.

    Cells that are complete, and whose files say what they said when they were planned, are not parsed again.

    Args:
        study: As `load_study` gives it.
        folder: Its folder.
        store: Where its stages lie.
        found: {name of a combination: overrides that a search has found for it}.

    Raises:
        UserError: Anything about a cell that can be wrong before a model is loaded.
    """
    resolver = Resolver(study, store)
    cells = cells_of(study, resolver, found=found)
    known = _planned(folder)
    entries, missing = [], []
    told = cache(_told)  # cells share most of their words
    for cell in cells:
        said = _said(cell, told)
        complete = whole_record(folder / "cells" / cell.id) is not None
        entry = known.get(cell.id)
        if not complete or entry is None or entry.get("written") != said:
            resolved = resolver.resolve(cell)
            stages = [] if resolved.frozen else [keys.trained for keys in resolved.keys.stages]
            entry = {"stages": stages, "domains": resolved.domains}
            if complete:
                _check_complete(RunFolder(folder / "cells" / cell.id), resolver, resolved)
            else:
                missing.append(resolved)
        place = {"id": cell.id, "axes": dict(cell.axes), "seed": cell.seed, "reference": cell.reference}
        entries.append({**place, "written": said, "domains": entry["domains"], "stages": entry["stages"]})
    stage_cache = Store(store)
    tree = build_tree(missing, study=study.name, folder=folder / "cells", store=stage_cache, status=folder / "status")
    counts = count_stages([entry["stages"] for entry in entries], tree)
    return Prepared(
        study=study,
        folder=folder,
        store=stage_cache,
        resolver=resolver,
        cells=cells,
        missing=missing,
        tree=tree,
        counts=counts,
        entries=entries,
    )


def _planned(folder: Path) -> dict[str, Any]:
    if not (folder / "plan.json").is_file():
        return {}
    return {entry["id"]: entry for entry in read_json(folder / "plan.json")["cells"] if "stages" in entry}


def _said(cell: Cell, told: Callable[[str, str], tuple[list[Any], dict[str, Any]]]) -> str:
    """Digest of the words of a cell and of every config they name, and when the data and models changed last."""
    entries: list[Any] = []
    stamps: dict[str, Any] = {}
    for option, value in sources.pairs(cell.words):
        if value is not None:
            more, files = told(option, value)
            entries += more
            stamps |= files
    return digest(entries[::-1], stamps)


def _told(option: str, value: str) -> tuple[list[Any], dict[str, Any]]:
    """[key, value] of every entry of one option, and the stamps of the files that they name."""
    found = sources.entries(option, value)
    return [[entry.key, entry.value] for entry in found], file_stamps(entry.value for entry in found)


def _check_complete(run: RunFolder, resolver: Resolver, resolved: Resolved) -> None:
    run.keep_config(resolved.config)
    cli = resolver.parse(resolved.cell)
    compare_inputs(run, inputs_of(cli.model, cli.datamodule), instead="--study_dir (with the same --store)")


def _task(task: str, node: Any) -> dict[str, Any]:
    return {"id": task, "title": node.title, "needs": list(node.task.needs), "cells": node.cells, "trains": node.trains}


def _old_tree(folder: Path) -> Any:
    return read_json(folder / "plan.json").get("tree", []) if (folder / "plan.json").is_file() else []


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

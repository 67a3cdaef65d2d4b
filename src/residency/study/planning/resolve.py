"""From cells to runs: full configs, data read once and checked, keys of every stage. Nothing is trained here."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.tensor_files import write_json
from residency.domains.base import Domain
from residency.domains.joint import Joint
from residency.domains.stream_data import StreamData
from residency.runs.keys import RunKeys
from residency.runs.open_runner import plan_stages
from residency.runs.stage_cache import StageCache
from residency.runs.store.store import Store
from residency.study.planning.cells import Cell
from residency.study.planning.study_file import Study

__all__ = ["Resolved", "Resolver"]


@dataclass(frozen=True, kw_only=True)
class Resolved:
    """A cell whose config has been parsed and whose parts exist.

    Args:
        cell: The cell.
        config: Its full config.
        stage_cache: Its stages, by key; no model is loaded.
        rows: {key of a domain's config: [fingerprint of its rows, {split: rows there were before the limits}]}.
    """

    cell: Cell
    config: Mapping[str, Any]
    stage_cache: StageCache
    rows: Mapping[str, Any]

    @property
    def keys(self) -> RunKeys:
        """Its keys."""
        return self.stage_cache.keys

    @property
    def frozen(self) -> bool:
        """Whether nothing is trained."""
        return self.stage_cache.runner.settings.frozen

    @property
    def domains(self) -> list[str]:
        """Names in learning order."""
        return self.stage_cache.runner.data.order


class Resolver:
    """Parses cells; domains and backbones that cells have in common are read once.

    Args:
        study: For the scorer.
        store: Where the stages lie.
    """

    def __init__(self, study: Study, store: Path) -> None:
        self.study = study
        self.store = store
        self._domains: dict[str, Domain] = {}
        self._backbones: dict[str, Any] = {}
        self._composer: Any = None
        self._opened: dict[tuple[str, ...], Resolved] = {}
        self._parsed: dict[tuple[str, ...], Any] = {}

    def parse(self, cell: Cell) -> Any:
        """The command line of a cell, parsed; its seed, name and axes may be those of another cell.

        Raises:
            UserError: What is wrong, and in which cell.
        """
        from residency.runs.compose import Composer

        words = cell.words[: -len(cell.place)]
        self._composer = self._composer or Composer(fixed=(f"--store={self.store}",))
        with _of_cell(cell):
            if words not in self._parsed:
                self._parsed[words] = self._composer.parse(words)
            return self._parsed[words]

    def config(self, cell: Cell) -> dict[str, Any]:
        """The full config of a cell."""
        return {**self.parse(cell).resolved, **cell.place}

    def examples(self, cell: Cell) -> int:
        """On how many examples a cell trains, over all its steps."""
        cli = self.parse(cell)
        with _of_cell(cell):
            backbone = cli.model.backbone
            tokenizer = None if cli.settings.stage_tokens is None else backbone.for_stream(cli.datamodule).tokenizer
            stages = plan_stages(cli.datamodule, cli.trainers, cli.settings, tokenizer)
        return sum(stage.steps * stage.batch_size for stage in stages)

    def resolve(self, cell: Cell) -> Resolved:
        """A cell with its parts and keys.

        Raises:
            UserError: What is wrong, and in which cell.
        """
        from residency.study.worker import rows_facts, rows_of

        cli, config = self.parse(cell), self.config(cell)
        settings = replace(cli.settings, cell=cell.id, seed=cell.seed, axes=cell.axes)
        words = cell.words[: -len(cell.place)]
        if words in self._opened:
            # Another seed of a cell that has been checked.
            first = self._opened[words]
            stage_cache = first.stage_cache.with_seed(settings=settings, config=config)
            return Resolved(cell=cell, config=config, stage_cache=stage_cache, rows=first.rows)
        with _of_cell(cell):
            stage_cache = self._open(cli, settings, config)
            data: StreamData = cli.datamodule
            rows: dict[str, Any] = {key: rows_facts(domain) for key, domain in rows_of(data, config)}
        self._opened[words] = Resolved(cell=cell, config=config, stage_cache=stage_cache, rows=rows)
        return self._opened[words]

    def _open(self, cli: Any, settings: Any, config: Mapping[str, Any]) -> StageCache:
        from residency.inspection import Inspection
        from residency.runs.stream import open_stage_cache

        self._share(cli, config)
        stage_cache = open_stage_cache(
            module=cli.model,
            data=cli.datamodule,
            trainers=cli.trainers,
            settings=settings,
            config=config,
            inspection=Inspection(cli.option("inspection")),
        )
        self._check_scorer(cli.datamodule)
        return stage_cache

    def _share(self, cli: Any, config: Mapping[str, Any]) -> None:
        data: StreamData = cli.datamodule
        for part, domains in (("domains", data.domains), ("probes", data.probes)):
            for name in domains:
                domains[name] = self._shared(domains[name], config["data"][part][name], config)
        key = json.dumps(config["model"]["backbone"], sort_keys=True)
        cli.model.backbone = self._backbones.setdefault(key, cli.model.backbone)

    def _shared(self, domain: Domain, config: Mapping[str, Any], run: Mapping[str, Any]) -> Domain:
        from residency.study.worker import domain_key

        if isinstance(domain, Joint):
            for name, part in config["init_args"]["domains"].items():
                domain.domains[name] = self._shared(domain.domains[name], part, run)
        return self._domains.setdefault(domain_key(run, config), domain)

    def _check_scorer(self, data: StreamData) -> None:
        known = {scorer for domain in data.columns.values() for scorer in domain.scorers}
        if self.study.scorer not in known:
            raise UserError(
                f"scorer of the study is {self.study.scorer}",
                why=f"the domains are scored by {', '.join(sorted(known))}",
                fix="compare by one of these, or add the scorer to a domain's scorers",
            )

    def keep_rows(self) -> None:
        """Put the rows of all domains into the store, for the workers."""
        store = Store(self.store)
        for domain in self._domains.values():
            key, rows = domain.fingerprint(), domain.give_rows()
            if not store.has("data", key):

                def write(folder: Path, rows: Any = rows) -> None:
                    write_json(folder / "rows.json", rows)

                store.put("data", key, write, meta={"source": domain.source})


@contextmanager
def _of_cell(cell: Cell) -> Iterator[None]:
    """Inside, what is wrong is told with the cell in which it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"cell {cell.id}: {error.got}", why=error.why, fix=error.fix) from error

"""From rows to one test function: every property of its kind on every row, plug-ins of two kinds together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.testing import (
    adapter_properties,
    augmentation_properties,
    data_properties,
    mitigation_properties,
    objective_properties,
    partners,
)
from residency.testing.cases import Case
from residency.testing.mitigation_properties import a_pair_keeps_every_invariant, a_pair_through_a_whole_stream
from residency.testing.objective_pairs import runs_or_is_refused
from residency.testing.pairs import refusal
from residency.testing.rows import (
    AdapterRow,
    AugmentationRow,
    DomainRow,
    MetricRow,
    MitigationRow,
    ObjectiveRow,
    ScorerRow,
)
from residency.testing.shared_runs import SharedRuns

__all__ = ["conformance"]

Marks = Callable[[str, str, str], Collection[pytest.MarkDecorator]]


@dataclass(frozen=True, kw_only=True)
class _Check:
    """One property of one row, in the order in which it runs.

    Args:
        row: Name of the row.
        partner: Of the row beside it, in a pair.
        title: Of the property.
        run: What runs.
    """

    row: str
    partner: str = ""
    title: str
    run: Callable[[SharedRuns, Path], None]


def conformance(
    *,
    adapters: Mapping[str, AdapterRow] | None = None,
    mitigations: Mapping[str, MitigationRow] | None = None,
    objectives: Mapping[str, ObjectiveRow] | None = None,
    scorers: Mapping[str, ScorerRow] | None = None,
    metrics: Mapping[str, MetricRow] | None = None,
    domains: Mapping[str, DomainRow] | None = None,
    augmentations: Mapping[str, AugmentationRow] | None = None,
    streams: Sequence[tuple[str, str]] | None = None,
    marks: Marks = lambda row, partner, title: (),
) -> Callable[..., None]:
    """A test function for pytest, parametrised with every property of every row.

        # test_mylab.py
        from mylab.l1_pull import L1Pull
        from residency.testing import MitigationRow, conformance

        test_conformance = conformance(
            mitigations={"l1_pull": MitigationRow(make=lambda: L1Pull(strength=10.0), off=lambda: L1Pull(strength=0.0))}
        )

    A new adapter is trained together with the given mitigations and those of `residency.testing.partners`, a new
    mitigation with the given adapters and those there. What several properties look at is trained once per process.

    Args:
        adapters: {name: row}.
        mitigations: {name: row}.
        objectives: {name: row}.
        scorers: {name of the score: row}.
        metrics: {name: row}, of a score matrix.
        domains: {name: row}.
        augmentations: {name: row}.
        streams: Pairs (adapter, mitigation) that are trained through Trainer, files and scoring as well; by default
            each given adapter with replay, and each given mitigation with LoRA.
        marks: Marks of pytest for a row, the row beside it in a pair ("" if it is alone) and the title of a property.

    Raises:
        UserError: There is no row, or a stream names one that does not exist.
    """
    own_adapters, own_mitigations = adapters or {}, mitigations or {}

    def names_of_marks(adapter: str, mitigation: str) -> list[str]:
        return [mark.name for mark in marks(adapter, mitigation, a_pair_keeps_every_invariant.__name__)]

    runs = SharedRuns(
        adapters={**partners.ADAPTERS, **own_adapters},
        mitigations={**partners.MITIGATIONS, **own_mitigations},
        marks=names_of_marks,
    )
    if streams is None:
        streams = [(name, "replay") for name in own_adapters]
        streams += [("lora_dropout", name) for name in own_mitigations if ("lora_dropout", name) not in streams]
    checks = [
        *_adapters(own_adapters, {**partners.MITIGATIONS, **own_mitigations}),
        *_mitigations(own_mitigations, [name for name in partners.ADAPTERS if name not in own_adapters]),
        *_streams(streams, runs),
        *_objectives(objectives or {}),
        *_data(scorers or {}, metrics or {}, domains or {}, augmentations or {}),
    ]
    if not checks:
        raise UserError(
            "conformance() without a row", why="no property would run", fix="give adapters={'mine': AdapterRow(...)}"
        )
    names = [f"{check.row}-{check.partner}-{check.title}".replace("--", "-") for check in checks]
    cases = [
        pytest.param(check, id=name, marks=tuple(marks(check.row, check.partner, check.title)))
        for check, name in zip(checks, names, strict=True)
    ]

    @pytest.mark.parametrize("check", cases)
    def test_conformance(check: _Check, tmp_path: Path) -> None:
        check.run(runs, tmp_path)

    return test_conformance


def _alone(properties: Sequence[Callable[[Any], None]], name: str, row: Any, partner: str = "") -> Iterator[_Check]:
    for run in properties:

        def check(runs: SharedRuns, folder: Path, run: Callable[[Any], None] = run) -> None:
            run(Case(name=name, row=row, runs=runs, folder=folder, partner=partner))

        yield _Check(row=name, partner=partner, title=run.__name__, run=check)


def _adapters(rows: Mapping[str, AdapterRow], mitigations: Mapping[str, MitigationRow]) -> Iterator[_Check]:
    """Adapter by adapter: what its properties and pairs share is made once per process."""
    for name, row in rows.items():
        yield from _alone(adapter_properties.PROPERTIES, name, row)
        for mitigation, other in mitigations.items():
            yield from _pair(name, mitigation, other)


def _mitigations(rows: Mapping[str, MitigationRow], adapters: Sequence[str]) -> Iterator[_Check]:
    for name, row in rows.items():
        yield from _alone(mitigation_properties.PROPERTIES, name, row)
        for adapter in adapters:
            yield from _pair(adapter, name, row)


def _pair(adapter: str, mitigation: str, row: MitigationRow) -> Iterator[_Check]:
    (check,) = _alone([a_pair_keeps_every_invariant], mitigation, row, adapter)
    yield _Check(row=adapter, partner=mitigation, title=check.title, run=check.run)


def _streams(pairs: Sequence[tuple[str, str]], runs: SharedRuns) -> Iterator[_Check]:
    for adapter, mitigation in pairs:
        row = runs.mitigation(mitigation)
        if not refusal(runs.row(adapter).make(), row):
            (check,) = _alone([a_pair_through_a_whole_stream], mitigation, row, adapter)
            yield _Check(row=adapter, partner=mitigation, title=check.title, run=check.run)


def _objectives(rows: Mapping[str, ObjectiveRow]) -> Iterator[_Check]:
    for name, row in rows.items():
        yield from _alone(objective_properties.PROPERTIES, name, row)
        for mitigation, other in partners.MITIGATIONS.items():
            yield _Check(row=name, partner=mitigation, title="runs_or_is_refused", run=partial(_together, row, other))


def _together(row: ObjectiveRow, mitigation: MitigationRow, runs: SharedRuns, folder: Path) -> None:
    adapter = partners.ADAPTERS["lora_dropout"]
    runs_or_is_refused(backbone=runs.backbone, folder=folder, objective=row, mitigation=mitigation, adapter=adapter)


def _data(
    scorers: Mapping[str, ScorerRow],
    metrics: Mapping[str, MetricRow],
    domains: Mapping[str, DomainRow],
    augmentations: Mapping[str, AugmentationRow],
) -> Iterator[_Check]:
    for scorer, line in scorers.items():
        yield from _alone(data_properties.SCORER_PROPERTIES, scorer, line)
    for metric, definition in metrics.items():
        yield from _alone(data_properties.METRIC_PROPERTIES, metric, definition)
    for domain, reader in domains.items():
        yield from _alone(data_properties.DOMAIN_PROPERTIES, domain, reader)
    for name, method in augmentations.items():
        yield from _alone(augmentation_properties.PROPERTIES, name, method)

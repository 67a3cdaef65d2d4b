"""What has to stand beside the scores of a run so that they are not misread: gaps, warnings, general ability."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from residency.domains.stream_data import StreamData
from residency.inspection.inspection import inside_record
from residency.metrics.general import ability_deltas
from residency.metrics.learning_check import plasticity_warnings

__all__ = ["general_ability", "judgement", "missing", "warnings"]


def judgement(scores: Mapping[str, Any], *, data: StreamData, stages: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Entries of results.json beside `scores` and `summary`.

    Args:
        scores: {scorer: {higher_is_better, unit, R}}.
        data: Domains, probes and their scorers.
        stages: The records of row 0 and of every stage.

    Returns:
        missing {scorer: [[after, column]]}, warnings {scorer: [text]}, general {scorer: deltas of the probes since
        before training}, inside [per row: {observer: findings}] (left out if nobody looked).
    """
    inside = inside_record(list(stages))
    return {
        "missing": missing(scores, {name: domain.scorers for name, domain in data.columns.items()}, data.order),
        "warnings": warnings(scores, data.order),
        "general": general_ability(scores, domains=len(data.order), probes=list(data.probes), inside=inside),
        **({"inside": inside} if inside else {}),
    }


def missing(
    scores: Mapping[str, Any], scorers: Mapping[str, Collection[str]], domains: Sequence[str]
) -> dict[str, list[list[str]]]:
    """{scorer: [[after, column], ...]}: cells that should have a score and have none; scorers without one left out.

    Args:
        scores: {scorer: {R}}, columns as in `scorers`.
        scorers: Column -> scorers that it asks for, in the order of R's columns.
        domains: In learning order; row 0 is called "before training".
    """
    rows, found = ["before training", *domains], {}
    for scorer, entry in scores.items():
        wanted = [j for j, names in enumerate(scorers.values()) if scorer in names]
        columns = list(scorers)
        gaps = [[rows[k], columns[j]] for k, row in enumerate(entry["R"]) for j in wanted if row[j] is None]
        if gaps:
            found[scorer] = gaps
    return found


def warnings(scores: Mapping[str, Any], domains: Sequence[str]) -> dict[str, list[str]]:
    """{scorer: sentences that belong beside its BWT and forgetting}; scorers without one left out."""
    found = {}
    for scorer, entry in scores.items():
        R = [row[: len(domains)] for row in entry["R"]]
        texts = plasticity_warnings(R, domains, higher_is_better=entry["higher_is_better"])
        if texts:
            found[scorer] = texts
    return found


def general_ability(
    scores: Mapping[str, Any], *, domains: int, probes: Sequence[str], inside: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """{scorer: {deltas {benchmark}, mean, minimum, worst, missing}} from before training to after the last stage.

    Probes are the stream's own; benchmarks of lm-eval, if observers ran some, are under `lm_eval/<metric>`. Deltas are
    in utility: below 0 = ability lost. `null` where a score is missing.
    """
    groups: dict[str, tuple[bool, dict[str, Any], dict[str, Any]]] = {}
    for scorer, entry in scores.items():
        columns = {probe: [row[domains + j] for row in entry["R"]] for j, probe in enumerate(probes)}
        scored = {probe: values for probe, values in columns.items() if any(v is not None for v in values)}
        if scored:
            base, last = ({probe: values[k] for probe, values in scored.items()} for k in (0, -1))
            groups[scorer] = entry["higher_is_better"], base, last
    for k, part in ((0, 1), (-1, 2)) if inside else ():
        for findings in inside[k].values():
            for benchmark, found in findings.get("benchmarks", {}).items():
                if found.get("part_of") is not None:
                    continue
                name = f"lm_eval/{found['metric']}"
                groups.setdefault(name, (found["higher_is_better"], {}, {}))[part][benchmark] = found["value"]  # type: ignore[index]
    deltas = {name: asdict(ability_deltas(b, a, higher_is_better=up)) for name, (up, b, a) in groups.items()}
    errors = _standard_errors(inside)
    return {name: _plain(found) | errors.get(name, {}) for name, found in deltas.items()}


def _standard_errors(inside: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """{lm_eval/<metric>: {stderr: {benchmark: standard error of the delta}}}.

    As of two independent sets of rows; on the same rows, as here, the true one is smaller.
    """
    squares: dict[str, dict[str, list[float]]] = {}
    for k in (0, -1) if inside else ():
        for findings in inside[k].values():
            for benchmark, found in findings.get("benchmarks", {}).items():
                if found.get("part_of") is None and found.get("stderr") is not None:
                    own = squares.setdefault(f"lm_eval/{found['metric']}", {})
                    own.setdefault(benchmark, []).append(float(found["stderr"]) ** 2)
    return {
        name: {"stderr": {b: math.sqrt(sum(two)) for b, two in own.items() if len(two) == 2}}
        for name, own in squares.items()
    }


def _plain(found: dict[str, Any]) -> dict[str, Any]:
    def number(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    deltas = {benchmark: number(delta) for benchmark, delta in found["deltas"].items()}
    return {key: number(value) for key, value in found.items() if key != "deltas"} | {"deltas": deltas}

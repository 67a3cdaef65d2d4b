"""Rows and tokens that take no part in a run, from the files to the matrix: `data.left_out` of results.json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from residency.core.types import Split
from residency.domains.joint import Joint
from residency.domains.left_out import LeftOut, of_limits, of_rows, of_tokens
from residency.domains.stream_data import StreamData
from residency.domains.token_counts import TokenCounts
from residency.runs.stage_runner import StageRunner

__all__ = ["after_run", "before_run"]

Counts = Mapping[str, Mapping[str, TokenCounts]]
Scored = Mapping[str, Mapping[str, int]]


def before_run(runner: StageRunner, counts: Counts, limits: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is known before the first step.

    Args:
        runner: Data, stages and settings of the run.
        counts: {column: {split: counts}} of what is trained on and of what is scored.
        limits: {column: {split: `LengthCounts` as JSON values}}.
    """
    data, split = runner.data, runner.settings.split
    found = [*_of_files(data, counts, limits), *_of_splits(runner, split)]
    if not runner.settings.frozen:
        found += _in_no_batch(runner, counts, [{} for _ in runner.stages])
    return [one.plain() for one in found if one.count]


def after_run(
    runner: StageRunner, counts: Counts, before: Sequence[Mapping[str, Any]], records: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The same with what only a run can tell: rows that no batch had, no memory kept or no scorer judged.

    Args:
        runner: Of the run.
        counts: As before.
        before: What `before_run` found.
        records: Of row 0 and of every stage; those of earlier versions tell less.
    """
    found: list[LeftOut] = []
    if not runner.settings.frozen:
        found += _in_no_batch(runner, counts, records[1:])
        found += _in_no_memory(records[1:])
    found += _not_scored(runner, [record["scored"] for record in records if "scored" in record])
    found += _unfinished(runner.data, [record for record in records if "unfinished" in record])
    return [*(dict(one) for one in before if one["what"] != "no_batch"), *(one.plain() for one in found if one.count)]


def _of_files(data: StreamData, counts: Counts, limits: Mapping[str, Mapping[str, Any]]) -> Iterator[LeftOut]:
    idle = [name for name in data.domains if name not in data.order]
    for name in idle:
        yield LeftOut(
            column=name, what="order", unit="domains", count=len(idle), of=len(data.domains), how="not in data.order"
        )
    for name, domain in data.columns.items():
        found = [*domain.unread]
        for split, of in limits.get(name, {}).items():
            found += of_limits(split, of, whole=split not in counts.get(name, {}))
        for split, tokens in counts.get(name, {}).items():
            found += of_tokens(split, tokens)
        if name in data.order:
            found += of_rows(domain.rows("train"))
        yield from (one.of_column(name) for one in found)


def _of_splits(runner: StageRunner, scored: Split) -> Iterator[LeftOut]:
    """Rows of splits that nothing reads."""
    data, frozen = runner.data, runner.settings.frozen
    joint = any(isinstance(domain, Joint) for domain in data.domains.values())
    validates = not frozen and any(m.uses_validation for m in runner.module.mitigations.values())
    for name, domain in data.columns.items():
        probe = name in data.probes
        if frozen or (probe and not joint):
            # Of a domain its own limit has been told; nothing is told of a probe's training rows but this.
            given = domain.given if probe else {}
            yield _whole(name, "train", given, domain.rows("train"), "not trained on" + " (a probe)" * probe)
        splits: tuple[Split, ...] = ("validation", "test")
        for split in splits:
            read = split == scored or (split == "validation" and validates and not probe)
            if not read and not isinstance(domain, Joint):
                yield _whole(name, split, {}, domain.rows(split), "read by nothing in this run")


def _whole(column: str, split: Split, given: Mapping[Split, int], rows: Sequence[Any], how: str) -> LeftOut:
    count = given.get(split, len(rows))
    return LeftOut(column=column, split=split, what="unread_split", unit="rows", count=count, of=count, how=how)


def _in_no_batch(runner: StageRunner, counts: Counts, facts: Sequence[Mapping[str, Any]]) -> Iterator[LeftOut]:
    """Training rows that no step sees: steps may be fewer than an epoch has, and rehearsal takes places."""
    for stage, told in zip(runner.stages, facts, strict=False):
        rows = counts[stage.domain]["train"].rows
        steps = int(told.get("steps", stage.steps))
        seen = int(told.get("rows_learned", min(rows, steps * stage.batch_size)))
        how = f"in no batch ({steps:,} steps of {stage.batch_size:,} rows)"
        yield LeftOut(
            column=stage.domain, split="train", what="no_batch", unit="rows", count=rows - seen, of=rows, how=how
        )


def _in_no_memory(stages: Sequence[Mapping[str, Any]]) -> Iterator[LeftOut]:
    """Rows of earlier stages that a memory has let go by the time the last stage is trained."""
    learned = {stage["domain"]: stage.get("rows_learned") for stage in stages[:-1]}
    for name, kept in (stages[-2].get("kept_rows", {}) if learned else {}).items():
        for domain, rows in learned.items():
            if rows is not None:
                left, how = max(0, rows - kept.get(domain, 0)), f"not in the memory of {name} in the last stage"
                yield LeftOut(column=domain, split="train", what="memory", unit="rows", count=left, of=rows, how=how)


def _not_scored(runner: StageRunner, scored: Sequence[Scored]) -> Iterator[LeftOut]:
    """Rows that a scorer does not judge, in the state in which it judges the fewest; a missing cell is none."""
    split = runner.settings.split
    for column, domain in runner.data.columns.items():
        rows = domain.rows(split)
        for name, scorer in domain.scorers.items() if scored else ():
            found = [judged for state in scored if (judged := state.get(name, {}).get(column))]
            fewest = min(found, default=0)
            reasons = [
                "answers that are not wanted" if not all(row.wanted for row in rows) else "",
                "evaluation.generation_rows" if scorer.needs != "likelihood" else "",
                "evaluation.accuracy_rows, or one label" if scorer.labels != "none" else "",
            ]
            why = ", ".join(filter(None, reasons)) or "there is nothing that it could judge"
            how = f"not judged by {name} ({why})"
            count = len(rows) - fewest
            yield LeftOut(
                column=column, split=split, what="not_scored", unit="rows", count=count, of=len(rows), how=how
            )


def _unfinished(data: StreamData, records: Sequence[Mapping[str, Any]]) -> Iterator[LeftOut]:
    """Answers that went to the limit of what is written, over all states."""
    for column, domain in data.columns.items():
        texts = [name for name, scorer in domain.scorers.items() if scorer.needs != "likelihood"]
        written = sum(max((r["scored"].get(name, {}).get(column, 0) for name in texts), default=0) for r in records)
        cut = sum(record["unfinished"].get(column, 0) for record in records)
        how = "in all states did not end before the longest reference does"
        yield LeftOut(column=column, what="unfinished", unit="answers", count=cut, of=written, how=how)

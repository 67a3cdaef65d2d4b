"""Rows that are where they must not be: twice in a split, in training and test, in a domain and in another's test."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

from residency.core.types import Row
from residency.domains.doctor.finding import Column, Finding, Severity, make_finding
from residency.domains.doctor.similarity import NearIndex, ngram_overlap, shingles_of, text_key

__all__ = ["check_across", "check_duplicates", "check_groups", "check_ids", "check_near", "check_splits"]

_SCORED = ("validation", "test")
_SEVERAL = ("pair", "unpaired")  # kinds of rows that give one prompt several answers
_BATCH = 2048  # training rows that are looked up at a time
_MEMORISED = "the score would measure what was memorised, not what was learnt"


def check_duplicates(column: Column) -> Iterator[Finding]:
    """Equal prompts within a split, and equal prompts with different answers."""
    for split, rows in column.splits.items():
        again, answers = _repeats(rows, column.keys(split))
        where = (column.name, split)
        if again and len(again) > 0.01 * len(rows):
            severity: Severity = "warning" if split != "train" or len(again) > 0.2 * len(rows) else "info"
            yield make_finding(
                "duplicates", severity, where, again, of=len(rows), got="{n} rows repeat an earlier row",
                why="repeated rows count several times in training and in scores",
                fix="`--fix` keeps the first of each",
            )  # fmt: skip
        # Preferences are several answers to one prompt.
        single = [(row, key) for row, key in zip(rows, column.keys(split), strict=True) if row.kind not in _SEVERAL]
        unclear = [row.id for row, key in single if len(answers.get(key, ())) > 1 and row.prompt.strip()]
        if unclear:
            grave = column.kind == "label" and len(unclear) > 0.01 * len(rows)
            yield make_finding(
                "contradiction", "error" if grave and split != "train" else "warning", where, unclear, of=len(rows),
                got="{n} rows ask what another row of the split asks and answer differently",
                why="at most one of the answers can be scored as right",
                fix="keep one answer per prompt (`residency.domains.base.drop_ambiguous`), or list them as references",
            )  # fmt: skip


def _repeats(rows: Sequence[Row], keys: Sequence[str]) -> tuple[list[str], dict[str, set[str]]]:
    """(ids of rows that repeat an earlier one, {prompt: its answers} of prompts that are there more than once)."""
    first: dict[str, str] = {}
    answers: dict[str, set[str]] = {}
    again = []
    for row, key in zip(rows, keys, strict=True):
        said = text_key(row.completion)
        if key not in first:
            first[key] = said
            continue
        known = answers.setdefault(key, {first[key]})
        if said in known:
            again.append(row.id)
        known.add(said)
    return again, answers


def check_splits(column: Column) -> Iterator[Finding]:
    """Training rows that return in validation or test, and validation rows that are test rows."""
    keys: dict[str, set[str]] = {split: {*column.keys(split)} for split in column.splits}
    pairs: tuple[tuple[str, str], ...] = (("train", "test"), ("train", "validation"), ("test", "validation"))
    for source, split in pairs:
        rows = column.rows(split)
        there = keys.get(source, set())
        shared = [row.id for row, key in zip(rows, column.keys(split), strict=True) if key in there]
        if shared:
            yield make_finding(
                "leak", "error", (column.name, split), shared, of=len(rows),
                got=f"{{n}} {split} rows are {source} rows too",
                why=_MEMORISED if source == "train" else "what is chosen on validation rows is chosen on test rows",
                fix="`--fix` takes them out of the one trained on; leave `validation` out to carve it from train",
            )  # fmt: skip


def check_groups(column: Column) -> Iterator[Finding]:
    """Groups that meet in two splits."""
    groups = {split: {row.group for row in rows} - {""} for split, rows in column.splits.items()}
    for split in _SCORED:
        rows = column.rows(split)
        parted = [row.id for row in rows if row.group and row.group in groups.get("train", set())]
        if parted:
            yield make_finding(
                "group", "error", (column.name, split), parted, of=len(rows),
                got="{n} rows are of a group that is trained on",
                why="rows of one group resemble each other: " + _MEMORISED,
                fix="keep all rows of a group in one split",
            )  # fmt: skip


def check_across(columns: Sequence[Column]) -> Iterator[Finding]:
    """Test and probe rows that another domain trains on."""
    scored = {key for column in columns for split in _SCORED for key in column.keys(split)}
    owners: dict[str, str] = {}
    for column in columns:
        if not column.probe:
            for key in column.keys("train"):
                if key in scored:
                    owners.setdefault(key, column.name)
    for column in columns:
        for split in _SCORED:
            rows = column.rows(split)
            pairs = zip(rows, column.keys(split), strict=True)
            met = {row.id: owners.get(key, column.name) for row, key in pairs}
            shared = [row_id for row_id, owner in met.items() if owner != column.name]
            if shared:
                names = sorted({met[row_id] for row_id in shared})
                yield make_finding(
                    "leak_across", "error" if split == "test" or column.probe else "warning", (column.name, split),
                    shared, of=len(rows), got=f"{{n}} {split} rows are trained on in {', '.join(names)}",
                    why="forgetting and transfer would be measured on rows that another stage learns",
                    fix="take these rows out of the other domain's training split",
                )  # fmt: skip


def check_near(columns: Sequence[Column], *, threshold: float = 0.8, largest: int | None = None) -> Iterator[Finding]:
    """Scored rows that are nearly, or for 13 words in a row, what some domain trains on.

    Args:
        columns: Domains and probes.
        threshold: Smallest Jaccard similarity of shingles.
        largest: Rows of a split beyond which its rows are not compared, which is told; `None` compares all.
    """
    parts = [(column, split) for column in columns for split in _SCORED if column.rows(split)]
    chosen = [(c, split) for c, split in parts if largest is None or len(c.rows(split)) <= largest]
    indices = [NearIndex([row.prompt for row in c.rows(split)], threshold=threshold) for c, split in chosen]
    own, other = ([set[int]() for _ in chosen] for _ in range(2))
    for trained in (column for column in columns if not column.probe and chosen):
        rows, keys = trained.rows("train"), trained.keys("train")
        for start in range(0, len(rows), _BATCH):
            grams = shingles_of([row.prompt for row in rows[start : start + _BATCH]])
            for k, ((column, split), index) in enumerate(zip(chosen, indices, strict=True)):
                equal = column.keys(split)
                met = index.similar_to(grams)
                (own if column is trained else other)[k].update(
                    place for number, place in met if equal[place] != keys[start + number]
                )
    texts = (row.prompt for column in columns if not column.probe for row in column.rows("train"))
    repeated = ngram_overlap([row.prompt for column, split in chosen for row in column.rows(split)], texts)
    start = 0
    for k, (column, split) in enumerate(chosen):
        end = start + len(column.rows(split))
        passages = [place - start for place in repeated if start <= place < end]
        yield from _near(column, split, own[k], other[k], threshold)
        yield from _passages(column, split, own[k] | other[k], passages)
        start = end
    for column, split in parts:
        if largest is not None and len(column.rows(split)) > largest:
            yield make_finding(
                "near_not_looked_for", "info", (column.name, split), (), of=len(column.rows(split)),
                count=len(column.rows(split)), got="{n} rows are not compared with all training rows for similarity",
                why="there are too many pairs to compare unasked", fix="`residency doctor --full` compares all",
            )  # fmt: skip


def _near(column: Column, split: str, own: set[int], other: set[int], threshold: float) -> Iterator[Finding]:
    rows = column.rows(split)
    where, of = (column.name, split), len(rows)
    for places, text in ((own, "of the same domain"), (other, "of another domain")):
        if places:
            yield make_finding(
                "near_duplicate", "error" if len(places) >= 0.05 * of and places is own else "warning", where,
                _ids(rows, places), of=of, got=f"{{n}} rows nearly equal a training row {text} (Jaccard {threshold})",
                why=_MEMORISED, fix="keep variants of one text in one split, for instance with `group`",
            )  # fmt: skip


def _passages(column: Column, split: str, known: set[int], places: Iterable[int]) -> Iterator[Finding]:
    rows = column.rows(split)
    repeated = _without_frame(rows, places, known)
    if len(repeated) >= 0.1 * len(rows):
        yield make_finding(
            "ngram_overlap", "warning", (column.name, split), _ids(rows, repeated), of=len(rows),
            got="{n} rows share 13 words in a row with a training row", why="passages or stories are shared by splits",
            fix="split by passage: give rows of one passage the same `group`",
        )  # fmt: skip


def _without_frame(rows: Sequence[Row], places: Iterable[int], known: set[int]) -> list[int]:
    """Places whose overlap is more than an instruction that all rows have."""
    found = [p for p in places if p not in known]
    return [] if len(found) > 0.9 * len(rows) else found


def _ids(rows: Sequence[Row], places: Iterable[int]) -> list[str]:
    return [rows[place].id for place in sorted(places)]


def check_ids(column: Column) -> Iterator[Finding]:
    """An id twice in a split: scores are stored per id."""
    for split, rows in column.splits.items():
        times = Counter(row.id for row in rows)
        twice = [row_id for row_id, count in times.items() if count > 1]
        if twice:
            yield make_finding(
                "id_twice", "error", (column.name, split), twice, of=len(rows),
                got="{n} ids are of more than one row", why="scores are stored per id",
                fix="give every row its own id, or none",
            )  # fmt: skip

"""What a user's file holds: rows of a prompt and a completion, found by the names of its columns."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import split_by_group

__all__ = ["DomainFiles", "collect", "read_rows"]

SPLITS: Mapping[str, Split] = {
    "train": "train", "training": "train", "validation": "validation", "valid": "validation", "val": "validation",
    "dev": "validation", "test": "test", "eval": "test",
}  # fmt: skip
"""Last word of a file's name -> its split."""

_PAIRS = (  # (prompt, completion) columns, in the order in which they are looked for
    ("prompt", "completion"),
    ("instruction", "output"),
    ("question", "answer"),
    ("input", "output"),
    ("prompt", "response"),
    ("text", "label"),
    ("prompt", "label"),
)
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
_ENOUGH = 30  # different prompts of which a tenth can be held out
_MOST_LABELS = 50
_ROWS_PER_LABEL = 5


@dataclass(frozen=True, kw_only=True)
class DomainFiles:
    """One domain, ready to be written.

    Args:
        name: Of the domain.
        sources: The user's files.
        columns: (prompt, completion) of each file.
        rows: {split: rows}.
        kind: `label` where few completions return often, else `generative`.
        split: Whether the splits were made here.
    """

    name: str
    sources: Sequence[Path]
    columns: Sequence[tuple[str, str]]
    rows: Mapping[Split, Sequence[Row]]
    kind: Literal["label", "generative"]
    split: bool

    def longest(self, part: Literal["prompt", "completion"]) -> int:
        """UTF-8 bytes of the longest prompt or completion: an upper bound of its tokens, whatever the tokenizer."""
        return max(len(getattr(row, part).encode()) for rows in self.rows.values() for row in rows)


def collect(paths: Sequence[Path]) -> list[DomainFiles]:
    """Group files by domain, read them, and make the splits that are missing.

    `law-train.csv` and `law-test.csv` are splits of `law`; `law.csv` alone is dealt out by the hash of its prompts:
    8 of 10 to train, 1 to validation, 1 to test; equal prompts stay together.

    Raises:
        UserError: A file cannot be read, or a domain has no training rows or no test rows.
    """
    groups: dict[str, dict[Split | None, Path]] = {}
    for path in paths:
        name, split = _place(path)
        parts = groups.setdefault(name, {})
        if split in parts or (parts and None in (split, *parts)):
            raise UserError(
                f"{path} and {next(iter(parts.values()))} are both the domain {name!r}",
                why="a domain is one file, or one file per split (NAME-train, NAME-validation, NAME-test)",
                fix="rename one of them",
            )
        parts[split] = path
    return [_domain(name, parts) for name, parts in groups.items()]


def _place(path: Path) -> tuple[str, Split | None]:
    match = re.fullmatch(r"(.+?)[-_.](\w+)", path.stem)
    if match and match[2].lower() in SPLITS:
        return _slug(match[1]), SPLITS[match[2].lower()]
    return _slug(path.stem), None


def _slug(text: str) -> str:
    return re.sub(r"\W+", "_", text).strip("_").lower() or "domain"


def _domain(name: str, parts: Mapping[Split | None, Path]) -> DomainFiles:
    read = {split: read_rows(path) for split, path in parts.items()}
    columns = [pair for pair, _ in read.values()]
    rows: dict[Split, list[Row]]
    if None in read:
        rows = _split(read[None][1], validation=0.1, test=0.1)
    else:
        rows = {split: rows for split, (_, rows) in read.items() if split is not None}
        given = rows.get("train", [])
        if "test" not in rows or "validation" not in rows:
            test = 0.0 if "test" in rows else 0.1
            rows = _split(given, validation=0.0 if "validation" in rows else 0.1, test=test) | {
                split: part for split, part in rows.items() if split != "train"
            }
    if not rows.get("train") or not rows.get("test"):
        raise UserError(
            f"{', '.join(map(str, parts.values()))}: {len(rows.get('train', ()))} rows to train on, "
            f"{len(rows.get('test', ()))} to test on",
            why="a domain is trained on some rows and scored on others",
            fix=f"give more rows ({_ENOUGH} different prompts at least), or a file per split (NAME-train, NAME-test)",
        )
    made = not {"train", "validation", "test"} <= {*parts}
    return DomainFiles(name=name, sources=[*parts.values()], columns=columns, rows=rows, kind=_kind(rows), split=made)


def _split(rows: Sequence[Row], *, validation: float, test: float) -> dict[Split, list[Row]]:
    """As `split_by_group`; a hash that leaves enough rows without one to test on is followed by another.

    A tenth of 40 groups by hash is no group in 1.5 % of all files. What is dealt is written down, so the choice of the
    salt is made once.
    """
    splits = split_by_group(rows, validation=validation, test=test)
    tries = 100 if test and len({row.group or row.id for row in rows}) >= _ENOUGH else 0
    for n in range(tries):
        if splits["train"] and splits["test"]:
            break
        splits = split_by_group(rows, validation=validation, test=test, salt=f"residency {n}")
    return splits


def _kind(rows: Mapping[Split, Sequence[Row]]) -> Literal["label", "generative"]:
    counts = Counter(row.completion for part in rows.values() for row in part)
    few = 2 <= len(counts) <= _MOST_LABELS and sum(counts.values()) >= _ROWS_PER_LABEL * len(counts)
    return "label" if few else "generative"


def read_rows(path: Path) -> tuple[tuple[str, str], list[Row]]:
    """The rows of a JSON Lines, JSON, CSV or TSV file; every cell is text, nothing is inferred.

    Returns:
        The two columns that were taken, and the rows; equal prompts form a group.

    Raises:
        UserError: The file is not there, is none of these, has no such columns or an empty cell in them.
    """
    records = list(_records(path))
    if not records:
        raise UserError(f"{path} has no rows", why="a domain is made from its rows", fix="check the file")
    columns = set.intersection(*({*record} for record in records))
    pair = next((pair for pair in _PAIRS if {*pair} <= columns), None)
    if pair is None:
        raise UserError(
            f"{path} has the columns {', '.join(sorted(map(str, columns))) or 'none'} in every row",
            why=f"wanted are {'; '.join(' and '.join(pair) for pair in _PAIRS)}",
            fix="rename two columns; other formats are read by the domains of `residency presets domain`",
        )
    rows = []
    for number, record in enumerate(records, 1):
        prompt, completion = (_text(record[column], f"{path}, row {number}, {column}") for column in pair)
        if pair == ("instruction", "output") and str(record.get("input") or "").strip():
            prompt = f"{prompt}\n{record['input']}"
        group = " ".join(prompt.casefold().split())
        rows.append(Row(id=str(record.get("id") or number), prompt=prompt, completion=completion, group=group))
    return pair, rows


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    suffix = path.suffix.lower()
    if suffix not in _SUFFIXES:
        raise UserError(
            f"{path} ends in {suffix or 'nothing'}",
            why=f"files are told apart by their ends: {', '.join(_SUFFIXES)}",
            fix="convert it, or write a domain of your own",
        )
    try:
        text = path.read_text(encoding="utf-8-sig")
        if suffix in (".csv", ".tsv"):
            with path.open(encoding="utf-8-sig", newline="") as file:
                yield from csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            return
        values = json.loads(text) if suffix == ".json" else map(json.loads, filter(str.strip, text.split("\n")))
        for number, value in enumerate(values, 1):
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}, row {number}: {type(value).__name__}",
                    why="every row is an object",
                    fix='write {"prompt": "...", "completion": "..."}',
                )
            yield value
    except (OSError, UnicodeDecodeError, csv.Error, json.JSONDecodeError) as error:
        raise UserError(
            f"cannot read {path}: {error}",
            why="a domain is made from its rows",
            fix="give a UTF-8 file of JSON Lines, JSON, CSV or TSV",
        ) from error


def _text(value: Any, where: str) -> str:
    text = value if isinstance(value, str) else "" if value is None else json.dumps(value, ensure_ascii=False)
    if not text.strip():
        raise UserError(f"{where} is empty", why="every row needs both", fix="fill it in, or delete the row")
    return text.strip()

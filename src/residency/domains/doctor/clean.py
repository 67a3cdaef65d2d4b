"""A cleaned copy of a domain's files; the originals are never touched."""

from __future__ import annotations

import html
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from residency.core.tensor_files import replace_file
from residency.core.types import Row, Split
from residency.domains.doctor.finding import Column
from residency.domains.doctor.similarity import text_key

__all__ = ["cleaned", "write_cleaned"]

_NOISE = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\u200b\u2060\ufeff]")
_ENTITY = re.compile(r"&(?:amp|lt|gt|quot|nbsp|#\d+);")


def cleaned(column: Column, others: Sequence[Column] = ()) -> tuple[dict[Split, list[Row]], dict[str, int]]:
    """(rows of every split, {what was done: how many times}).

    Control and invisible characters and carriage returns go, entities of HTML become their signs. Left out are rows
    without a completion, repeated rows (the first stays), and rows of train that are in a validation or test split of
    this or another domain, and rows of validation that are in the test: test rows stay.

    Args:
        column: The domain.
        others: Domains and probes whose scored rows must not be trained on.
    """
    done: Counter[str] = Counter()
    splits: dict[Split, list[Row]] = {s: [_repaired(r, done) for r in rows] for s, rows in column.splits.items()}
    held = {text_key(r.prompt) for c in others if c is not column for s in ("validation", "test")
            for r in c.rows(s)}  # fmt: skip
    test = {text_key(row.prompt) for row in splits.get("test", [])}
    validation = {text_key(row.prompt) for row in splits.get("validation", [])} - test
    forbidden: Mapping[str, set[str]] = {"train": held | test | validation, "validation": test, "test": set()}
    kept: dict[Split, list[Row]] = {}
    for split, rows in splits.items():
        kept[split], seen = [], set()
        for row in rows:
            key = f"{text_key(row.prompt)}\0{text_key(row.completion)}"
            if not row.completion.strip() and row.kind != "prompt":
                done["rows without a completion"] += 1
            elif text_key(row.prompt) in forbidden[split]:
                done[f"{split} rows that are scored elsewhere"] += 1
            elif key in seen:
                done["repeated rows"] += 1
            else:
                seen.add(key)
                kept[split].append(row)
    return kept, dict(done)


def _repaired(row: Row, done: Counter[str]) -> Row:
    texts = [_text(text) for text in (row.prompt, row.completion)]
    if texts != [row.prompt, row.completion]:
        done["texts repaired"] += 1
        return replace(row, prompt=texts[0], completion=texts[1])
    return row


def _text(text: str) -> str:
    plain = _NOISE.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _ENTITY.sub(lambda match: html.unescape(match[0]), plain)


def write_cleaned(column: Column, folder: Path, others: Sequence[Column] = ()) -> dict[str, Any]:
    """Write `<folder>/<domain>/<split>.jsonl`; {"files": paths, "done": what was done}."""
    kept, done = cleaned(column, others)
    files = []
    for split, rows in kept.items():
        path = folder / column.name / f"{split}.jsonl"
        if rows:
            path.parent.mkdir(parents=True, exist_ok=True)
            text = "".join(_line(row) for row in rows)
            replace_file(path, lambda temporary, text=text: _write(temporary, text))  # type: ignore[misc]
            files.append(str(path))
    return {"files": files, "done": done}


def _line(row: Row) -> str:
    value = {"id": row.id, "prompt": row.prompt, "completion": row.completion}
    return json.dumps(value | ({"group": row.group} if row.group else {}), ensure_ascii=False) + "\n"


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

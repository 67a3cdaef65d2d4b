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
            key = "\0".join(map(text_key, (row.prompt, row.completion, row.rejected)))
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
    texts: dict[str, Any] = {name: _text(getattr(row, name)) for name in ("prompt", "completion", "rejected")}
    turns = tuple(_turn(turn) for turn in row.messages)
    repaired = replace(row, **texts, messages=turns)
    if repaired == row and turns == row.messages:
        return row
    done["texts repaired"] += 1
    return repaired


def _turn(turn: Mapping[str, Any]) -> dict[str, Any]:
    """What is said in a turn; names, roles and calls of tools stay as they are."""
    return {key: _said(value) if key == "content" else value for key, value in turn.items()}


def _said(content: Any) -> Any:
    if isinstance(content, str):
        return _text(content)
    if isinstance(content, list):
        return [{**part, "text": _text(part["text"])} if isinstance(part, dict) and "text" in part else part
                for part in content]  # fmt: skip
    return content


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
    """The row in the format that it came in; what a reader would fill in by itself is left out."""
    more: dict[str, Any] = {"group": row.group, "references": list(row.references), "tools": list(row.tools)}
    more |= {"weight": row.weight if row.weight != 1 else None, **row.extra}
    value = {"id": row.id, **_columns(row), **{key: found for key, found in more.items() if found or key in row.extra}}
    return json.dumps(value, ensure_ascii=False) + "\n"


def _columns(row: Row) -> dict[str, Any]:
    """The columns by which a format is known (`residency.domains.readers.formats.WANTED`)."""
    asked: Any = [*row.messages] or row.prompt
    if row.kind == "pair":
        answers = {"chosen": row.completion, "rejected": row.rejected}
        said = {k: [{"role": "assistant", "content": v}] for k, v in answers.items()} if row.messages else answers
        return {"prompt": asked, **said}
    if row.kind == "unpaired" and not row.messages:
        return {"prompt": row.prompt, "completion": row.completion, "label": row.wanted}
    if row.kind == "unpaired":
        return {"prompt": [*row.messages[:-1]], "completion": [row.messages[-1]], "label": row.wanted}
    if row.kind == "prompt":
        return {"prompt": asked}
    if row.kind == "text":
        return {"text": row.completion}
    if row.messages:
        return {"messages": [*row.messages]}
    if row.kind == "labelled":
        return {"text": row.prompt, "label": row.completion}
    return {"prompt": row.prompt, "completion": row.completion}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""Columns of rows: their names, and which format they are."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from difflib import get_close_matches

from residency.core.errors import UserError
from residency.domains.readers.formats import COMPLETIONS, LABELS, PROMPTS, TEXTS, WANTED, Format
from residency.domains.readers.records import Record

__all__ = ["LOOKED_AT", "check_columns", "infer_format", "rename"]

LOOKED_AT = 1000
"""So many rows at the beginning of a file say what its columns are."""


def check_columns(records: Sequence[Record], columns: Mapping[str, str]) -> None:
    """What must hold for columns to be renamed.

    Args:
        records: The first of a file, as it names their columns.
        columns: Our name -> the file's.

    Raises:
        UserError: No record has such a column, or the new name is taken.
    """
    there = sorted({key for record in records[:LOOKED_AT] for key in record.value})
    for ours, theirs in columns.items():
        if theirs not in there:
            near = get_close_matches(theirs, there, n=len(there), cutoff=0)
            got = f"columns.{ours}: {theirs}, and the columns are {', '.join(near)}"
            raise UserError(got, why="there is no such column", fix="give one of these names")
        if ours in there and ours != theirs and ours not in columns.values():
            got = f"columns.{ours}: {theirs}, and there is a column {ours!r} already"
            raise UserError(got, why="one of the two would be lost", fix=f"rename {ours!r} too, or leave this out")


def rename(records: Sequence[Record], columns: Mapping[str, str]) -> list[Record]:
    """Records under our names; `columns` is our name -> the file's."""
    if not columns:
        return list(records)
    back = {theirs: ours for ours, theirs in columns.items()}
    return [Record(r.where, r.number, {back.get(k, k): v for k, v in r.value.items()}) for r in records]


def infer_format(records: Sequence[Record], name: str) -> Format:
    """The one format whose columns the records have.

    Args:
        records: At least one; the columns that at least half of the first thousand have count.
        name: Of the file, for messages.

    Raises:
        UserError: None, or more than one: which is meant is for the user to say.
    """
    seen = records[:LOOKED_AT]
    counts = Counter(key for record in seen for key in record.value)
    keys = {key for key, times in counts.items() if 2 * times >= len(seen)}
    found = _candidates(keys, seen)
    if len(found) == 1:
        return found[0]
    where = seen[0].where if not found else name
    naming = "name the columns: columns: {prompt: ..., completion: ...}"
    raise UserError(
        f"{where}: columns {', '.join(sorted(counts))}"
        + (f" could be {' or '.join(f'{f} {WANTED[f]}' for f in found)}" if found else ""),
        why='a format is known by its columns, such as "prompt" and "completion", "messages", "text" and "label"',
        fix=f"write format: {found[0]} (or another)" if found else naming,
    )


def _candidates(keys: set[str], seen: Sequence[Record]) -> list[Format]:
    prompt, completion = [k for k in PROMPTS if k in keys], [k for k in COMPLETIONS if k in keys]
    label, text = [k for k in LABELS if k in keys], [k for k in TEXTS if k in keys]
    found: list[Format] = []
    if "messages" in keys:
        found.append("messages")
    if "conversations" in keys:
        found.append("sharegpt")
    if {"chosen", "rejected"} <= keys:
        found.append("pair")
    if {"instruction", "output"} <= keys:
        found.append("alpaca")
        completion = [k for k in completion if k != "output"] or (["output"] if prompt else [])
    if prompt and completion:
        wanted = [r.value.get("label") for r in seen] if "label" in keys else []
        if wanted and all(isinstance(w, bool) for w in wanted):
            found.append("unpaired")
        elif label:
            found += ["completion", "labelled"]
        else:
            found.append("completion")
    elif (prompt or text or {"sentence1", "sentence2"} <= keys) and label and not found:
        found.append("labelled")
    elif text == ["text"] and not prompt:
        found.append("text")
    elif prompt and not found:
        found.append("prompt")
    return found

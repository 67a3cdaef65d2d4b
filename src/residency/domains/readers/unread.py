"""What files hold that makes no row: columns that no format reads, other files of a folder, examples of a task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from residency.core.text import printable
from residency.core.types import Split
from residency.domains.left_out import LeftOut
from residency.domains.readers.containers import SUFFIXES
from residency.domains.readers.formats import COMPLETIONS, LABELS, PROMPTS, TEXTS, Format
from residency.domains.readers.records import Record

__all__ = ["UnreadColumns", "of_blanks", "of_files", "of_task", "of_twin"]

_EVERY = frozenset({"id", "group", "weight", "references"})
_PAIR = frozenset({"sentence1", "sentence2"})
_ALPACA = frozenset({"instruction", "input", "output", "system", "history"})
_NAMED = 8  # columns or files that are named


class UnreadColumns:
    """Columns that hold something, and that no row is made of; of all files of a domain."""

    def __init__(self) -> None:
        self._there: set[str] = set()
        self._unread: dict[str, None] = {}

    def look(self, chosen: Format, records: Iterable[Record]) -> None:
        """See what a format leaves of the records of a file, under our names."""
        left: dict[tuple[str, ...], frozenset[str]] = {}
        for record in records:
            value = record.value
            if (shape := tuple(value)) not in left:
                # Rows of the same columns are alike: whether they are turns or texts is seen in the first.
                left[shape] = frozenset(shape) - _read(chosen, value)
                self._there.update(shape)
            for key in left[shape]:
                if value[key] not in (None, "", []):
                    self._unread[key] = None

    def left_out(self) -> LeftOut:
        """How many, and their names."""
        names = ", ".join(map(printable, sorted(self._unread)[:_NAMED])) + ("..." if len(self._unread) > _NAMED else "")
        return LeftOut(
            what="columns", unit="columns", count=len(self._unread), of=len(self._there), how=f"not read: {names}"
        )


def _talk(value: Mapping[str, Any]) -> Any:
    return value.get("history") or value.get("system")


def _read(chosen: Format, value: Mapping[str, Any]) -> frozenset[str]:
    """The columns that a format reads of a record."""
    turns = any(isinstance(value.get(key), list) for key in (*PROMPTS, "chosen"))
    tools = {"tools"} if turns or chosen in ("messages", "sharegpt") or (chosen == "alpaca" and _talk(value)) else set()
    asked = _first(value, PROMPTS)
    of: Mapping[Format, Iterable[str]] = {
        "completion": {asked, _first(value, COMPLETIONS)},
        "messages": {"messages"},
        "text": {"text"},
        "prompt": value.keys() - {"system", "tools"},  # what is left of a prompt's row is what a reward reads
        "pair": {"prompt", "chosen", "rejected", "margin"},
        "unpaired": {asked, _first(value, COMPLETIONS), "label"},
        "labelled": {_first(value, LABELS)} | (_PAIR if value.keys() >= _PAIR else {_first(value, (*PROMPTS, *TEXTS))}),
        "alpaca": _ALPACA,
        "sharegpt": {"conversations", "system"},
    }
    return _EVERY | tools | frozenset(of[chosen])


def _first(value: Mapping[str, Any], names: Sequence[str]) -> str:
    return next((name for name in names if name in value), names[0])


def of_blanks(split: Split, stripped: int, of: int) -> LeftOut:
    """Completions that lost blanks around them."""
    how = "lost the blanks around them (strip: false keeps them)"
    return LeftOut(split=split, what="blanks", unit="completions", count=stripped, of=of, how=how)


def of_files(folder: Path, read: Iterable[str]) -> Iterator[LeftOut]:
    """Files of rows in a folder that belong to no split."""
    known = {Path(name).name for name in read} | {"labels.json"}
    files = sorted(p.name for p in folder.iterdir() if p.is_file() and {s.lower() for s in p.suffixes} & SUFFIXES)
    others = [name for name in files if name not in known]
    how = f"of the folder not read: {', '.join(map(printable, others[:_NAMED]))}"
    yield LeftOut(what="files", unit="files", count=len(others), of=len(files), how=how)


def of_twin(split: Split, rows: int) -> LeftOut:
    """A validation file that is the test file, as some streams publish it."""
    how = "not read: the file is that of the test in published copies"
    return LeftOut(split=split, what="twin", unit="rows", count=rows, of=rows, how=how)


def of_task(split: Split, document: Mapping[str, Any]) -> Iterator[LeftOut]:
    """What a task of Natural Instructions has beside its instances."""
    shown = Counter({key: len(v) for key, v in document.items() if key.endswith("Examples") and isinstance(v, list)})
    how = "that show the task are not read"
    yield LeftOut(split=split, what="task_examples", unit="examples", count=shown.total(), of=shown.total(), how=how)
    definition = document.get("Definition")
    number = len(definition) if isinstance(definition, list) else 1
    how = "of the task are not read (the first is)"
    yield LeftOut(split=split, what="definitions", unit="definitions", count=max(0, number - 1), of=number, how=how)

"""A domain from your own files: one JSON object per line."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain, Kind, hash_order, split_by_group

__all__ = ["Jsonl"]

_WANTED = '{"prompt": "...", "completion": "..."}, optionally with "id" and "group"'


class Jsonl(Domain):
    """Rows from JSON Lines files (UTF-8): `{"prompt": str, "completion": str}` per line.

    `"id"` (default: file and line) and `"group"` (rows of one group stay in one split) are optional, other keys are
    ignored, blank lines are skipped, completions are stripped. The order of the lines does not matter: a limit such
    as `max_train` keeps a fair sample, not the first lines.

    Args:
        train: File of the training rows.
        test: File of the test rows.
        validation: File of the validation rows; null takes a tenth of the groups of `train`.
        kind: `label` if the completions are a closed set of classes, else `generative`.

    Raises:
        UserError: On reading: a file or a line is not as described; the message names the line.
    """

    licence = "not stated"
    attribution = "data given by the user"

    def __init__(
        self, *, train: str, test: str, validation: str | None = None, kind: Kind = "generative", **options: Any
    ) -> None:
        self.kind = kind
        super().__init__(**options)
        self.source = train
        self.train, self.validation, self.test = train, validation, test

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """Rows of the files, in hash order."""
        train, test = _read(self.train, "train"), _read(self.test, "test")
        if self.validation is None:
            carved = split_by_group(train, validation=0.1, test=0.0)
            return carved | {"test": hash_order(test)}
        validation = _read(self.validation, "validation")
        return {"train": hash_order(train), "validation": hash_order(validation), "test": hash_order(test)}


def _read(name: str, split: Split) -> list[Row]:
    path = Path(name).expanduser()
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(
            f"{split} file {name!r}: {error.strerror}",
            why="the domain's rows are read from it",
            fix="give the path of a readable JSON Lines file, absolute or relative to the folder you start from",
        ) from error
    rows = [_row(line, f"{name}, line {n}", f"{split}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(
            f"{split} file {name!r}, line 1: no row in the file",
            why="a split needs at least one row",
            fix=f"write one object per line: {_WANTED}",
        )
    return rows


def _row(line: bytes, where: str, default_id: str) -> Row:
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
        # A lone surrogate (backslash u d800) passes the parser, but no tokenizer takes it.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        _refuse(where, f"text that is not Unicode: {error.reason}", "save the file as UTF-8, without lone surrogates")
    except (ValueError, RecursionError) as error:
        _refuse(where, f"{_short(text)} is not JSON: {getattr(error, 'msg', error)}", f"write {_WANTED}")
    if not isinstance(value, dict):
        _refuse(where, f"{type(value).__name__} {_short(text)}", f"write {_WANTED}")
    return Row(
        id=_optional(value, "id", where) or default_id,
        prompt=_text(value, "prompt", where),
        completion=_text(value, "completion", where).strip(),
        group=_optional(value, "group", where),
    )


def _text(value: dict[str, Any], key: str, where: str) -> str:
    if key not in value:
        _refuse(where, f"no {key!r}, only {sorted(value)}", f"write {_WANTED}")
    text = value[key]
    if not isinstance(text, str):
        _refuse(where, f"{key!r} is {type(text).__name__} {_short(text)}", f'put the text in quotes: "{key}": "..."')
    if not text.strip():
        _refuse(where, f"{key!r} is empty", f"write the {key}, or delete the line")
    return text


def _optional(value: dict[str, Any], key: str, where: str) -> str:
    found = value.get(key)
    if found is None:
        return ""
    # Ids are numbers in many data sets; True is an int in Python, but no id.
    if isinstance(found, str | int) and not isinstance(found, bool):
        return str(found)
    _refuse(where, f"{key!r} is {type(found).__name__} {_short(found)}", f"write {key!r} as a text, or leave it out")


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _refuse(where: str, got: str, fix: str) -> NoReturn:
    raise UserError(f"{where}: {got}", why=f"every line has to be {_WANTED}", fix=fix) from None

"""JSON without what silently destroys data: no NaN, no key twice, no lone surrogates, no control characters."""

from __future__ import annotations

import json
import re
from typing import Any, NoReturn

from residency.core.errors import UserError

__all__ = ["check_text", "parse_json", "refuse", "short"]

# Everything below a blank but tab, line feed and carriage return: such bytes are rests of binary files.
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f]")


def refuse(where: str, got: str, *, why: str, fix: str) -> NoReturn:
    """Stop at a place of a file.

    Raises:
        UserError: Always.
    """
    raise UserError(f"{where}: {got}", why=why, fix=fix) from None


def short(value: Any, length: int = 60) -> str:
    """A value in one quoted line of at most about `length` characters."""
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return repr(text if len(text) <= length else text[: length - 3] + "...")


def parse_json(text: str, where: str, *, why: str, fix: str) -> Any:
    """The value of a JSON text.

    Args:
        text: One value.
        where: File and line, for messages.
        why: What the file has to hold, for messages.
        fix: What to write instead, for messages.

    Raises:
        UserError: Not JSON, or JSON whose meaning is not certain: a key twice, NaN, a lone surrogate, control
            characters in a text.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_doubles, parse_constant=_no_constant)
    except _UncertainError as error:
        refuse(where, str(error), why=why, fix=error.fix)
    except (ValueError, RecursionError) as error:
        refuse(where, f"{short(text)} is not JSON: {getattr(error, 'msg', error)}", why=why, fix=fix)
    for found in _texts(value):
        check_text(found, where, why=why)
    return value


def check_text(text: str, where: str, *, why: str) -> None:
    """What no tokenizer takes, and what no text has.

    Raises:
        UserError: A lone surrogate or a control character.
    """
    control = _CONTROL.search(text)
    if control:
        got = f"control character U+{ord(control[0]):04X} in {short(text)}"
        refuse(where, got, why=why, fix="remove the character, or save the file as plain UTF-8 text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        got = f"text that is not Unicode: {error.reason}"
        refuse(where, got, why=why, fix="save the file as UTF-8, without lone surrogates")


class _UncertainError(Exception):
    def __init__(self, got: str, fix: str) -> None:
        super().__init__(got)
        self.fix = fix


def _without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise _UncertainError(f"key {key!r} twice in one object", "keep one of them: the other would be lost")
        found[key] = value
    return found


def _no_constant(name: str) -> NoReturn:
    raise _UncertainError(f"{name} is no JSON value", f'put it in quotes ("{name}") if it is a text, or use null')


def _texts(value: Any) -> list[str]:
    """All texts in a value, keys included; without recursion, whatever the depth."""
    found: list[str] = []
    open_values = [value]
    while open_values:
        item = open_values.pop()
        if isinstance(item, str):
            found.append(item)
        elif isinstance(item, list):
            open_values += item
        elif isinstance(item, dict):
            open_values += [*item.keys(), *item.values()]
    return found

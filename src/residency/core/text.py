"""Text from data, on a terminal and on a page: what a name, a row or an error holds moves no cursor."""

from __future__ import annotations

import re

__all__ = ["for_terminal", "printable", "safe_name"]

_KEPT = "\n\t"


def printable(name: object, limit: int = 60) -> str:
    """A name from data on one line: no control, direction or other invisible characters, at most `limit` long."""
    text = "".join(c for c in " ".join(str(name).split()) if c.isprintable())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"


def for_terminal(text: object) -> str:
    r"""Text of any length and any number of lines, with what a terminal would obey written out.

    Line feeds and tabs stay. Control characters (escape sequences begin with one), marks of direction, separators of
    lines that are none, and halves of characters (of file names that are no UTF-8) become `\x1b`, `\u202e`, `\udc80`.
    """
    return "".join(c if c.isprintable() or c in _KEPT else _escaped(c) for c in str(text))


def _escaped(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def safe_name(name: str, *, otherwise: str = "domain", limit: int = 60) -> str:
    """A name from data as a part of a file name: letters, digits, `_` and `-`, at most `limit` of them.

    Args:
        name: Anything.
        otherwise: What stands for a name of which nothing is left.
        limit: Characters.
    """
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:limit].strip("_") or otherwise

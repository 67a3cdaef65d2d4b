"""Text that a terminal and a page can show."""

from __future__ import annotations

__all__ = ["printable"]


def printable(name: object, limit: int = 60) -> str:
    """A name from data on one line: no control, direction or other invisible characters, at most `limit` long."""
    text = "".join(c for c in " ".join(str(name).split()) if c.isprintable())
    return text if len(text) <= limit else f"{text[: limit - 1]}…"

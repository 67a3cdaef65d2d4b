"""YAML that somebody else may have written: one reader, with limits, for every config, study, preset and record.

Aliases make 306 bytes of YAML stand for 10^9 values, a list may contain itself, 3,000 brackets exhaust the stack: all
of that is seen in the stream of events, before a single value is made (PyYAML has no limits of its own). Tags that make
objects are refused by the safe loader.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from residency.core.errors import UserError
from residency.core.yaml_keys import KeyCheck

__all__ = ["MAX_BYTES", "MAX_DEPTH", "MAX_NODES", "YamlRefused", "check_yaml", "parse_yaml", "read_yaml"]

MAX_BYTES = 16 * 2**20
MAX_DEPTH = 64
MAX_NODES = 200_000
"""Values, keys, lists and mappings in one text, those that aliases repeat counted again."""

# libyaml is ten times as fast as the Python reader and knows the same language.
_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class YamlRefused(yaml.YAMLError, ValueError):
    """A text that is no YAML, or more than a config can be.

    Args:
        problem: What is wrong.
        line: Where, from 1; `None` if that is not known.
    """

    def __init__(self, problem: str, *, line: int | None = None) -> None:
        super().__init__(problem if line is None else f"line {line}: {problem}")
        self.problem = problem
        self.line = line


def check_yaml(text: str) -> None:
    """Compare a text with the limits; nothing is built.

    Raises:
        YamlRefused: It is longer than `MAX_BYTES`, deeper than `MAX_DEPTH`, has more than `MAX_NODES` values once
            aliases are written out, contains itself, holds a NUL character, has a key twice or one that is no text, or
            is not YAML.
    """
    if len(text) > MAX_BYTES:
        raise YamlRefused(f"it has {len(text):,} characters; a config has at most {MAX_BYTES:,}")
    counter, keys = _Counter(), KeyCheck()
    try:
        for event in yaml.parse(text, Loader=_Loader):
            counter.add(event)
            if (problem := keys.add(event)) is not None:
                raise YamlRefused(problem, line=_line(event))
    except YamlRefused:
        raise
    except yaml.YAMLError as error:
        raise _refused(error) from error


def parse_yaml(text: str) -> Any:
    """The value of a YAML text.

    Raises:
        YamlRefused: It is not YAML, beyond the limits of `check_yaml`, or has a key that is no name (null, a date).
    """
    check_yaml(text)
    try:
        value = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise _refused(error) from error
    # What a scalar cannot be: a date without such a day, a number of 5,000 digits.
    except (ValueError, OverflowError, TypeError) as error:
        raise YamlRefused(" ".join(str(error).split())) from error
    if (key := _bad_key(value)) is not None:
        raise YamlRefused(f"{key} is the name of a key; names are texts or numbers (put it in quotes)")
    return value


def read_yaml(path: Path, *, what: str) -> Any:
    """The content of a YAML file.

    Args:
        path: The file.
        what: What it should hold, for the message.

    Raises:
        UserError: It cannot be read, is not YAML or is beyond the limits; the line is named.
    """
    try:
        if path.is_file() and path.stat().st_size > MAX_BYTES:
            raise YamlRefused(f"it has {path.stat().st_size:,} bytes; a config has at most {MAX_BYTES:,}")
        return parse_yaml(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            why=f"{what} was to be read from it",
            fix="give an existing YAML file; paths are relative to the folder you start from, and inside a file to it",
        ) from error
    except (YamlRefused, ValueError) as error:
        problem, line = getattr(error, "problem", None) or " ".join(str(error).split()), getattr(error, "line", None)
        raise UserError(
            f"{path}{'' if line is None else f', line {line}'} is not YAML that can be read: {problem}",
            why=f"{what} was to be read from it",
            fix="correct that line: usual causes are indentation, a bracket or a quote that is not closed, and tabs",
        ) from error


def _line(event: Any) -> int:
    return int(event.start_mark.line) + 1


class _Counter:
    """Depth and size of a document while its events pass by; what an alias stands for counts every time."""

    def __init__(self) -> None:
        self.nodes = 0
        self._open: list[tuple[str | None, int]] = []  # anchor and number of nodes before it, of what is not closed yet
        self._sizes: dict[str, int] = {}

    def add(self, event: Any) -> None:
        line = _line(event)
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in self._open):
                raise YamlRefused(f"*{event.anchor} stands inside of itself", line=line)
            self.nodes += self._sizes.get(event.anchor or "", 1)
        elif isinstance(event, yaml.ScalarEvent):
            if "\0" in event.value:
                raise YamlRefused("a text holds a NUL character, which no name and no path can have", line=line)
            self._count(event.anchor, self.nodes)
        elif isinstance(event, yaml.CollectionStartEvent):
            self._open.append((event.anchor, self.nodes))
            if len(self._open) > MAX_DEPTH:
                raise YamlRefused(f"it is nested deeper than {MAX_DEPTH} levels", line=line)
        elif isinstance(event, yaml.CollectionEndEvent):
            self._count(*self._open.pop())
        if self.nodes > MAX_NODES:
            raise YamlRefused(f"it stands for more than {MAX_NODES:,} values once aliases are written out", line=line)

    def _count(self, anchor: str | None, before: int) -> None:
        self.nodes += 1
        if anchor is not None:
            self._sizes[anchor] = self.nodes - before


def _refused(error: yaml.YAMLError) -> YamlRefused:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    text = " ".join(str(problem or error).split())
    return YamlRefused(text, line=None if mark is None else mark.line + 1)


def _bad_key(value: Any) -> str | None:
    """A key that is neither a text nor a number; `None` if there is none."""
    if isinstance(value, dict):
        bad = next((repr(key) for key in value if not isinstance(key, str | int | float)), None)
        return bad or next((found for part in value.values() if (found := _bad_key(part)) is not None), None)
    parts = value if isinstance(value, list) else []
    return next((found for part in parts if (found := _bad_key(part)) is not None), None)

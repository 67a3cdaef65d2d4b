"""Names of keys in a YAML text, seen in the stream of its events: each once per mapping, each a text.

PyYAML keeps the last of two equal keys without a word: of two mitigations, or two `trainer` sections, the first is
gone. And `on`, `null` or `2024` without quotes are a truth value, nothing and a number, not names.
"""

from __future__ import annotations

from typing import Any

import yaml

__all__ = ["KeyCheck"]

_RESOLVER: Any = yaml.SafeLoader("")
_TEXT, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"


class KeyCheck:
    """Follows the events of a text; `add` tells what is wrong with a key as soon as it has passed by."""

    def __init__(self) -> None:
        # Of every collection that is not closed: the lines of its keys (`None` for a list), and whether a key is next.
        self._open: list[tuple[dict[str, int] | None, bool]] = []

    def add(self, event: Any) -> str | None:
        """What is wrong with the key that this event is, or `None`."""
        problem = None
        if isinstance(event, yaml.ScalarEvent):
            problem = self._key(event)
            self._value()
        elif isinstance(event, yaml.AliasEvent):
            self._value()
        elif isinstance(event, yaml.MappingStartEvent):
            self._open.append(({}, True))
        elif isinstance(event, yaml.SequenceStartEvent):
            self._open.append((None, False))
        elif isinstance(event, yaml.CollectionEndEvent):
            self._open.pop()
            self._value()
        return problem

    def _key(self, event: Any) -> str | None:
        keys, expected = self._open[-1] if self._open else (None, False)
        if keys is None or not expected:
            return None
        tag = event.tag or _RESOLVER.resolve(yaml.ScalarNode, event.value, event.implicit)
        if tag == _MERGE:
            return None
        if tag != _TEXT:
            return f"{event.value or 'nothing'} is the name of a key, and no text; put it in quotes"
        line = event.start_mark.line + 1
        if event.value in keys:
            return f"the key {event.value!r} stands here and in line {keys[event.value]}; only one would count"
        keys[event.value] = line
        return None

    def _value(self) -> None:
        """A key or a value has ended: the other is next."""
        if self._open and self._open[-1][0] is not None:
            keys, expected = self._open[-1]
            self._open[-1] = keys, not expected

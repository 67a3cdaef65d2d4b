"""Three functions of jsonargparse that took a third of the time of a parse; these here give the same.

The action of a key was searched for among all of them. A key such as `model.adapter.init_args` was cut at
every access. A copy of a namespace set every value by its key.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container
from functools import cache, partial
from typing import Any
from weakref import WeakKeyDictionary

from jsonargparse import Namespace, _actions, _core, _namespace, _subcommands

__all__ = ["install"]


def install() -> None:
    """Put them in place; once in a process."""
    _core.find_action_and_subcommand = partial(_find, _subcommands.find_action_and_subcommand)
    _subcommands.find_action_and_subcommand = _core.find_action_and_subcommand
    original = Namespace._parse_key

    def parse_key(self: Namespace, key: Any) -> tuple[str, Any, str]:
        return original(self, key) if type(key) is not str or _is_refused(key) else _place(self, key)

    Namespace._parse_key = parse_key
    _namespace.recreate_branches = _core.recreate_branches = _copied


# Parser -> (its actions when they were sorted, name of a key -> its actions in their order).
_SORTED: WeakKeyDictionary[Any, tuple[list[Any], dict[str, list[Any]]]] = WeakKeyDictionary()


def _find(original: Any, parser: Any, dest: str, exclude: Any = None) -> Any:
    """(action of a key, subcommand that it belongs to), as the original finds them one by one."""
    known = _SORTED.get(parser)
    if known is None or known[0] != parser._actions:
        known = _SORTED[parser] = [*parser._actions], _by_name(parser._actions)
    # Subcommands come first and have parsers of their own.
    if _SUBCOMMANDS in known[1]:
        return original(parser, dest, exclude)
    found = [action for action in known[1].get(dest, ()) if exclude is None or not isinstance(action, exclude)]
    last = (_actions._ActionConfigLoad, _actions.ActionFail)
    return next((action for action in found if not isinstance(action, last)), found[-1] if found else None), None


_SUBCOMMANDS = ""  # no key is empty


def _by_name(actions: list[Any]) -> dict[str, list[Any]]:
    found: dict[str, list[Any]] = {}
    for action in _actions.filter_non_parsing_actions(actions):
        if isinstance(action, _subcommands.ActionSubCommands):
            found[_SUBCOMMANDS] = [action]
        for name in {action.dest, *(word[2:] for word in action.option_strings if word.startswith("--"))}:
            found.setdefault(name, []).append(action)
    return found


@cache
def _is_refused(key: str) -> bool:
    """Whether the original raises an error that says what is wrong."""
    return " " in key or "" in key.split(".")


@cache
def _parts(key: str) -> tuple[tuple[str, ...], str, str]:
    """Branches of a key, its last part, and the branches in one word."""
    *branches, leaf = map(_namespace.add_clash_mark, key.split("."))
    return tuple(branches), leaf, ".".join(branches)


def _place(namespace: Namespace, key: str) -> tuple[str, Any, str]:
    """(last part, what holds it or `None`, branches in one word), as `Namespace._parse_key` gives them."""
    branches, leaf, parent = _parts(key)
    holder: Any = namespace
    for branch in branches:
        if not (hasattr(holder, branch) or (isinstance(holder, dict) and branch in holder)):
            return leaf, None, parent
        holder = holder[branch]
        if holder is not None and not isinstance(holder, Namespace | dict):
            return leaf, None, parent
    return leaf, holder, parent


def _copied(data: Any, skip_keys: Container[str] | None = None) -> Any:
    """A copy of nested namespaces, dictionaries and lists, without some keys; other values are the same ones."""
    if isinstance(data, list):
        return [_copied(value, skip_keys) for value in data]
    if not isinstance(data, Namespace | dict) or isinstance(data, OrderedDict):
        return data
    made = type(data)()
    values = data if isinstance(data, dict) else vars(data)
    # The names of attributes are last parts already: nothing has to be cut.
    places = made if isinstance(made, dict) else vars(made)
    for key, value in values.items():
        if skip_keys is None or key not in skip_keys:
            places[key] = _copied(value, skip_keys)
    return made

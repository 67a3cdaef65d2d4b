"""One command line is parsed once: jsonargparse parses every part of it about ten times, with the same result.

A part (an adapter, a domain) is a class path with arguments. jsonargparse adapts it when its file is read, when
defaults are added to it and when the whole is validated; each time every part inside of it is adapted anew, several
times; and all of that happens for the verb and again for the program, whose one argument the verb is. Here, from
`one_parse` until its end, (1) what a part's parser makes of given values is kept, (2) defaults of parts are added by
the verb's parser alone, and (3) the values of a verb are validated key by key, not as one value as well.

Nothing is kept beyond one command line: what a part means may depend on files, and on classes that are defined anew.

All of this follows jsonargparse's own inner ways, so it is done for versions whose ways were read (`KNOWN`) and no
others: with another one a command line means the same and takes two to three times as long to parse.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.metadata import version
from typing import Any

from jsonargparse import Namespace

__all__ = ["KNOWN", "in_one_parse", "kept_or_parsed", "one_parse"]

KNOWN = "4.53."
"""How the versions of jsonargparse begin that this was read from."""


def _context() -> tuple[ContextVar[Any], ...]:
    """What the same values are parsed to depends on these as well."""
    from jsonargparse import _common, _link_arguments, _paths, _required, _subcommands, _typehints, _util

    return (
        _common.lenient_check,
        _common.load_value_mode,
        _common.parsing_defaults,
        _common.validating_defaults,
        _link_arguments.apply_config_skip,
        _paths._current_path_dir,
        _required._suppressed_required_actions,
        _subcommands.parse_kwargs,
        _typehints.sub_defaults,
        _util.config_load_stack,
    )


_CONTEXT = _context() if version("jsonargparse").startswith(KNOWN) else ()
# Key -> (what was made of it; what the key names by identity, which must live as long).
_kept: ContextVar[dict[Any, tuple[Any, Any]] | None] = ContextVar("_kept", default=None)


@contextmanager
def one_parse(parser: Any) -> Iterator[None]:
    """Within, `parser` parses a command line that begins with its verb; it is left as it was, whatever comes."""
    token = _kept.set({} if _CONTEXT else None)
    try:
        yield
    finally:
        _kept.reset(token)
        # Left behind where the rest of the line is refused: the next line would be printed.
        vars(parser).pop("print_config", None)


def in_one_parse() -> bool:
    """Whether `one_parse` has begun, with a version of jsonargparse that is known."""
    return _kept.get() is not None


def kept_or_parsed(parse: Callable[..., Any], parser: Any, *args: Any, **kwargs: Any) -> Any:
    """`parse(*args, **kwargs)`, or a copy of what it gave for equal values in this command line.

    Args:
        parse: `parse_object` of `parser`. It may refuse; refusals are not kept.
        parser: Of a class that a value names.
        args: Values, the values before them, and how they are parsed.
        kwargs: The same by name.
    """
    kept = _kept.get()
    if kept is None:
        return parse(*args, **kwargs)
    key = (id(parser), _frozen((args, kwargs)), tuple(_frozen(variable.get()) for variable in _CONTEXT))
    if key not in kept:
        found = parse(*args, **kwargs)
        kept[key] = (_copied(found), (parser, args, kwargs))
        return found
    return _copied(kept[key][0])


def _frozen(value: Any) -> Any:
    """A hashable that equals another one only if both values are the same in type, content and order."""
    kind = type(value)
    if kind is Namespace:
        return kind, tuple((name, _frozen(item)) for name, item in vars(value).items())
    if kind is dict:
        return kind, tuple((_frozen(name), _frozen(item)) for name, item in value.items())
    if kind is list or kind is tuple:
        return kind, tuple(map(_frozen, value))
    plain = kind is str or kind is bool or kind is int or kind is float or value is None
    return kind, value if plain else id(value)


def _copied(value: Any) -> Any:
    """A value that may be changed without changing the first; what is neither namespace nor container is shared."""
    kind = type(value)
    if kind is Namespace:
        made = Namespace()
        vars(made).update((name, _copied(item)) for name, item in vars(value).items())
        return made
    if kind is dict:
        return {name: _copied(item) for name, item in value.items()}
    return [_copied(item) for item in value] if kind is list else value

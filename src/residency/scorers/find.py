"""From what a config says to a scorer: a short name, a class path, or the scorer itself."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from functools import cache
from typing import Any

from residency.core.errors import UserError
from residency.scorers.base import Scorer

__all__ = ["find_scorer", "known_names", "scorer_classes", "scorers_by_name"]


@cache
def scorer_classes() -> dict[str, type[Scorer]]:
    """{class name: class} of every scorer in the files of this package: a new file is found by being there."""
    package = importlib.import_module("residency.scorers")
    found: dict[str, type[Scorer]] = {}
    for module in pkgutil.iter_modules(package.__path__, "residency.scorers."):
        for name, value in vars(importlib.import_module(module.name)).items():
            ours = inspect.isclass(value) and issubclass(value, Scorer) and value.__module__ == module.name
            if ours and not inspect.isabstract(value):
                found[name] = value
    return found


@cache
def known_names() -> Mapping[str, tuple[type[Scorer], Mapping[str, Any]]]:
    """{short name: (class, options)} of this package's scorers."""
    return {name: (kind, options) for kind in scorer_classes().values() for name, options in kind.names.items()}


def find_scorer(given: str | Scorer, *, where: str) -> Scorer:
    """One scorer.

    Args:
        given: A scorer, a short name (`nll`, `chrf`), or the path of a class that needs no options.
        where: The key, for messages.

    Raises:
        UserError: There is no such scorer; the nearest names are given.
    """
    if isinstance(given, Scorer):
        return given
    if given in known_names():
        kind, options = known_names()[given]
        return kind(**options)
    if "." in given:
        return _from_path(given, where)
    if given in scorer_classes():
        return _make(scorer_classes()[given], given, where)
    near = get_close_matches(given, known_names(), 3)
    raise UserError(
        f"{where} has {given!r}",
        why="there is no scorer of that name",
        fix=f"did you mean {' or '.join(near)}?"
        if near
        else f"choose from {', '.join(sorted(known_names()))}, or give the path of a class",
    )


def scorers_by_name(given: Iterable[str | Scorer], *, where: str) -> dict[str, Scorer]:
    """{name of the score: scorer} in the order given.

    Raises:
        UserError: An unknown scorer, or two that write the same score.
    """
    found: dict[str, Scorer] = {}
    for one in given:
        scorer = find_scorer(one, where=where)
        if scorer.name in found:
            raise UserError(
                f"{where} has two scorers named {scorer.name!r}",
                why="a score is stored under its name",
                fix="leave one of them out, or give it a `label` if its class has one",
            )
        found[scorer.name] = scorer
    return found


def _from_path(path: str, where: str) -> Scorer:
    module, _, name = path.rpartition(".")
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{where} has {path!r}",
            why=f"it cannot be imported: {error}",
            fix="give the full path of a class, package.module.Class, that this environment can import",
        ) from error
    return _make(kind, path, where)


def _make(kind: Any, path: str, where: str) -> Scorer:
    if not (inspect.isclass(kind) and issubclass(kind, Scorer)):
        raise UserError(f"{where} has {path!r}", why="it is no Scorer", fix="give a class that inherits from Scorer")
    try:
        return kind()
    except TypeError as error:
        raise UserError(
            f"{where} has {path!r}",
            why=f"the class needs options: {error}",
            fix=f"write {{class_path: {path}, init_args: {{...}}}} in the list",
        ) from error

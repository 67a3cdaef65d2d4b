"""Command lines that share their words, parsed once for every group of words instead of once for every line.

The cells of a study are combinations: a thousand of them are made from a few dozen groups of words. No key of a config
depends on a key of another group, so the section that a group decides is the same in every combination:

    section(group, words) = section(group, first words with only this group's words replaced)

What the parts say to each other (constructors) is checked for every combination: its objects are built anew.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import reduce
from typing import Any

from residency.core.errors import UserError
from residency.runs.cli import ResidencyCLI, parse

__all__ = ["Composer", "groups_of"]

Words = tuple[str, ...]

_SECTIONS = ("model", "data", "trainer", "evaluation", "wandb", "inspection", "axes")


class Composer:
    """Parses command lines of `residency fit`; what they share is parsed once.

    Args:
        fixed: Words that end every command line.
    """

    def __init__(self, *, fixed: Words = ()) -> None:
        self._fixed = fixed
        self._first: tuple[ResidencyCLI, Words, Mapping[str, Words]] | None = None
        self._sections: dict[tuple[str, Words], tuple[Any, Any]] = {}

    def parse(self, words: Words) -> ResidencyCLI:
        """The command line with its objects, as `parse` gives it.

        Args:
            words: Without the verb.

        Raises:
            UserError: What is wrong with it.
        """
        try:
            composed = self._compose(words)
        except UserError:
            composed = None  # parsed as a whole, so that the message names what this line says
        if composed is not None:
            return composed
        cli = parse(["fit", *words, *self._fixed])
        groups = groups_of(words)
        if self._first is None and groups is not None:
            self._first = (cli, words[:2], groups)
        return cli

    def _compose(self, words: Words) -> ResidencyCLI | None:
        """A copy of the first command line with the sections of this one; `None` where that is no way."""
        groups = groups_of(words)
        if self._first is None or groups is None or self._first[1] != words[:2]:
            return None
        cli, _, first = self._first
        changed = {
            name: groups.get(name, ()) for name in {**first, **groups} if groups.get(name, ()) != first.get(name, ())
        }
        return _replaced(cli, {name: self._section(name, part) for name, part in changed.items()})

    def _section(self, name: str, part: Words) -> tuple[Any, Any]:
        """What the words of one group make of its section: (parsed, plain)."""
        if (name, part) not in self._sections:
            assert self._first is not None
            _, base, groups = self._first
            rest = [word for other, others in groups.items() if other != name for word in others]
            cli = ResidencyCLI(["fit", *base, *rest, *part, *self._fixed], run=False, build=False)
            self._sections[name, part] = (cli.config[f"fit.{name}"], _at(cli.resolved, name.split(".")))
        return copy.deepcopy(self._sections[name, part])


def groups_of(words: Sequence[str]) -> dict[str, Words] | None:
    """{section: the words that decide it} of `--config FILE --KEY=VALUE ...`; `None` for any other form.

    Sections are the keys of two levels in `model`, `data`, `trainer` and their like, and all other keys.
    """
    groups: dict[str, Words] = {}
    if list(words[:1]) != ["--config"] or len(words) < 2:
        return None
    for word in words[2:]:
        option, equals, _ = word.partition("=")
        top, *below = option.removeprefix("--").removesuffix("+").split(".")
        if not (word.startswith("--") and equals) or top == "config" or (top in _SECTIONS) != bool(below):
            return None
        name = ".".join([top, *below[:1]])
        groups[name] = (*groups.get(name, ()), word)
    return groups


def _replaced(cli: ResidencyCLI, sections: Mapping[str, tuple[Any, Any]]) -> ResidencyCLI:
    """A command line with other values of some keys, and with objects of its own.

    Args:
        cli: Of `fit`.
        sections: {key: (value as parsed, value as `resolved` has it)}.

    Raises:
        UserError: A constructor refuses them.
    """
    made = copy.copy(cli)
    made.config, plain = cli.config.clone(), copy.deepcopy(cli.resolved)
    for key, (parsed, told) in sections.items():
        made.config[f"fit.{key}"] = parsed
        *path, last = key.split(".")
        _at(plain, path)[last] = told
    made.__dict__.pop("folder", None)
    made.__dict__["resolved"] = plain
    made.instantiate_classes()
    if not any(key.startswith("trainer") for key in sections):
        made.trainers = cli.trainers  # makes a new Trainer for every stage, from the same options
    return made


def _at(config: Mapping[str, Any], path: Sequence[str]) -> Any:
    return reduce(lambda found, part: found[part], path, config)

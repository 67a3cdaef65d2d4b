"""The action of a key: found as jsonargparse finds it, for every key of every parser."""

from __future__ import annotations

from typing import Any

import pytest
from jsonargparse import ArgumentParser, _actions, _core, _subcommands

from residency.runs.cli import ResidencyCLI, parse
from residency.runs.config import jsonargparse_patch


@pytest.fixture(scope="module")
def parser() -> Any:
    """Of `residency fit`, whose keys are the most."""
    found: list[Any] = []
    original = ResidencyCLI.parse_arguments

    def kept(self: Any, parser: Any, args: Any) -> None:
        found.append(parser)
        original(self, parser, args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ResidencyCLI, "parse_arguments", kept)
        parse(["fit", "--config", "quickstart", "--store=null"])
    return found[0]


def test_it_is_the_one_that_a_search_finds(parser: Any) -> None:
    search = _core.find_action_and_subcommand.args[0]  # type: ignore[attr-defined]
    (subcommands,) = (a for a in parser._actions if isinstance(a, _subcommands.ActionSubCommands))
    fit = subcommands._name_parser_map["fit"]
    keys = {name.lstrip("-") for action in fit._actions for name in (action.dest, *action.option_strings)}
    assert len(keys) > 100
    excludes = (None, _actions._ActionConfigLoad, (_actions._ActionConfigLoad, _actions.ActionFail))
    for exclude in excludes:
        for key in [*keys, "no.such.key", "model.adapter.nothing"]:
            assert jsonargparse_patch._find(search, fit, key, exclude) == search(fit, key, exclude), key
            assert jsonargparse_patch._find(search, parser, f"fit.{key}", exclude) == search(
                parser, f"fit.{key}", exclude
            )


def test_an_action_that_came_later_is_found() -> None:
    search = _core.find_action_and_subcommand.args[0]  # type: ignore[attr-defined]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--first")
    assert jsonargparse_patch._find(search, parser, "second") == (None, None)
    second = parser.add_argument("--second")
    assert jsonargparse_patch._find(search, parser, "second") == (second, None)
    _actions.remove_actions(parser, type(second))
    assert jsonargparse_patch._find(search, parser, "second") == (None, None)

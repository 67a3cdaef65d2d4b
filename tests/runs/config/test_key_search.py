"""What is faster than jsonargparse's own functions gives what they give, for every key of every parser."""

from __future__ import annotations

import ast
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import ArgumentParser, Namespace, _actions, _core, _namespace, _subcommands

from residency.runs.cli import ResidencyCLI, parse
from residency.runs.config import jsonargparse_speed


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
            assert jsonargparse_speed._find(search, fit, key, exclude) == search(fit, key, exclude), key
            assert jsonargparse_speed._find(search, parser, f"fit.{key}", exclude) == search(
                parser, f"fit.{key}", exclude
            )


def test_an_action_that_came_later_is_found() -> None:
    search = _core.find_action_and_subcommand.args[0]  # type: ignore[attr-defined]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--first")
    assert jsonargparse_speed._find(search, parser, "second") == (None, None)
    second = parser.add_argument("--second")
    assert jsonargparse_speed._find(search, parser, "second") == (second, None)
    _actions.remove_actions(parser, type(second))
    assert jsonargparse_speed._find(search, parser, "second") == (None, None)


KEYS = [
    "a",
    "a.b",
    "a.b.c",
    "a.list",
    "a.list.x",
    "none",
    "none.x",
    "clone",
    "keys.items",
    "no",
    "no.such",
    "a.no.b",
    "plain.k",
]


@pytest.fixture
def nested() -> Namespace:
    found = Namespace({"a": Namespace({"b": Namespace(c=1), "list": [Namespace(x=[2]), 3]}), "none": None, "clone": 4})
    found["keys.items"] = {"a": Namespace(b=5), "__path__": 6}
    found["plain"] = {"k": 7}
    found["__path__"] = "file"
    return found


@pytest.mark.parametrize("key", [*KEYS, "", ".", "a.", ".a", "a..b", "a b", 3, None])
def test_a_key_leads_where_it_led(nested: Namespace, key: Any) -> None:
    original = Namespace._parse_key.__closure__[0].cell_contents  # type: ignore[attr-defined]
    assert original.__module__ == "jsonargparse._namespace"
    try:
        leaf, holder, parent = original(nested, key)
    except KeyError as error:
        with pytest.raises(type(error), match=re.escape(str(error))):
            nested._parse_key(key)
    else:
        found = nested._parse_key(key)
        assert (found[0], found[2]) == (leaf, parent)
        assert found[1] is holder


@pytest.mark.parametrize("skip", [None, {"__path__"}])
def test_a_copy_is_equal_and_shares_no_branch(nested: Namespace, skip: set[str] | None) -> None:
    copied = jsonargparse_speed._copied(nested, skip)
    assert copied == _namespace_original()(nested, skip)
    assert list(vars(copied)) == [key for key in vars(nested) if not skip or key not in skip]
    copied["a.b.c"], copied["a"].list[0]["x"], copied["keys.items"]["new"] = 8, 9, 10
    assert (nested["a.b.c"], nested["a"].list[0].x, "new" in nested["keys.items"]) == (1, [2], False)
    ordered = OrderedDict(a=1)
    assert jsonargparse_speed._copied(ordered) is ordered


def _namespace_original() -> Any:
    """jsonargparse's own function, from its source: the module has the other one."""
    source = Path(_namespace.__file__).read_text(encoding="utf-8")
    names: dict[str, Any] = {**vars(_namespace)}
    (function,) = (
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.FunctionDef) and node.name == "recreate_branches"
    )
    exec(compile(ast.Module([function], []), _namespace.__file__, "exec"), names)
    return names["recreate_branches"]

"""What is kept and left out while a command line is parsed changes neither what it means nor what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from jsonargparse import Namespace

from residency.core.errors import UserError
from residency.runs import cli
from residency.runs.config import parse_once
from residency.runs.config.parse_once import one_parse
from support.cli import call

PARTS = "support.components"
LINES = {
    "the quickstart": "",
    "parts in parts": "--model.adapter=per_domain --model.mitigations.a=ewc --model.mitigations.b=generative_replay",
    "an argument of an argument": "--model.adapter.config.r=3 --model.adapter.config.lora_dropout=0.5",
    "a class that takes another's place": f"--model.adapter={PARTS}.FirstAdapter --model.adapter.strength=7 "
    f"--model.adapter={PARTS}.SecondAdapter",
    "lists and files": "--config stream/controlled.yaml --data.order=[code,legal,medical] --data.scorers.x=bleu",
    "no number": "--data.batch_size=many",
    "no such argument": "--model.adapter.config.rank=3",
    "no such argument of a part within": "--model.mitigations.a=ewc --model.mitigations.a.strenght=2",
    "no such key": "--model.adaptr=lora",
    "no such class": "--model.adapter=residency.adapters.Nothing",
    "of another type": "--model.adapter=residency.mitigations.EWC",
    "a wrong value deep inside": "--model.adapter.config.r=few --model.mitigations.a=replay",
}


def _parsed(line: str) -> Any:
    try:
        made = cli.ResidencyCLI(["fit", "--config", "quickstart", *line.split()], run=False, build=False)
    except UserError as refusal:
        return str(refusal)
    return made.config, made.resolved


@contextmanager
def _as_jsonargparse_does(parser: Any) -> Iterator[None]:
    yield


@pytest.mark.parametrize("line", LINES.values(), ids=LINES)
def test_a_command_line_means_what_jsonargparse_makes_of_it(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = _parsed(line)
    monkeypatch.setattr(cli, "one_parse", _as_jsonargparse_does)
    assert found == _parsed(line)


def test_a_parser_that_has_refused_or_printed_parses_as_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "_made", {})
    first = _parsed("")
    kept = cli._made["fit"]["parser"]
    assert call("fit", "--config", "quickstart", "--print_config", "--data.batch_size=many").code == 2
    assert call("fit", "--config", "quickstart", "--print_config").out
    assert call("fit", "--help").out
    assert _parsed("--data.batch_size=3") != first
    assert _parsed("") == first
    assert cli._made["fit"]["parser"] is kept


def test_a_version_that_is_not_known_parses_as_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert version("jsonargparse").startswith(parse_once.KNOWN), "read the new version, then name it"
    line = LINES["parts in parts"]
    found = _parsed(line)
    monkeypatch.setattr(parse_once, "_CONTEXT", ())
    with one_parse(Namespace()):
        assert not parse_once.in_one_parse()
    assert _parsed(line) == found


def test_what_is_kept_is_a_copy_and_ends_with_the_command_line() -> None:
    calls: list[Any] = []

    def parse(value: Namespace, defaults: bool) -> Namespace:
        calls.append(value)
        return Namespace(inner=Namespace(parts=[value.number, {"defaults": defaults}]))

    def parsed(number: object, *, defaults: bool = True) -> Namespace:
        found: Namespace = parse_once.kept_or_parsed(parse, parsed, Namespace(number=number), defaults=defaults)
        return found

    with one_parse(Namespace()):
        first = parsed(1)
        first.inner.parts[1]["defaults"] = first.inner.parts[0] = "changed"
        assert parsed(1) == Namespace(inner=Namespace(parts=[1, {"defaults": True}]))
        assert len(calls) == 1
        # Equal for Python, and no equal values of a config.
        for other in (True, 1.0, "1", None, [1], (1,), Path("1")):
            parsed(other)
        parsed(1, defaults=False)
        assert len(calls) == 9
    with one_parse(Namespace()):
        parsed(1)
    parsed(1)
    assert len(calls) == 11

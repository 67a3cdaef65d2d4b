"""Composed command lines equal parsed ones: config, key order, objects, refusals; and share the parsing."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.runs.cli import ResidencyCLI, parse
from residency.runs.compose import Composer, groups_of
from support.cli import tiny_config, write_yaml

ADAPTERS: list[tuple[str, ...]] = [
    ("--model.adapter=lora",),
    ("--model.adapter=dora", "--model.adapter.r=4"),
    ("--model.adapter=full",),
    ("--model.adapter=galore",),
    ("--model.adapter=boft",),
]
MITIGATIONS: list[tuple[str, ...]] = [
    (),
    ("--model.mitigations.ewc=ewc", "--model.mitigations.ewc.strength=7.0"),
    ("--model.mitigations.ewc=ewc", "--model.mitigations.ewc.mode=online"),
    ("--model.mitigations.replay=replay", "--model.mitigations.mixing=weight_mixing"),
    ('--model.mitigations={"si": {"class_path": "residency.mitigations.SI"}}',),
    ("--model.mitigations=null",),
]
OTHERS: list[tuple[str, ...]] = [
    (),
    ('--data.order=["b", "a"]',),
    ("--trainer.max_steps=3", "--model.objective=dft"),
    ("--frozen=True", "--evaluation.generation_rows=1", "--data.batch_size=2"),
]


@pytest.fixture(scope="module")
def base(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("composed")
    return str(write_yaml(folder / "base.yaml", tiny_config(folder / "data", llama)))


@pytest.fixture
def parses(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, ...]]:
    """Command lines that jsonargparse has read."""
    seen: list[tuple[str, ...]] = []
    original = ResidencyCLI.parse_arguments

    def counted(self: ResidencyCLI, parser: object, args: list[str]) -> None:
        seen.append(tuple(args))
        original(self, parser, args)  # type: ignore[arg-type]

    monkeypatch.setattr(ResidencyCLI, "parse_arguments", counted)
    return seen


def _words(base: str, *groups: tuple[str, ...]) -> tuple[str, ...]:
    return ("--config", base, *(word for group in groups for word in group))


def _outcome(made: Callable[[], ResidencyCLI]) -> ResidencyCLI | str:
    """The command line, or what it is refused with."""
    try:
        return made()
    except UserError as error:
        return str(error)


@pytest.mark.slow
def test_every_combination_equals_the_line_parsed_as_a_whole(base: str, parses: list[tuple[str, ...]]) -> None:
    composer = Composer(fixed=("--store=s",))
    lines = [_words(base, *groups) for groups in itertools.product(ADAPTERS, MITIGATIONS, OTHERS)]
    composed = {words: _outcome(partial(composer.parse, words)) for words in lines}
    refused = sum(isinstance(made, str) for made in composed.values())
    assert 0 < refused < len(lines) / 4, "BOFT's states cannot be averaged"
    # One per group of words that differs from the first line's (the last line of OTHERS has three groups), and the
    # lines that are refused as a whole.
    groups = sum(map(len, (ADAPTERS, MITIGATIONS, OTHERS))) + 3
    assert len(parses) - refused <= groups < len(lines) / 4
    # Every value of every group several times; all lines would take most of a minute.
    for words in lines[:: len(OTHERS) + 1]:
        whole, made = _outcome(partial(parse, ["fit", *words, "--store=s"])), composed[words]
        if isinstance(whole, str) or isinstance(made, str):
            assert whole == made
            continue
        assert json.dumps(made.resolved) == json.dumps(whole.resolved)
        assert made.settings == whole.settings
        assert type(made.model.adapter) is type(whole.model.adapter)
        assert [*made.model.mitigations] == [*whole.model.mitigations]
        assert made.datamodule.order == whole.datamodule.order
        assert made.trainers.root_device == whole.trainers.root_device


def test_objects_are_not_shared(base: str) -> None:
    composer = Composer()
    one, two, again = (
        composer.parse(_words(base, ("--model.mitigations.ewc=ewc", f"--model.mitigations.ewc.strength={value}")))
        for value in (1.0, 2.0, 1.0)
    )
    strengths = [cli.model.mitigations["ewc"].strength for cli in (one, two, again)]  # type: ignore[attr-defined]
    assert strengths == [1.0, 2.0, 1.0]
    assert one.model.mitigations["ewc"] is not again.model.mitigations["ewc"]
    assert one.datamodule is not two.datamodule


@pytest.mark.parametrize(
    "wrong",
    [
        "--model.mitigations.ewc.strenght=1.0",
        "--model.mitigations.ewc.strength=much",
        "--model.mitigations.ewc.strength=-1.0",
        '--data.order=["a", "nowhere"]',
        "--model.adapter=loar",
        "--no.such.key=1",
    ],
)
def test_what_is_refused_is_told_as_for_the_whole_line(base: str, wrong: str) -> None:
    composer = Composer()
    good = _words(base, ("--model.mitigations.ewc=ewc",))
    composer.parse(good)
    with pytest.raises(UserError) as composed:
        composer.parse((*good, wrong))
    with pytest.raises(UserError) as whole:
        parse(["fit", *good, wrong])
    assert str(composed.value) == str(whole.value)


def test_a_line_of_another_form_is_parsed_as_a_whole(base: str) -> None:
    assert groups_of(["--config", base, "--config", base]) is None
    assert groups_of(["--config", base, "--model=m.yaml"]) is None
    assert groups_of(["--config", base, "--frozen", "true"]) is None
    assert groups_of(["--config", base, "--data.domains.a.scorers+=f1", "--name=x"]) == {
        "data.domains": ("--data.domains.a.scorers+=f1",),
        "name": ("--name=x",),
    }
    composer = Composer()
    composer.parse(("--config", base))
    assert composer.parse(("--config", base, "--config", base, "--name=x")).resolved["name"] == "x"

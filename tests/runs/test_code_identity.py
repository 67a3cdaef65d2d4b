"""Keys by meaning: a changed line of code changes a key wherever it lies, and nothing else does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import count
from pathlib import Path
from types import FrameType

import pytest

from residency.runs import code_identity
from residency.runs.cli import parse
from residency.runs.code_identity import class_code, closure, core_modules
from residency.runs.stream import open_stage_cache
from support.cli import tiny_config, write_yaml

PLUG_IN = """
from residency.mitigations import Mitigation
from {package}.utils.maths import halve


class Method(Mitigation):
    '''A plug-in.'''

    def transform_update(self, module, before, after):
        return {{name: halve(after[name]) for name in after}}
"""
MATHS = "from ..scale import SCALE\n\n\ndef halve(value):\n    return value * SCALE\n"
LAZY = MATHS.replace("    return", "    from {package}.more import late\n\n    late()\n    return")
SCALE = "SCALE = 0.5\n"
NUMBERS = count()
EWC = {"class_path": "residency.mitigations.EWC", "init_args": {"strength": 10.0}}

Code = Callable[[Mapping[str, str]], str]


def filled(text: str, package: str) -> str:
    return text.replace("{package}", package).replace("{{", "{").replace("}}", "}")


@pytest.fixture
def code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Code:
    """A function: changed files of the plug-in's package (path -> text; empty = removed) -> the key of its class.

    Every call makes a package of its own, so that nothing is read from a cache.
    """
    monkeypatch.syspath_prepend(str(tmp_path))

    def key(changed: Mapping[str, str], *, method: str = "methods/m.py") -> str:
        package = f"mylab{next(NUMBERS)}"
        files = {method: PLUG_IN, "utils/maths.py": MATHS, "scale.py": SCALE, **changed}
        for name in ("", "methods", "utils"):
            (tmp_path / package / name).mkdir(exist_ok=True)
            (tmp_path / package / name / "__init__.py").touch()
        for name, text in files.items():
            if text:
                (tmp_path / package / name).parent.mkdir(exist_ok=True)
                (tmp_path / package / name).write_text(
                    text.replace("{package}", package).replace("{{", "{").replace("}}", "}")
                )
        module = ".".join([package, *Path(method).with_suffix("").parts])
        return class_code(import_module(module).Method)

    return key  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("utils/maths.py", MATHS.replace("* SCALE", "/ SCALE")),
        ("scale.py", "SCALE = 0.25\n"),
        ("methods/m.py", PLUG_IN.replace("halve(after[name])", "after[name]")),
        ("methods/m.py", PLUG_IN.replace("in after", "in before")),
        # Far away, and loaded only when it is called.
        (
            "utils/maths.py",
            LAZY,
        ),
    ],
    ids=["helper", "constant", "class", "other dictionary", "lazy import"],
)
def test_a_changed_line_anywhere_behind_a_plug_in_changes_its_key(file: str, text: str, code: Code) -> None:
    extra = {"more.py": "def late():\n    pass\n"}
    assert code({**extra, file: text}) != code(extra)


def test_what_a_lazy_import_brings_is_part_of_the_key(code: Code) -> None:
    lazy = {"utils/maths.py": LAZY}
    assert code({**lazy, "more.py": "def late():\n    return 1\n"}) != code(
        {**lazy, "more.py": "def late():\n    pass\n"}
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"methods/m.py": PLUG_IN.replace("A plug-in.", "Another text.")},
        {"utils/maths.py": '"""Maths."""\n\n# Why.\n' + MATHS.replace("):", "):\n    '''Half of it.'''")},
        {"utils/maths.py": MATHS.replace("(value)", "(value: float) -> float")},
        {"utils/other.py": "UNUSED = 1\n"},
        {"utils/__init__.py": "from .maths import halve\n\n__all__ = ['halve']\n"},
    ],
    ids=["docstring", "comment", "annotation", "unused file", "export list"],
)
def test_what_computes_the_same_has_the_same_key(changed: Mapping[str, str], code: Code) -> None:
    assert code(changed) == code({})


def test_moved_files_have_the_same_key(code: Code) -> None:
    plain = code({})
    moved = {"methods/m.py": PLUG_IN.replace("utils.maths", "numbers.algebra"), "utils/maths.py": ""}
    assert code({**moved, "numbers/algebra.py": MATHS}) == plain
    assert code({}, method="tricks/m.py") == plain  # type: ignore[call-arg]


def test_two_functions_of_one_name_are_told_apart(code: Code) -> None:
    both = {"utils/more.py": MATHS.replace("* SCALE", "- SCALE"), "scale.py": SCALE}
    both["methods/m.py"] = PLUG_IN + "\n\nfrom {package}.utils import more\n"
    swapped = {**both, "methods/m.py": both["methods/m.py"].replace("utils.maths", "utils.more")}
    swapped["methods/m.py"] = swapped["methods/m.py"].replace("import more", "import maths")
    assert code(both) != code(swapped)


def test_helpers_beside_a_single_file_are_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    text = PLUG_IN.replace("{package}.utils.maths", "helpers{n}").replace("{{", "{").replace("}}", "}")
    for n, body in ((1, "value / 2"), (2, "value / 2"), (3, "value / 3")):
        (tmp_path / f"helpers{n}.py").write_text(f"def halve(value):\n    return {body}\n")
        (tmp_path / f"single{n}.py").write_text(text.replace("{n}", str(n)))
    one, same, other = (class_code(import_module(f"single{n}").Method) for n in (1, 2, 3))
    assert one == same != other


def test_a_class_from_nowhere_is_known_by_its_source() -> None:
    made = type("Made", (), {"__module__": "__console__"})
    assert class_code(made) != class_code(type("Other", (), {"__module__": "__console__"}))


def test_the_core_holds_every_module_that_decides_a_state_or_a_score(llama: Path, tmp_path: Path) -> None:
    """What training, restoring and scoring really execute, beside what the classes of the run answer for."""
    executed: set[str] = set()

    def watch(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            executed.add(str(frame.f_globals.get("__name__")))

    config = write_yaml(tmp_path / "base.yaml", tiny_config(tmp_path / "data", llama))
    words = [f"--store={tmp_path / 'store'}", f"--model.mitigations.ewc={json.dumps(EWC)}"]
    cli = parse(["fit", "--config", str(config), *words])
    stages = open_stage_cache(
        module=cli.model, data=cli.datamodule, trainers=cli.trainers, settings=cli.settings, config=cli.resolved
    )
    sys.setprofile(watch)
    try:
        for k in range(3):
            stages.scores(k)
    finally:
        sys.setprofile(None)
    module = cli.model
    parts = [module.backbone, module.adapter, module.objective, *module.mitigations.values()]
    parts += cli.datamodule.domains.values()
    parts += [scorer for domain in cli.datamodule.domains.values() for scorer in domain.scorers.values()]
    answered = closure([type(part).__module__ for part in parts], followed=frozenset({"residency"}))
    # What watches, and what makes the objects of a config, which itself is part of every key.
    watching = (
        "residency.runs.views",
        "residency.inspection",
        "residency.runs.code_identity",
        "residency.runs.source_modules",
        "residency.runs.cli",
    )
    watching += ("residency.runs.config.instantiate", "residency.core.errors")
    unknown = {m for m in executed if m.startswith("residency.") and not m.startswith(watching)}
    assert unknown - answered - core_modules() == set()
    assert {m for m in executed if m.startswith("residency")} & core_modules(), "nothing was seen"


def test_the_core_holds_no_plug_in() -> None:
    core = core_modules()
    assert not [name for name in core if name.endswith((".ewc", ".peft", ".console", ".causal_lm"))]
    assert code_identity.core_code() == code_identity.code_digest(core)

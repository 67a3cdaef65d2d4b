"""Every packaged reader's parser on an input small enough to read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from residency.domains.packaged import attack, cdm, chitchat, hpo, icd10, licences, stdlib_code, us_gaap
from residency.domains.packaged._text import name_words


def test_icd10(tmp_path: Path) -> None:
    path = tmp_path / "icd.xml"
    path.write_text(
        "<r><chapter><name>1</name><desc>Certain (rare) infections (A00-B99)</desc><section>"
        "<diag><name>A00</name><desc>Cholera</desc><diag><name>A00.0</name><desc>Classical\n cholera</desc></diag>"
        "<diag><name>A00.11</name><desc>Longer code</desc></diag></diag></section></chapter></r>"
    )
    rows = list(icd10._rows(path))
    assert [(r.id, r.prompt, r.group) for r in rows] == [
        ("A00", "Cholera", "A00"),
        ("A00.0", "Classical cholera", "A00"),
    ]
    assert {r.completion for r in rows} == {"Certain (rare) infections"}


def test_hpo(tmp_path: Path) -> None:
    path = tmp_path / "hp.obo"
    path.write_text(
        'format-version: 1.2\n\n[Term]\nid: HP:1\nname: Big heart\ndef: "A \\"big\\"\\nheart." [x:y "z"]\n\n'
        "[Term]\nid: HP:2\nname: No definition\n\n"
        '[Term]\nid: HP:3\nname: obsolete Old\ndef: "Old." []\nis_obsolete: true\n'
    )
    (only,) = hpo._rows(path)
    assert (only.id, only.prompt, only.completion, only.group) == ("HP:1", 'A "big" heart.', "Big heart", "HP:1")


@pytest.mark.parametrize(("line", "count"), [("x: y", 1), ("language: de", 0), ("is_deprecated: yes", 0)])
def test_licences(tmp_path: Path, line: str, count: int) -> None:
    path = tmp_path / "mit.LICENSE"
    path.write_text(
        f"---\nkey: mit\ncategory: Permissive\n{line}\n---\n\nToo short.\n \n{'word ' * 25}\n\n{'long ' * 91}"
    )
    rows = list(licences._rows(path))
    assert [(r.id, r.completion, r.group, len(r.prompt.split())) for r in rows] == [
        ("mit:1", "Permissive", "mit", 25)
    ] * count
    path.write_text("no header")
    assert not list(licences._rows(path))


def test_stdlib_code(tmp_path: Path) -> None:
    path = tmp_path / "pkg" / "module.py"
    path.parent.mkdir()
    path.write_text(
        "class A:\n    def f(self, *, x: int = 1) -> str:\n"
        "        '''One two three\n        four.\n\n        More.'''\n"
        "        def g():\n            'Inside of another function too.'\n"
        "    def __len__(self):\n        'A special name is left out.'\n"
        "try:\n    pass\nexcept E:\n    async def h(): 'Words that wait for something \\d'\n"
    )
    rows = list(stdlib_code._rows(path, tmp_path))
    assert [(r.id, r.prompt, r.completion) for r in rows] == [
        ("pkg/module.py:2", "One two three four.", "def f(self, *, x: int=1):"),
        ("pkg/module.py:7", "Inside of another function too.", "def g():"),
        ("pkg/module.py:14", "Words that wait for something \\d", "async def h():"),
    ]
    assert {r.group for r in rows} == {"pkg/module.py"}
    path.write_text("def broken(:")
    assert not list(stdlib_code._rows(path, tmp_path))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "left_out.py").touch()
    assert list(stdlib_code._sources(tmp_path)) == [path]


def test_cdm(tmp_path: Path) -> None:
    path = tmp_path / "base" / "Trade.py"
    path.parent.mkdir()
    path.write_text(
        'class TradeDate(Base):\n    """\n    The date on which it [was](x) traded.\n    """\n'
        '    tradeId: str = Field(1)\n    """\n    A number that names the trade.\n    """\n'
        '    BY_HAND = "ByHand"\n    """Entered by some person, not electronically."""\n'
        '    short: int\n    """Too short."""\n    other: int\n'
    )
    rows = list(cdm._rows(path, tmp_path))
    assert [(r.id, r.prompt, r.completion) for r in rows] == [
        ("base/Trade.py:1", "The date on which it was traded.", "trade date"),
        ("base/Trade.py:5", "A number that names the trade.", "trade id"),
        ("base/Trade.py:9", "Entered by some person, not electronically.", "by hand"),
    ]
    assert all(r.group == r.completion for r in rows)


def test_us_gaap(tmp_path: Path) -> None:
    path = tmp_path / "gaap.json"
    concepts = {
        "_metadata": {"version": "3"},
        "CashFDICInsuredAmount": {"statement": "BalanceSheet", "section": "Current Assets"},
        "Unknown": {"statement": "BalanceSheet", "section": None},
    }
    path.write_text(json.dumps(concepts))
    (only,) = us_gaap._rows(path)
    assert (only.prompt, only.completion) == ("cash fdic insured amount", "balance sheet: current assets")


def test_attack(tmp_path: Path) -> None:
    def technique(number: int, **more: Any) -> dict[str, Any]:
        base = {"stix_id": f"t{number}", "external_id": f"T{number}.001", "tactics": ["lateral-movement"]}
        return base | {"revoked": False, "deprecated": False} | more

    def relation(
        number: int, target: str, text: str = "[X](y) moved through <code>net</code> to more (Citation: Z)."
    ) -> Any:
        return {"stix_id": f"r{number}", "target_ref": target, "relationship_type": "uses", "description": text}

    techniques = [technique(1), technique(2, tactics=["a", "b"]), technique(3, revoked=True)]
    relations = [relation(n, f"t{n}") for n in (1, 2, 3)]
    relations += [
        relation(4, "t1", "too short"),
        relation(5, "t1", "this one was cut by the package..."),
        relation(6, "m"),
    ]
    relations += [relation(7, "t1") | {"relationship_type": "mitigates"}, relation(8, "t1") | {"description": None}]
    (tmp_path / "attack-patterns-lookup-v18.1.json").write_text(json.dumps({"attack_patterns": techniques}))
    (tmp_path / "relationships-lookup-v18.1.json").write_text(json.dumps({"_metadata": {}, "relationships": relations}))
    (only,) = attack._rows(tmp_path)
    assert (only.id, only.prompt) == ("r1", "X moved through net to more .")
    assert (only.completion, only.group) == ("lateral movement", "T1")


def test_chitchat(tmp_path: Path) -> None:
    def turn(*texts: str) -> list[dict[str, str]]:
        return [{"text": text} for text in texts]

    path = tmp_path / "dataset.json"
    messages = [turn("Hi there!", " How are\nyou?"), turn("Quite well"), turn("ok"), turn("So long")]
    path.write_text(json.dumps({"c1": {"messages": messages}}))
    (only,) = chitchat._rows(path)
    assert (only.id, only.prompt, only.completion) == ("c1:0", "Hi there! How are you?", "Quite well")
    assert only.group == "c1"


def test_names_become_words() -> None:
    assert {name_words(name) for name in ("exerciseNotice", "ExerciseNotice", "_EXERCISE_NOTICE")} == {
        "exercise notice"
    }

"""Orders, exclusions, budgets: which cells a study has."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.core.errors import UserError
from residency.runs.config.sources import written
from residency.runs.file_stamps import file_stamps
from residency.runs.keys import digest
from residency.study import Study, load_study, plan_cells
from residency.study.planning.cells import latin_square
from residency.study.planning.prepare import _said, _told

NAMES = ("a", "b", "c", "d")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a base config."""
    (tmp_path / "base.yaml").write_text("name: base\n")
    return tmp_path


def load(folder: Path, **content: Any) -> Study:
    """A study from a file with these keys."""
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump({"name": "s", "base": "base.yaml", **content}, sort_keys=False))
    return load_study(path)


def orders(study: Study) -> list[str]:
    """The order of every cell."""
    return [cell.axes["order"] for cell in plan_cells(study, domains=NAMES)]


@pytest.mark.parametrize("n", range(1, 8))
def test_a_latin_square_has_every_name_once_at_every_place(n: int) -> None:
    names = "abcdefg"[:n]
    square = list(latin_square(names))
    assert "".join(square[0]) == names, "the given order comes first"
    assert len(square) == n
    for rows in (square, zip(*square, strict=True)):
        assert all(sorted(row) == sorted(names) for row in rows)


@pytest.mark.parametrize("n", [2, 4, 6])
def test_for_even_numbers_every_name_follows_every_other_once(n: int) -> None:
    pairs = [pair for row in latin_square("abcdef"[:n]) for pair in itertools.pairwise(row)]
    assert sorted(pairs) == sorted(itertools.permutations("abcdef"[:n], 2))


def test_orders_are_an_axis(folder: Path) -> None:
    assert orders(load(folder, orders="latin")) == [">".join(order) for order in latin_square(NAMES)]
    assert len({*orders(load(folder, orders="all"))}) == 24
    assert orders(load(folder, orders=[["b", "a"], ["a", "b"]])) == ["b>a", "a>b"]
    assert "order" not in plan_cells(load(folder))[0].axes
    cell = plan_cells(load(folder, orders=[["b", "a"]]))[0]
    assert cell.id == "b_a-s0"
    assert '--data.order=["b", "a"]' in cell.words


def test_random_orders_are_different_and_always_the_same(folder: Path) -> None:
    found = orders(load(folder, orders=23))
    assert found[0] == ">".join(NAMES), "the given order is one of them"
    assert len({*found}) == 23
    assert orders(load(folder, orders=5)) == found[:5]
    assert orders(load(folder, orders=5, seeds=[7])) == found[:5], "orders are crossed with seeds, not drawn from them"
    with pytest.raises(UserError, match="24 orders"):
        orders(load(folder, orders=25))


def test_long_orders_have_short_names(folder: Path) -> None:
    long = [f"{letter * 30}" for letter in "abc"]
    assert [c.id for c in plan_cells(load(folder, orders="latin"), domains=long)] == [
        f"order_{n}-s0" for n in (1, 2, 3)
    ]


AXES = {"x": {"a": {}, "b": {}, "c": {}}, "y": {"p": {}, "q": {}}}


def test_excluded_combinations(folder: Path) -> None:
    study = load(folder, axes=AXES, exclude=[{"x": "a", "y": "p"}, {"x": ["b", "c"], "y": "q"}])
    assert [(c.axes["x"], c.axes["y"]) for c in plan_cells(study)] == [("a", "q"), ("b", "p"), ("c", "p")]
    assert len(plan_cells(load(folder, axes=AXES, exclude=[{"x": "a"}]))) == 4


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ({"axes": AXES, "exclude": [{"x": "d"}]}, ("exclude has x: d", "a, b, c")),
        ({"axes": AXES, "exclude": [{"z": "a"}]}, ("exclude has z: a", "the axes are x, y")),
        ({"axes": AXES, "exclude": [{"x": ["a", "b", "c"]}]}, ("every combination is excluded",)),
        ({"orders": 0}, ("orders is 0",)),
        ({"orders": "some"}, ("orders", "latin")),
        ({"references": ["magic"]}, ("references", "joint")),
        ({"budget": {"steps": 3, "tokens": 4}}, ("budget", "steps or in tokens")),
        ({"budget": {}}, ("budget",)),
        ({"budget": {"steps": 0}}, ("budget",)),
        ({"per_domain": "nope.yaml"}, ("per_domain: nope.yaml", "no file")),
    ],
)
def test_mistakes(content: dict[str, Any], parts: tuple[str, ...], folder: Path) -> None:
    with pytest.raises(UserError) as caught:
        plan_cells(load(folder, **content), domains=NAMES)
    for part in parts:
        assert part in str(caught.value)


def test_a_budget_counts_more_than_an_axis(folder: Path) -> None:
    axes = {"x": {"long": {"trainer.max_steps": 99}}}
    words = plan_cells(load(folder, axes=axes, budget={"steps": 7}))[0].words
    assert words.index("--trainer.max_steps=7") > words.index("--trainer.max_steps=99")
    assert "--stage_tokens=500" in plan_cells(load(folder, axes=axes, budget={"tokens": 500}))[0].words


def test_components_are_written_as_they_stand(folder: Path) -> None:
    part = {"class_path": "residency.mitigations.EWC", "init_args": {"strength": 1.0}}
    words = plan_cells(load(folder, axes={"x": {"ewc": {"model.mitigations.ewc": part}}}))[0].words
    assert words[2].startswith('--model.mitigations.ewc={"class_path": "residency.mitigations.EWC"')


def test_what_a_cell_says_is_read_once_and_digested_as_before(folder: Path) -> None:
    """plan.json's `written`: the digest of every key of a cell and of its files, what counts most first."""
    (folder / "base.yaml").write_text("model: {adapter: lora}\ntrainer: {max_steps: 3}\n")
    study = load(folder, axes={"m": {"x": {"model.mitigations.ewc": "ewc"}, "none": {}}}, seeds=[0, 1])
    for cell in plan_cells(study):
        entries = written(cell.words)
        stamps = file_stamps(entry.value for entry in entries)
        assert _said(cell, _told) == digest([[entry.key, entry.value] for entry in entries], stamps)

"""Train unmerged, serve merged: training never sees what is scored, and all that is served shares one training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Full
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.core.types import Tensors
from residency.mitigations import EWC, Mitigation, Soup, TaskArithmetic, WeightMixing, WiseFT
from residency.mitigations.contract import StageModule
from residency.testing.tiny_runs import train
from support.stop_and_resume import goes_on_exactly
from support.two_stages import ADAPTERS, equal

STAGES = ("1-a", "2-b", "3-c")


def states(folder: Path) -> list[dict[str, Any]]:
    return [load_tree(folder / "stages" / stage / "state.safetensors") for stage in STAGES]


def run(folder: Path, llama: Path, parts: Mapping[str, Mitigation], adapter: Any = Full) -> list[dict[str, Any]]:
    record, module = train(folder / "run", llama, adapter(), parts, steps=2)
    found = states(folder / "run")
    found[-1]["module"] = module
    found[0]["rows"] = record["scores"]["nll"]["R"]
    return found


def close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> bool:
    return all(torch.allclose(one[name], other[name], rtol=1e-5, atol=1e-6) for name in one)


@pytest.fixture(scope="module")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run(tmp_path_factory.mktemp("plain"), llama, {})


def test_alpha_does_not_compound(plain: list[dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    """(1 - α) θ_0 + α θ_t of the θ_t that plain training has after every stage; scores are those of the mixture."""
    found = run(tmp_path, llama, {"w": WiseFT(alpha=0.5)})
    base = dict(found[-1]["module"].backbone.load().named_parameters())
    for mine, other in zip(found, plain, strict=True):
        assert equal(mine["weights"], other["weights"])
        assert close(mine["served"], {name: torch.lerp(base[name], t, 0.5) for name, t in other["weights"].items()})
    assert found[0]["rows"][0] == plain[0]["rows"][0]
    assert all(mine != other for mine, other in zip(found[0]["rows"][1:], plain[0]["rows"][1:], strict=True))


def test_into_train_goes_on_from_the_mixture(plain: list[dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    found = run(tmp_path, llama, {"w": WiseFT(alpha=0.5, into="train")})
    assert "served" not in found[0]
    assert not equal(found[0]["weights"], plain[0]["weights"])


def test_a_soup_of_unmerged_stages(plain: list[dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    """Every stage serves the mean of what plain training left so far (fixture M0: .5, .125, .2083)."""
    found = run(tmp_path, llama, {"s": Soup(into="serve")})
    assert "served" not in found[0]
    for count in (2, 3):
        trees = [tree["weights"] for tree in plain[:count]]
        assert close(found[count - 1]["served"], {n: sum(t[n] for t in trees) / count for n in trees[0]})
        assert equal(found[count - 1]["weights"], plain[count - 1]["weights"])


def test_serving_is_folded_in_order(plain: list[dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    parts = {"s": Soup(into="serve"), "w": WiseFT(alpha=0.5, first=False)}
    found = run(tmp_path, llama, parts)
    base = dict(found[-1]["module"].backbone.load().named_parameters())
    one, other = (tree["weights"] for tree in plain[:2])
    assert close(found[1]["served"], {n: torch.lerp(base[n], (one[n] + other[n]) / 2, 0.5) for n in one})


def test_what_is_remembered_is_what_training_goes_on_from(llama: Path, tmp_path: Path) -> None:
    alone = run(tmp_path / "alone", llama, {"e": EWC(strength=10.0, fisher_samples=4)})
    beside = run(tmp_path / "both", llama, {"e": EWC(strength=10.0, fisher_samples=4), "w": WiseFT(alpha=0.3)})
    for mine, other in zip(beside, alone, strict=True):
        assert equal(mine["weights"], other["weights"])


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_killed_run_serves_the_same(adapter: str, llama: Path, tmp_path: Path) -> None:
    goes_on_exactly(tmp_path, llama, ADAPTERS[adapter], lambda: {"w": WiseFT(alpha=0.5)})


class Negated(Mitigation):
    """Serves something of its own, without a word to training."""

    def served_weights(self, module: StageModule, before: Tensors, served: Tensors) -> Tensors:
        return {name: -tensor for name, tensor in served.items()}


def test_the_hook_alone_serves(plain: list[dict[str, Any]], llama: Path, tmp_path: Path) -> None:
    mitigation = Negated()
    assert not mitigation.touches_training(5)
    found = run(tmp_path, llama, {"n": mitigation})
    assert equal(found[0]["weights"], plain[0]["weights"])
    assert equal(found[0]["served"], {name: -tensor for name, tensor in plain[0]["weights"].items()})


@pytest.mark.parametrize("make", [WiseFT, WeightMixing, Soup, TaskArithmetic])
def test_nowhere_else(make: Any) -> None:
    with pytest.raises(UserError, match="into='elsewhere'"):
        make(into="elsewhere")

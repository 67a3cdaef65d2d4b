"""Fisher merging: the joint optimum of quadratics, and a weighted mean of what the stages trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.errors import UserError
from residency.mitigations import FisherMerge, Mitigation
from residency.mitigations.merging.fisher_merge import fisher_merge
from support.two_stages import ADAPTERS, equal, randn, two_stages

Side = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def side(seed: int) -> Side:
    return {"a": randn(40, seed=seed).square()}, {"a": randn(40, seed=seed + 9)}


def test_two_quadratics_give_the_joint_optimum() -> None:
    """H1 = diag(1, 4) at 0 and H2 = diag(2, 1) at 1 have their common minimum at (2/3, 1/5), fixture C3."""
    first = {"x": torch.tensor([1.0, 4.0])}, {"x": torch.zeros(2)}
    second = {"x": torch.tensor([2.0, 1.0])}, {"x": torch.ones(2)}
    total, merged = fisher_merge(first, second)
    torch.testing.assert_close(merged["x"], torch.tensor([2 / 3, 1 / 5]))
    assert total["x"].tolist() == [3.0, 5.0]


def test_one_by_one_is_all_at_once() -> None:
    sides = [side(k) for k in range(3)]
    precision, merged = fisher_merge(fisher_merge(sides[0], sides[1]), sides[2])
    weights = torch.stack([f["a"] for f, _ in sides])
    values = torch.stack([theta["a"] for _, theta in sides])
    torch.testing.assert_close(precision["a"], weights.sum(0))
    torch.testing.assert_close(merged["a"], (weights * values).sum(0) / weights.sum(0), rtol=1e-4, atol=1e-5)


def test_equal_information_is_the_mean_and_none_is_no_vote() -> None:
    (_, one), (_, two) = side(0), side(1)
    equal_weights = {"a": torch.full((40,), 3.0)}
    torch.testing.assert_close(
        fisher_merge((equal_weights, one), (equal_weights, two))[1]["a"], (one["a"] + two["a"]) / 2
    )
    nothing = {"a": torch.zeros(40)}
    assert equal(fisher_merge((nothing, one), (equal_weights, two))[1], two)
    assert equal(fisher_merge((nothing, one), (nothing, two))[1], two)
    assert equal(fisher_merge((equal_weights, one), (nothing, two))[1], one)
    same = fisher_merge((side(5)[0], one), (side(6)[0], one))[1]
    assert equal(same, one), "what did not move must not drift"


def even() -> Mitigation:
    return FisherMerge(fisher_samples=6)


def backwards() -> Mitigation:
    return FisherMerge(past=1e12, fisher_samples=6)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_in_a_stream_the_stages_are_merged_by_what_they_need(adapter: str, llama: Path) -> None:
    """Merged in the coordinates that train, and there, for LoRA too, exactly."""
    plain, run = two_stages(llama, adapter), two_stages(llama, adapter, even)
    (first, second), merged = plain.weights, run.weights[1]
    assert equal(run.weights[0], first)
    state = run.tree(2)["mitigations"]["x"]
    assert equal(merged, state["merged"])
    fisher = run.tree(1)["mitigations"]["x"]["precision"], state["precision"]
    for name in merged:
        own = fisher[1][name] - fisher[0][name]
        wanted = (fisher[0][name] * first[name] + own * second[name]) / fisher[1][name]
        wanted = torch.where(fisher[1][name] > 0, wanted, second[name])
        torch.testing.assert_close(merged[name], wanted, rtol=1e-3, atol=1e-4)
    assert not equal(merged, second)


def test_a_heavy_past_keeps_the_first_stage(llama: Path) -> None:
    first, run = two_stages(llama, "full").weights[0], two_stages(llama, "full", backwards)
    known = run.tree(1)["mitigations"]["x"]["precision"]
    for name, merged in run.weights[1].items():
        matters = known[name] > 1e-8
        torch.testing.assert_close(merged[matters], first[name][matters], rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{"past": -1.0}, {"past": float("nan")}, {"fisher_samples": 0}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        FisherMerge(**options)

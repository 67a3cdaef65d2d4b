"""DARE: dropped at random, right on average."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from residency.core.errors import UserError
from residency.core.randomness import generator
from residency.mitigations import DARE
from residency.mitigations.merging.dare import dare, dare_merge
from residency.mitigations.merging.task_arithmetic import task_arithmetic
from support.two_stages import equal, randn


@pytest.mark.parametrize("drop", [0.1, 0.5, 0.9])
def test_the_expectation_is_the_vector(drop: float) -> None:
    """Over n draws the mean of an entry has the standard deviation |τ| √(p / (1 - p) / n)."""
    vector, n = randn(20), 4000
    draw = generator(0, "test")
    mean = torch.stack([dare(vector, drop=drop, draw=draw) for _ in range(n)]).double().mean(0)
    error = (mean - vector).abs() / vector.abs()
    assert float(error.max()) < 5 * (drop / (1 - drop) / n) ** 0.5
    assert float(error.max()) > 0


def test_what_stays_is_rescaled() -> None:
    vector = randn(5000)
    found = dare(vector, drop=0.75, draw=generator(0, "test"))
    stays = found != 0
    assert float(stays.float().mean()) == pytest.approx(0.25, abs=0.03)
    torch.testing.assert_close(found[stays], 4 * vector[stays])


def test_nothing_dropped_is_the_very_tensor_and_draws_nothing() -> None:
    vector, draw = randn(5), generator(0, "test")
    before = draw.get_state()
    assert dare(vector, drop=0.0, draw=draw) is vector
    assert torch.equal(draw.get_state(), before)


def test_without_dropping_it_is_task_arithmetic() -> None:
    base, tuned = {"a": randn(9)}, [{"a": randn(9, seed=1)}, {"a": randn(9, seed=2)}]
    found = dare_merge(base, tuned, drop=0.0, strength=0.5, seed=1)
    assert equal({**found}, {**task_arithmetic(base, tuned, strength=0.5)})
    assert dare_merge(base, tuned[:1], drop=0.0, strength=1.0, seed=1) is tuned[0]


def test_what_is_dropped_is_a_function_of_seed_name_and_state() -> None:
    base = {"a": torch.zeros(400), "b": torch.zeros(400)}
    ones = {name: torch.ones(400) for name in base}

    def merge(seed: int, *tuned: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        torch.manual_seed(seed)  # the global generator has no part in it
        return {**dare_merge(base, list(tuned), drop=0.5, strength=1.0, seed=seed)}

    assert equal(merge(1, ones), merge(1, ones))
    assert not torch.equal(merge(1, ones)["a"], merge(2, ones)["a"])
    assert not torch.equal(merge(1, ones)["a"], merge(1, ones)["b"])
    both = merge(1, ones, ones)["a"]
    assert {*both.tolist()} == {0.0, 2.0, 4.0}, "two vectors are dropped independently"
    assert torch.equal(merge(1, base, ones)["a"], merge(1, ones)["a"]), "counted from the newest"


@pytest.mark.parametrize("options", [{"drop": -0.1}, {"drop": 1.0}, {"strength": -1.0}, {"last": 0}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        DARE(**options)

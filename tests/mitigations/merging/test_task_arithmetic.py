"""Task arithmetic: base plus a multiple of the sum of task vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.errors import UserError
from residency.mitigations import Mitigation, TaskArithmetic
from residency.mitigations.merging.soup import uniform
from residency.mitigations.merging.task_arithmetic import task_arithmetic
from support.two_stages import equal, randn, two_stages

Named = dict[str, torch.Tensor]


def named(seed: int) -> Named:
    return {"a": randn(30, seed=seed), "b": randn(2, 5, seed=seed + 9)}


def test_the_ends_are_the_very_objects() -> None:
    base, one, two = named(0), named(1), named(2)
    assert task_arithmetic(base, [one, two], strength=0.0) is base
    assert task_arithmetic(base, [one], strength=1.0) is one


@pytest.mark.parametrize("strength", [0.1, 0.5, 1.0, 1.7])
def test_it_is_the_sum_of_the_task_vectors(strength: float) -> None:
    base, tuned = named(0), [named(1), named(2), named(3)]
    found = task_arithmetic(base, tuned, strength=strength)
    for name in base:
        wanted = base[name] + strength * sum(t[name] - base[name] for t in tuned)
        torch.testing.assert_close(found[name], wanted, rtol=0, atol=1e-5)


def test_equal_shares_are_the_soup() -> None:
    tuned = [named(1), named(2)]
    assert equal({**task_arithmetic(named(0), tuned, strength=0.5)}, {**uniform(tuned)})


def test_identical_vectors_add_up() -> None:
    base, one = named(0), named(1)
    twice = task_arithmetic(base, [one, one], strength=0.5)
    assert equal({**twice}, one)


def sum_of_two() -> Mitigation:
    return TaskArithmetic(strength=0.5, last=2)


def test_in_a_stream_the_last_states_are_summed(llama: Path) -> None:
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", sum_of_two)
    assert equal(run.weights[0], plain.weights[0])
    assert equal(run.weights[1], {**uniform(plain.weights)})


@pytest.mark.parametrize("options", [{"strength": -1.0}, {"strength": float("nan")}, {"last": 0}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        TaskArithmetic(**options)

"""Bradley-Terry by hand, and what must not change it."""

from __future__ import annotations

import math

import pytest
import torch

from residency.objectives.reward_losses import bradley_terry, centring


def test_by_hand() -> None:
    one, zero = torch.ones(1), torch.zeros(1)
    assert float(bradley_terry(one, zero)) == pytest.approx(0.313262, abs=1e-6)
    assert float(bradley_terry(one, zero, 0.3)) == pytest.approx(0.403186, abs=1e-6)
    assert float(bradley_terry(one, one)) == pytest.approx(math.log(2), abs=1e-6)
    chosen, rejected = torch.tensor([1.5]), torch.tensor([0.5])
    whole = bradley_terry(chosen, rejected) + 0.01 * centring(chosen, rejected)
    assert float(whole) == pytest.approx(0.353262, abs=1e-6)


def test_only_the_difference_counts_without_centring() -> None:
    chosen, rejected = torch.tensor([1.5, -3.0]), torch.tensor([0.5, 2.0])
    torch.testing.assert_close(bradley_terry(chosen + 8, rejected + 8), bradley_terry(chosen, rejected))
    assert (centring(chosen + 8, rejected + 8) != centring(chosen, rejected)).all()
    # The two ways a pair can go are all there are.
    both = (-bradley_terry(chosen, rejected)).exp() + (-bradley_terry(rejected, chosen)).exp()
    torch.testing.assert_close(both, torch.ones(2))

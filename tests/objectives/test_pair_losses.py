"""Losses of pairs: one pair worked out by hand, values and slopes at the start, identities."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from residency.objectives.pair_losses import (
    PAIR_LOSSES,
    PairSums,
    apo_down,
    apo_zero,
    bco_pair,
    cdpo,
    cpo,
    dpo,
    hinge,
    ipo,
    kto,
    kto_baseline,
    nca,
    odds_ratio,
    robust,
    sigmoid_norm,
    simpo,
    ties_half,
)


def pair(chosen: float = -10, rejected: float = -12, ref_c: float = -11, ref_r: float = -11.5) -> PairSums:
    def one(value: float) -> torch.Tensor:
        return torch.tensor([value], dtype=torch.float64, requires_grad=True)

    return PairSums(
        chosen=one(chosen),
        rejected=one(rejected),
        chosen_tokens=torch.tensor([4.0], dtype=torch.float64),
        rejected_tokens=torch.tensor([5.0], dtype=torch.float64),
        reference_chosen=one(ref_c).detach(),
        reference_rejected=one(ref_r).detach(),
    )


WORKED: dict[str, tuple[Any, float]] = {
    "sigmoid": (partial(dpo, beta=0.1), 0.620957),
    "cdpo": (partial(cdpo, beta=0.1, smoothing=0.1), 0.635957),
    "robust": (partial(robust, beta=0.1, smoothing=0.1), 0.602207),
    "hinge": (partial(hinge, beta=0.1), 0.85),
    "ipo": (partial(ipo, beta=0.1), 21.6225),
    "sigmoid_norm": (partial(sigmoid_norm, beta=0.1), 0.675800),
    "sigmoid_norm 5": (partial(sigmoid_norm, beta=5.0), 0.160224),
    "nca": (partial(nca, beta=0.1), 1.350825),
    "bco_pair": (partial(bco_pair, beta=0.1), 1.312856),
    "apo_zero": (partial(apo_zero, beta=0.1), 0.962523),
    "apo_down": (partial(apo_down, beta=0.1), 0.987549),
    "simpo": (partial(simpo, beta=2.0, gamma=0.5), 1.103186),
    "simpo 0.1": (partial(simpo, beta=0.1, gamma=0.5), 0.980313),
    "cpo": (partial(cpo, beta=0.1), 0.598139),
    "orpo": (odds_ratio, 0.749369),
}


@pytest.mark.parametrize("name", WORKED)
def test_one_pair_by_hand(name: str) -> None:
    loss, value = WORKED[name]
    assert loss(pair()).item() == pytest.approx(value, abs=1e-6)


def test_every_loss_was_worked_out() -> None:
    assert {*PAIR_LOSSES} == {name.split()[0] for name in WORKED}


@pytest.mark.parametrize(
    ("name", "value", "slope"),
    [
        ("sigmoid", math.log(2), -0.05),
        ("cdpo", math.log(2), -0.1 * 0.4),
        ("robust", math.log(2), -0.1 / (2 * 0.8)),
        ("hinge", 1.0, -0.1),
        ("ipo", 25.0, -10 / 4),
        ("nca", 2 * math.log(2), None),
        ("bco_pair", 2 * math.log(2), -0.05),
        ("apo_zero", 1.0, -0.025),
    ],
)
def test_at_the_reference(name: str, value: float, slope: float | None) -> None:
    start = pair(-11, -11.5)
    loss = WORKED[name][0](start)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    if slope is not None:
        (gradient,) = torch.autograd.grad(loss, start.chosen)
        assert float(gradient) == pytest.approx(slope, abs=1e-12)


def test_gradient_of_dpo_pulls_both_answers_alike() -> None:
    sums = pair()
    by_chosen, by_rejected = torch.autograd.grad(dpo(sums, beta=0.1), (sums.chosen, sums.rejected))
    assert float(by_chosen) == pytest.approx(-0.046257, abs=1e-6)
    assert float(by_rejected) == pytest.approx(0.046257, abs=1e-6)


def test_swapping_a_pair_negates_its_margin() -> None:
    one, other = pair(), pair(-12, -10, -11.5, -11)
    assert one.margin.item() == -other.margin.item() == 1.5
    torch.testing.assert_close(cdpo(one, beta=0.1, smoothing=0.5), cdpo(other, beta=0.1, smoothing=0.5))
    torch.testing.assert_close(robust(one, beta=0.1, smoothing=0.0), dpo(one, beta=0.1))


def test_robust_is_unbiased_under_flipped_labels() -> None:
    """(1 - ε) L(pair) + ε L(flipped pair) is the loss without flips (Chowdhury et al. 2024)."""
    one, other, epsilon = pair(), pair(-12, -10, -11.5, -11), 0.2
    noisy = (1 - epsilon) * robust(one, beta=0.1, smoothing=epsilon) + epsilon * robust(
        other, beta=0.1, smoothing=epsilon
    )
    torch.testing.assert_close(noisy, dpo(one, beta=0.1))


@pytest.mark.parametrize("mean", [-1e-6, -1e-3, -0.5, -math.log(2), -0.8, -5.0, -60.0])
def test_log_odds_are_exact_near_certainty_and_far_from_it(mean: float) -> None:
    sums = replace(pair(), chosen=torch.tensor([4 * mean], dtype=torch.float64, requires_grad=True))
    exact = mean - math.log(-math.expm1(mean))
    rejected = -12 / 5 - math.log(-math.expm1(-12 / 5))
    loss = odds_ratio(sums)
    assert loss.item() == pytest.approx(math.log1p(math.exp(-(exact - rejected))), rel=1e-9)
    (gradient,) = torch.autograd.grad(loss, sums.chosen)
    assert -1 < float(gradient) < 0


def test_orpo_of_a_certain_answer_is_finite() -> None:
    sums = replace(pair(), chosen=torch.zeros(1, dtype=torch.float64))
    assert torch.isfinite(odds_ratio(sums)).all()


def test_kto_by_hand() -> None:
    ratio = torch.tensor([1.0, -0.5, 0.3], dtype=torch.float64)
    good = torch.tensor([True, False, True])
    losses = kto(ratio, good, torch.tensor(0.4), beta=0.1, weights=(1.0, 1.0))
    torch.testing.assert_close(losses.tolist(), [0.485005, 0.477515, 0.502500], rtol=0, atol=1e-6)
    baseline = kto_baseline(torch.full((3,), -0.4))
    assert baseline == 0
    losses = kto(ratio, good, baseline, beta=0.1, weights=(1.0, 1.0))
    torch.testing.assert_close(losses.tolist(), [0.475021, 0.487503, 0.492501], rtol=0, atol=1e-6)
    assert not kto_baseline(ratio.requires_grad_()).requires_grad


def test_a_tie_is_half_right() -> None:
    assert ties_half(torch.tensor([2.0, 0.0, -0.1])).tolist() == [1.0, 0.5, 0.0]

"""Policy gradients: advantages by hand, estimators by enumeration over a tiny vocabulary."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from residency.objectives.policy_losses import (
    answer_weights,
    clipped_surrogate,
    enumerated_return,
    group_advantages,
    kl_estimate,
    kl_penalty,
    leave_one_out,
    soft_overlong,
)

LOGITS = torch.tensor([0.5, 0.0, -0.5], dtype=torch.float64)
REWARDS = torch.tensor([1.0, 0.0, 0.25], dtype=torch.float64)
TRUE_GRADIENT = torch.tensor([0.226366, -0.169898, -0.056468], dtype=torch.float64)


def expected_gradient(advantages: Callable[[Tensor], Tensor], group: int) -> Tensor:
    """E over all 3^G groups of the mean over the group of A ∇log π."""
    log_p = LOGITS.log_softmax(-1)
    p, total = log_p.exp(), torch.zeros(3, dtype=torch.float64)
    for actions in itertools.product(range(3), repeat=group):
        found = advantages(REWARDS[list(actions)][None])[0]
        weight = math.prod(float(p[a]) for a in actions)
        for action, advantage in zip(actions, found.tolist(), strict=True):
            total += weight * advantage * (torch.eye(3, dtype=torch.float64)[action] - p) / group
    return total


@pytest.mark.parametrize("group", [2, 3, 4])
def test_leave_one_out_is_unbiased(group: int) -> None:
    exact = LOGITS.clone().requires_grad_()
    (gradient,) = torch.autograd.grad((exact.softmax(-1) * REWARDS).sum(), exact)
    torch.testing.assert_close(gradient, TRUE_GRADIENT, rtol=0, atol=1e-6)
    torch.testing.assert_close(expected_gradient(leave_one_out, group), gradient, rtol=0, atol=1e-12)
    # Dr. GRPO's is the same up to a factor; dividing by a standard deviation is another direction.
    plain = expected_gradient(lambda r: group_advantages(r, scale="none"), group)
    torch.testing.assert_close(plain, gradient * (group - 1) / group, rtol=0, atol=1e-12)


def test_dividing_by_a_groups_deviation_is_another_direction() -> None:
    ratios = expected_gradient(group_advantages, 2) / TRUE_GRADIENT
    assert ratios.tolist() == pytest.approx([0.78, 0.89, 0.47], abs=0.01)


def test_advantages_by_hand() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    grpo = group_advantages(rewards)[0].tolist()
    assert grpo == pytest.approx([1.4997, -0.4999, -0.4999, -0.4999], abs=1e-4)
    assert group_advantages(rewards, scale="none")[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    assert leave_one_out(rewards)[0].tolist() == pytest.approx([1.0, -1 / 3, -1 / 3, -1 / 3])
    two = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 1.0]], dtype=torch.float64))[0].tolist()
    assert two == pytest.approx([0.865875, -0.865875, -0.865875, 0.865875], abs=1e-6)


@pytest.mark.parametrize("advantages", [leave_one_out, group_advantages])
def test_equal_rewards_teach_nothing(advantages: Callable[[Tensor], Tensor]) -> None:
    for value in (0.0, 1.0, 0.1, 1 / 3):
        for group in (2, 3, 7, 8):
            assert (advantages(torch.full((2, group), value)) == 0).all(), (value, group)


@pytest.mark.parametrize("advantages", [leave_one_out, group_advantages])
def test_advantages_know_no_order_and_no_zero(advantages: Callable[[Tensor], Tensor]) -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.2], [1.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    found = advantages(rewards)
    torch.testing.assert_close(found.sum(-1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(advantages(rewards + 3.0), found)
    torch.testing.assert_close(advantages(rewards[:, [2, 0, 3, 1]]), found[:, [2, 0, 3, 1]])


def test_scaling_the_rewards() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.5, 0.2]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(10 * rewards), group_advantages(rewards), rtol=1e-3, atol=0)
    torch.testing.assert_close(leave_one_out(10 * rewards), 10 * leave_one_out(rewards))


@pytest.mark.parametrize("advantages", [leave_one_out, group_advantages])
def test_what_cannot_be_scored_counts_nowhere(advantages: Callable[[Tensor], Tensor]) -> None:
    with_gap = advantages(torch.tensor([[1.0, math.nan, 0.0, 0.5]], dtype=torch.float64))[0]
    without = advantages(torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64))[0]
    assert with_gap[1] == 0
    torch.testing.assert_close(with_gap[[0, 2, 3]], without)
    assert (advantages(torch.full((1, 3), math.nan)) == 0).all()
    assert (advantages(torch.tensor([[1.0, math.nan]])) == 0).all(), "one alone has nothing to be compared with"


@pytest.mark.parametrize(
    ("ratio", "advantage", "high", "value", "slope"),
    [
        (1.3, 1.0, 0.2, -1.2, 0.0),
        (1.3, -1.0, 0.2, 1.3, 1.0),
        (0.7, 1.0, 0.2, -0.7, -1.0),
        (0.7, -1.0, 0.2, 0.8, 0.0),
        (1.25, 1.0, 0.28, -1.25, -1.0),
        (1.0, 2.5, 0.2, -2.5, -2.5),
    ],
)
def test_clipping(ratio: float, advantage: float, high: float, value: float, slope: float) -> None:
    log_ratio = torch.tensor(math.log(ratio), dtype=torch.float64, requires_grad=True)
    loss, clipped = clipped_surrogate(log_ratio, torch.tensor(advantage, dtype=torch.float64), clip_high=high)
    assert loss.item() == pytest.approx(value)
    (gradient,) = torch.autograd.grad(loss, log_ratio)
    assert float(gradient) == pytest.approx(slope * ratio)  # by the logarithm of the ratio
    assert bool(clipped) == (slope == 0.0)


def test_aggregation_of_a_short_and_a_long_answer() -> None:
    lengths, advantages = torch.tensor([2, 6]), torch.tensor([1.0, -1.0])
    totals = -advantages * lengths  # every token of an answer counts its -A at ratio 1
    values = {
        name: float((answer_weights(lengths, aggregate=name, longest=8) * totals).sum() / units)
        for name, units in (("tokens", 8), ("sequences", 2), ("constant", 2))
    }
    assert values == pytest.approx({"tokens": 0.5, "sequences": 0.0, "constant": 0.25})


def kl_gradients(term: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """E over tokens drawn from π of the gradient of a term of the loss, the reference uniform."""
    logits = LOGITS.clone().requires_grad_()
    log_p, old = logits.log_softmax(-1), LOGITS.log_softmax(-1)
    reference = torch.full((3,), -math.log(3), dtype=torch.float64)
    (gradient,) = torch.autograd.grad((old.exp() * term(log_p, reference, log_p - old)).sum(), logits)
    return gradient


def test_gradients_of_the_estimators_of_the_divergence() -> None:
    reverse = torch.tensor([0.172164, -0.049175, -0.122988], dtype=torch.float64)
    forward = torch.tensor([0.173147, -0.026137, -0.147010], dtype=torch.float64)
    expected = {
        ("k1", False): torch.zeros(3, dtype=torch.float64),
        ("k2", False): reverse,
        ("k3", False): forward,
        ("k3", True): reverse,
    }
    for (kind, corrected), value in expected.items():
        found = kl_gradients(lambda p, r, q, k=kind, c=corrected: kl_penalty(p, r, q, kind=k, corrected=c))
        torch.testing.assert_close(found, value, rtol=0, atol=1e-6, msg=f"{kind}, corrected={corrected}")


def test_values_of_the_estimators() -> None:
    log_p = LOGITS.log_softmax(-1)
    reference = torch.full((3,), -math.log(3), dtype=torch.float64)
    for kind in ("k1", "k3"):
        mean = (log_p.exp() * kl_estimate(log_p, reference, kind=kind)).sum()
        assert float(mean) == pytest.approx(0.078421, abs=1e-6)
    assert (kl_estimate(log_p, reference, kind="k3") >= 0).all()
    assert torch.isfinite(kl_estimate(torch.tensor([-500.0]), torch.tensor([-1.0]), kind="k3")).all()


def test_the_return_of_a_label_policy_is_exact() -> None:
    likelihood = torch.tensor([[-3.0, -4.0, -6.0]], dtype=torch.float64, requires_grad=True)
    value, policy = enumerated_return(likelihood, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64))
    assert policy[0].tolist() == pytest.approx([0.705385, 0.259496, 0.035119], abs=1e-6)
    assert value.item() == pytest.approx(0.259496, abs=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), likelihood)
    assert gradient[0].tolist() == pytest.approx([-0.183045, 0.192158, -0.009113], abs=1e-6)


def test_the_length_penalty() -> None:
    found = {n: soft_overlong(n, longest=100, cushion=20) for n in (80, 81, 90, 100, 101)}
    assert found == pytest.approx({80: 0.0, 81: -0.05, 90: -0.5, 100: -1.0, 101: -1.0})

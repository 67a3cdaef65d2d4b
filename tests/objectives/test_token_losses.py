"""Weights of single tokens against values worked out by hand, and against what they must be in a limit."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from residency.objectives.token_losses import (
    effective_share,
    entropy_weights,
    flow_weights,
    kl_to_reference,
    low_perplexity_mask,
    probability_weights,
    smoothed_nll,
    talr_weights,
    token_entropy,
)

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
REFERENCE = torch.tensor([[1.5, 1.5, 0.0, -1.0]])
TARGET = torch.tensor([1])


def nll(logits: torch.Tensor = LOGITS) -> torch.Tensor:
    return F.cross_entropy(logits, TARGET, reduction="none")


def test_dft_weighs_a_token_by_its_probability_and_scales_its_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = probability_weights(nll(logits)) * nll(logits)
    torch.testing.assert_close(loss, torch.tensor([0.341156]), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    plain = torch.tensor([[0.643914, 0.236883 - 1, 0.087144, 0.032059]])
    torch.testing.assert_close(gradient, 0.236883 * plain, rtol=0, atol=1e-6)


def test_dft_of_a_model_that_knows_nothing_is_the_likelihood_over_the_vocabulary() -> None:
    flat = torch.zeros(1, 4)
    torch.testing.assert_close(probability_weights(nll(flat)) * nll(flat), nll(flat) / 4)


def test_eaft_weighs_by_the_entropy_of_the_likeliest_tokens() -> None:
    torch.testing.assert_close(token_entropy(LOGITS), torch.tensor([0.947537]), rtol=0, atol=1e-6)
    weight = entropy_weights(LOGITS, k=4)
    torch.testing.assert_close(weight, torch.tensor([0.683503]), rtol=0, atol=1e-6)
    torch.testing.assert_close(weight * nll(), torch.tensor([0.984375]), rtol=0, atol=1e-6)
    torch.testing.assert_close(entropy_weights(torch.zeros(1, 50), k=20), torch.ones(1))
    torch.testing.assert_close(entropy_weights(LOGITS, k=4, alpha=0.0), torch.ones(1))
    # More tokens than the vocabulary has are all of them; two of them are renormalised among themselves.
    assert torch.equal(entropy_weights(LOGITS, k=20), weight)
    p = 1 / (1 + math.exp(-1.0))
    binary = -(p * math.log(p) + (1 - p) * math.log(1 - p)) / math.log(2)
    torch.testing.assert_close(entropy_weights(LOGITS, k=2), torch.tensor([binary]))


def test_label_smoothing_is_that_of_torch() -> None:
    ours = smoothed_nll(LOGITS, TARGET, smoothing=0.1)
    torch.testing.assert_close(ours, torch.tensor([1.490190]), rtol=0, atol=1e-6)
    torch.testing.assert_close(ours, F.cross_entropy(LOGITS, TARGET, reduction="none", label_smoothing=0.1))
    torch.testing.assert_close(smoothed_nll(LOGITS, TARGET, smoothing=0.0), nll())


@pytest.mark.parametrize(("direction", "value"), [("forward", 0.105016), ("reverse", 0.098500)])
def test_divergence_from_the_reference(direction: str, value: float) -> None:
    found = kl_to_reference(LOGITS, REFERENCE, direction=direction)
    torch.testing.assert_close(found, torch.tensor([value]), rtol=0, atol=1e-6)
    shifted = kl_to_reference(LOGITS + 7, REFERENCE - 3, direction=direction)
    torch.testing.assert_close(shifted, found, rtol=0, atol=1e-6)
    torch.testing.assert_close(kl_to_reference(LOGITS, LOGITS, direction=direction), torch.zeros(1))


def test_flow_uses_the_middle_of_two_medians() -> None:
    means = torch.tensor([0.5, 1.0, 2.0, 4.0])
    expected = torch.tensor([0.716531, 0.513417, 0.263597, 0.069483])
    torch.testing.assert_close(flow_weights(means), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(flow_weights(means, tau=1.5), expected, rtol=0, atol=1e-6)
    assert torch.equal(flow_weights(means, tau=math.inf), torch.ones(4))


def test_talr_and_stm_on_four_tokens() -> None:
    values = torch.tensor([0.1, 0.5, 2.0, 5.0])
    expected = torch.tensor([0.904837, 0.606531, 0.135335, 0.01])
    torch.testing.assert_close(talr_weights(values, tau=1.0), expected, rtol=0, atol=1e-6)
    assert torch.equal(talr_weights(values, tau=math.inf), torch.ones(4))
    assert torch.equal(low_perplexity_mask(values), torch.tensor([1.0, 1.0, 0.0, 0.0]))
    assert torch.equal(low_perplexity_mask(values, threshold=math.inf), torch.ones(4))
    border = torch.tensor([math.log(2.5)])
    assert torch.equal(low_perplexity_mask(border), torch.ones(1)), "θ itself is kept"


def test_no_weight_carries_a_gradient() -> None:
    logits = LOGITS.clone().requires_grad_()
    found = nll(logits)
    for weight in (probability_weights(found), entropy_weights(logits), talr_weights(found, tau=1.0)):
        assert not weight.requires_grad


def test_effective_share() -> None:
    torch.testing.assert_close(effective_share(torch.full((7,), 0.3)), torch.tensor(1.0))
    torch.testing.assert_close(effective_share(torch.tensor([1.0, 0.0, 0.0, 0.0])), torch.tensor(0.25))
    assert effective_share(torch.zeros(3)) == 0

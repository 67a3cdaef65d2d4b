"""Gradient stability, calibration and cost: closed forms, references, refusals."""

from __future__ import annotations

import doctest
import gc
import math
from typing import Any

import bitsandbytes
import numpy as np
import pytest
import torch
from torch._subclasses import FakeTensor
from torchmetrics.functional.classification import binary_calibration_error

from residency.inspection import gradient_metrics as gradients
from residency.inspection.calibration_metrics import brier, calibration, expected_calibration_error, token_answers
from residency.inspection.gradient_metrics import GradientStability, gradient_stability, stability_improvement
from residency.metrics import cost
from residency.metrics.cost import optimizer_state_bytes, overhead, tokens_per_second


@pytest.mark.parametrize("module", [gradients, cost])
def test_documented_examples(module: Any) -> None:
    assert doctest.testmod(module).failed == 0


# -- gradients --------------------------------------------------------------------------------------------------------


def stability(values: Any, **options: Any) -> GradientStability:
    return gradient_stability(values, **({"clipper": "norm 1.0", "seed": 0} | options))


def test_equal_norms_have_no_variation() -> None:
    """F6."""
    found = stability([0.1] * 7)
    assert (found.cv, found.mad_over_median, found.spikes, found.steps) == (pytest.approx(0, abs=1e-12), 0, 0, 7)


def test_gradient_stability_in_numbers() -> None:
    found = stability([1, 2, 3, 4, 10])
    assert found.cv == pytest.approx(np.std([1, 2, 3, 4, 10]) / 4)
    assert found.mad_over_median == pytest.approx(1 / 3)
    assert (found.largest, found.spikes) == (10, 0)
    assert stability([1.0] * 40 + [100.0]).spikes == 1
    assert math.isnan(stability([0.0, 0.0]).cv)
    assert math.isnan(stability([1.0, math.nan]).cv)
    with pytest.raises(ValueError, match="one per optimizer step"):
        stability([])


def test_improvement() -> None:
    even, uneven = stability([1, 1.1, 0.9, 1]), stability([1, 2, 0.5, 4])
    assert 0 < stability_improvement(even, uneven) < 1
    assert stability_improvement(uneven, even) < 0
    assert stability_improvement(uneven, uneven) == 0
    # The scale of the gradients is no stability.
    assert stability_improvement(stability([5, 10, 2.5, 20]), uneven) == pytest.approx(0)


@pytest.mark.parametrize(
    ("options", "name"), [({"clipper": "none"}, "clipper"), ({"seed": 1}, "seed"), ({"values": [1.0, 2.0]}, "steps")]
)
def test_what_cannot_be_compared_is_refused(options: dict[str, Any], name: str) -> None:
    base = stability([1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match=name):
        stability_improvement(stability(**({"values": [1.0, 2.0, 3.0]} | options)), base)


# -- calibration ------------------------------------------------------------------------------------------------------


def test_a_calibrated_model_has_no_error() -> None:
    confidence = torch.full((1000,), 0.8, dtype=torch.float64)
    correct = torch.tensor([1, 1, 1, 1, 0] * 200)
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(0)
    assert expected_calibration_error(confidence, torch.zeros(1000), bins=7) == pytest.approx(0.8)


def test_one_bin_equals_torchmetrics() -> None:
    draw = torch.Generator().manual_seed(0)
    confidence = torch.rand(500, generator=draw) * 0.5 + 0.5
    correct = (torch.rand(500, generator=draw) < 0.7).long()
    # Its bins have equal width, ours equal mass; with one bin they are the same.
    theirs = float(binary_calibration_error(confidence, correct, n_bins=1, norm="l1"))
    assert expected_calibration_error(confidence, correct, bins=1) == pytest.approx(theirs, abs=1e-6)


def test_bins_have_equal_mass() -> None:
    confidence = torch.linspace(0.01, 0.99, 30, dtype=torch.float64)
    correct = (torch.arange(30) % 3 == 0).double()
    parts = zip(correct.chunk(15), confidence.chunk(15), strict=True)
    expected = np.mean([abs(float(c.mean() - p.mean())) for c, p in parts])
    assert expected_calibration_error(confidence, correct, bins=15) == pytest.approx(expected)
    shuffled = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert expected_calibration_error(confidence[shuffled], correct[shuffled]) == pytest.approx(expected)
    few = expected_calibration_error(confidence[:4], correct[:4])
    assert few == pytest.approx(float((correct[:4] - confidence[:4]).abs().mean()))
    assert math.isnan(expected_calibration_error(confidence[:0], correct[:0]))
    with pytest.raises(ValueError, match="bins"):
        expected_calibration_error(confidence, correct, bins=0)


def test_calibration_of_logits() -> None:
    logits = torch.randn(60, 9, generator=torch.Generator().manual_seed(2))
    targets = torch.arange(60) % 9
    found = calibration([token_answers(logits[:25], targets[:25]), token_answers(logits[25:], targets[25:])])
    assert found.nll == pytest.approx(float(torch.nn.functional.cross_entropy(logits, targets)), rel=1e-6)
    p = logits.softmax(-1)
    onehot = torch.nn.functional.one_hot(targets, 9)
    assert found.brier == pytest.approx(float((p - onehot).square().sum(-1).mean()), rel=1e-6)
    assert 0 <= found.ece <= 1
    assert found.tokens == 60
    assert float(brier(torch.tensor([[0.0, 1.0]]), torch.tensor([0]))) == 2.0
    certain = calibration([token_answers(1000.0 * torch.nn.functional.one_hot(targets, 9), targets)])
    assert (certain.ece, certain.brier, certain.nll) == (0, 0, 0)


# -- cost -------------------------------------------------------------------------------------------------------------


def test_ratios() -> None:
    assert tokens_per_second(tokens=100, seconds=4.0) == 25
    assert math.isnan(tokens_per_second(tokens=100, seconds=0.0))
    assert overhead(seconds=15.0, plain_seconds=10.0) == pytest.approx(0.5)
    assert math.isnan(overhead(seconds=1.0, plain_seconds=0.0))


@pytest.mark.parametrize(("make", "bytes_"), [(torch.optim.AdamW, 2 * 4 * 12 + 4), (torch.optim.SGD, 0)])
def test_optimizer_state_bytes(make: Any, bytes_: int) -> None:
    parameter = torch.nn.Parameter(torch.ones(3, 4))
    optimizer = make([parameter], lr=0.1)
    assert optimizer_state_bytes(optimizer) == 0
    parameter.sum().backward()
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == bytes_


def _optimizers() -> dict[str, Any]:
    from residency.adapters.optim.galore import GaLoreOptimizer
    from residency.adapters.optim.layerwise import LayerwiseOptimizer

    def galore(parameters: Any) -> Any:
        options = {"factory": torch.optim.AdamW, "rank": 2, "gap": 3, "scale": 0.25}
        return GaLoreOptimizer(projected=list(parameters), plain=[], **options)

    return {
        "adamw": torch.optim.AdamW,
        "galore": galore,
        "galore_layerwise": lambda parameters: LayerwiseOptimizer(parameters=parameters, make=lambda p: galore([p])),
        "adamw_8bit": lambda parameters: bitsandbytes.optim.AdamW8bit(parameters, min_8bit_size=16),
    }


def _held() -> dict[int, int]:
    """Bytes of all tensors that are alive, by their memory."""
    gc.collect()
    # What other tests have traced is alive too, and has no memory.
    alive = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor) and not isinstance(o, FakeTensor)]
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in alive}


@pytest.mark.parametrize("name", ["adamw", "galore", "galore_layerwise", "adamw_8bit"])
def test_optimizer_bytes_are_what_it_holds(name: str) -> None:
    """Against every tensor that is alive because of it. GaLore's were ten times too small, layer-wise ones 0."""
    weights = [torch.nn.Parameter(torch.ones(24, 16)) for _ in range(2)]
    before = _held()
    optimizer = _optimizers()[name](weights)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = sum((w.sin() * torch.arange(16.0)).sum() for w in weights)
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    for weight in weights:
        weight.grad = None
    counted = optimizer_state_bytes(optimizer)
    held = sum(size for pointer, size in _held().items() if pointer not in before)
    assert counted == held
    assert counted > 0

"""EMA: the bias-corrected average of the steps, in the place of the last one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from residency.core.errors import UserError
from residency.mitigations import EMA, Mitigation
from residency.mitigations.merging.ema import ema_step, ema_weight
from support.two_stages import ADAPTERS, equal, randn, two_stages


def averaged(values: list[dict[str, torch.Tensor]], decay: float) -> dict[str, torch.Tensor]:
    average: dict[str, torch.Tensor] = {}
    for n, value in enumerate(values, 1):
        average = ema_step(average, value, n=n, decay=decay)
    return average


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_the_average_is_the_weighted_mean(n: int, decay: float) -> None:
    """Σ βⁿ⁻ᵏ θ_k (1 - β) / (1 - βⁿ), whose weights sum to one: the correction of the bias."""
    values = [{"a": randn(5, seed=k)} for k in range(n)]
    weights = torch.tensor([decay ** (n - k) for k in range(1, n + 1)], dtype=torch.float64)
    weights = weights * (1 - decay) / (1 - decay**n)
    assert float(weights.sum()) == pytest.approx(1.0)
    wanted = sum(w * v["a"].double() for w, v in zip(weights, values, strict=True))
    torch.testing.assert_close(averaged(values, decay)["a"].double(), wanted, rtol=0, atol=1e-6)


def test_the_ends() -> None:
    values = [{"a": randn(50, seed=k)} for k in range(9)]
    assert equal(averaged(values, 0.0), values[-1]), "without memory the last value"
    assert equal(averaged([values[0]] * 9, 0.9), values[0]), "what does not move must not drift"
    assert equal(averaged(values[:1], 0.999), values[0]), "the first average is the first value"
    mean = torch.stack([v["a"] for v in values]).mean(0)
    torch.testing.assert_close(averaged(values, 1 - 1e-9)["a"], mean, rtol=0, atol=1e-6)
    assert ema_weight(10**6, 0.9) == pytest.approx(0.1)


def test_half_precision_is_averaged_in_full() -> None:
    """A step of 1e-3 of the average's own size is lost in bfloat16."""
    values = [{"a": torch.full((3,), 1.0 + 0.01 * k, dtype=torch.bfloat16)} for k in range(50)]
    average = averaged(values, 0.999)["a"]
    assert average.dtype == torch.float32
    exact = torch.stack([v["a"].double() for v in values]).mean(0)
    torch.testing.assert_close(average.double(), exact, rtol=0, atol=5e-3)


def half() -> Mitigation:
    return EMA(decay=0.5)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_stage_ends_in_the_average_of_its_steps(adapter: str, llama: Path) -> None:
    """In the coordinates that train; the course of the first stage is that without EMA."""
    plain, run = two_stages(llama, adapter), two_stages(llama, adapter, half)
    assert run.losses == plain.losses
    assert all(equal(one, other) for one, other in zip(run.steps[0], plain.steps[0], strict=True))
    for k in (0, 1):
        assert equal(run.weights[k], averaged(run.steps[k], 0.5))
    assert not equal(run.weights[0], plain.weights[0])
    assert not equal(run.steps[1][0], plain.steps[1][0]), "the second stage starts from the average"
    assert not run.tree(2)["mitigations"]["x"]["average"], "nothing is carried into the next stage"


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_outside_of_its_range_is_refused(decay: float) -> None:
    with pytest.raises(UserError, match="decay="):
        EMA(decay=decay)

"""ZClip: outliers among gradient norms are shortened, everything else is left as it is."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, save_tree
from residency.mitigations import ZClip
from residency.mitigations.constraints.zclip import clipped_norm


def feed(clipper: ZClip, norms: list[float]) -> list[float]:
    """The norms that are left of gradients of these norms (two tensors each)."""
    found = []
    for norm in norms:
        gradients = {"a": torch.tensor([0.6 * norm]), "b": torch.tensor([[0.0, 0.8 * norm]])}
        left: Any = clipper.transform_gradients(None, gradients)  # type: ignore[arg-type]
        found.append(float(torch.cat([t.flatten() for t in left.values()]).norm()))
    return found


def by_hand(norms: list[float], *, threshold: float, decay: float, warmup: int) -> list[float]:
    """The paper's algorithm on plain numbers."""
    mean = sum(norms[:warmup]) / warmup
    variance = sum((n - mean) ** 2 for n in norms[:warmup]) / warmup
    found = norms[:warmup]
    for norm in norms[warmup:]:
        z = (norm - mean) / math.sqrt(variance)
        left = mean + threshold * threshold / z * math.sqrt(variance) if z > threshold else norm
        mean = decay * mean + (1 - decay) * left
        variance = decay * variance + (1 - decay) * (left - mean) ** 2
        found.append(left)
    return found


def test_it_is_the_papers_algorithm() -> None:
    draw = random.Random(0)
    norms = [math.exp(draw.gauss(0, 0.3)) * (6 if step % 37 == 36 else 1) for step in range(200)]
    wanted = by_hand(norms, threshold=2.5, decay=0.97, warmup=25)
    assert sum(w < n - 1e-9 for w, n in zip(wanted, norms, strict=True)) >= 5, "the sequence has outliers"
    assert feed(ZClip(), norms) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize("norm", [1e-6, 0.1, 1 / 3, 1234.5])
def test_constant_norms_are_never_clipped(norm: float) -> None:
    assert feed(ZClip(threshold=0.1), [norm] * 300) == pytest.approx([norm] * 300, rel=1e-6)
    clipper = ZClip(threshold=0.1, warmup=3)
    gradients = {"a": torch.tensor([norm])}
    for _ in range(50):
        assert clipper.transform_gradients(None, gradients) is gradients  # type: ignore[arg-type]


def test_a_spike_is_clipped_after_the_warm_up_and_not_before() -> None:
    calm = [1.0 + 0.1 * (-1) ** step for step in range(25)]
    assert feed(ZClip(), [*calm[:-1], 50.0])[-1] == pytest.approx(50.0)
    assert feed(ZClip(), [*calm, 50.0])[-1] < 1.5


def test_the_larger_the_spike_the_less_is_left() -> None:
    mean, variance = torch.tensor(1.0), torch.tensor(0.01)
    norms = torch.tensor([1.2, 1.24, 1.3, 2.0, 10.0])
    left = clipped_norm(norms, mean, variance, threshold=2.5)
    assert torch.equal(left[:2], norms[:2])
    torch.testing.assert_close(left[2:], 1 + 6.25 * 0.01 / (norms[2:] - 1))
    assert bool((left[2:].diff() < 0).all())


def test_a_clipped_norm_enters_the_averages_as_it_was_clipped() -> None:
    """A second spike like the first is an outlier still."""
    calm = [1.0 + 0.1 * (-1) ** step for step in range(25)]
    clipper = ZClip()
    assert max(feed(clipper, [*calm, 50.0, 50.0, 50.0])[-3:]) < 1.5
    assert clipper.metrics_to_log(None)["norm"] == pytest.approx(50.0), "logged before clipping"  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_what_is_not_finite_leaves_no_trace(wrong: float) -> None:
    clipper, same = ZClip(warmup=2), ZClip(warmup=2)
    feed(same, [1.0, 1.1])
    feed(clipper, [1.0, wrong, 1.1])
    assert torch.equal(clipper.state["statistics"], same.state["statistics"])  # type: ignore[arg-type]


def test_it_goes_on_from_its_state(tmp_path: Any) -> None:
    draw = random.Random(1)
    norms = [math.exp(draw.gauss(0, 0.5)) for _ in range(80)]
    whole, first, second = (
        ZClip(warmup=10, threshold=1.0),
        ZClip(warmup=10, threshold=1.0),
        ZClip(warmup=10, threshold=1.0),
    )
    wanted = feed(whole, norms)
    start = feed(first, norms[:40])
    save_tree(tmp_path / "state.safetensors", first.state_dict())
    second.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert start + feed(second, norms[40:]) == wanted


@pytest.mark.parametrize("per_domain", [True, False])
def test_averages_over_domains(per_domain: bool) -> None:
    clipper = ZClip(per_domain=per_domain)
    feed(clipper, [1.0] * 7)
    clipper.on_domain_start(None, None)  # type: ignore[arg-type]
    assert float(clipper.state["statistics"][0]) == (0 if per_domain else 7)  # type: ignore[index]


def test_an_infinite_threshold_is_off() -> None:
    clipper = ZClip(threshold=math.inf, warmup=1)
    assert feed(clipper, [1.0, 1.0, 99.0]) == [1.0, 1.0, 99.0]
    assert not clipper.touches_training(0)
    assert ZClip().touches_training(0)


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": math.nan}, {"decay": 1.0}, {"warmup": 0}], ids=str
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=next(iter(options))):
        ZClip(**options)

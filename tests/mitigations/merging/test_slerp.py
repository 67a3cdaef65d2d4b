"""SLERP: exact ends, and on the arc between them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from residency.core.errors import UserError
from residency.mitigations import SLERP, Mitigation
from residency.mitigations.merging.slerp import slerp, slerp_merge, slerp_weights
from support.two_stages import equal, randn, two_stages

ALPHAS = pytest.mark.parametrize("alpha", [0.1, 0.25, 0.5, 0.8])


def unit(seed: int) -> torch.Tensor:
    vector = randn(30, seed=seed)
    return vector / vector.norm()


def test_the_ends_are_the_very_tensors() -> None:
    a, b = unit(0), unit(1)
    assert slerp(a, b, alpha=0.0) is a
    assert slerp(a, b, alpha=1.0) is b


@ALPHAS
def test_of_unit_vectors_every_point_is_one(alpha: float) -> None:
    """And it divides the angle; the straight line would be shorter."""
    a, b = unit(0), unit(1)
    found = slerp(a, b, alpha=alpha)
    assert float(found.norm()) == pytest.approx(1.0, abs=1e-6)
    angle, part = (float(torch.arccos((a * x).sum())) for x in (b, found))
    assert part == pytest.approx(alpha * angle, abs=1e-4)
    assert float(torch.lerp(a, b, alpha).norm()) < 0.97


def test_of_orthogonal_vectors_the_middle_is_known() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    torch.testing.assert_close(slerp(a, b, alpha=0.5), torch.full((2,), 0.5**0.5))


@ALPHAS
def test_nearly_parallel_is_a_straight_line(alpha: float) -> None:
    a = unit(0)
    for b in (a, 3 * a, -a, a + 1e-3 * unit(1), torch.zeros(30)):
        assert slerp_weights(a, b, alpha=alpha) == (1 - alpha, alpha)
        assert torch.isfinite(slerp(a, b, alpha=alpha)).all()
    assert slerp_weights(a, unit(1), alpha=alpha) != (1 - alpha, alpha)


def test_names_have_arcs_of_their_own() -> None:
    base = {"a": randn(30), "b": randn(30, seed=5)}
    one, two = ({n: base[n] + unit(k + i) for i, n in enumerate(base)} for k in (1, 3))
    found = slerp_merge(base, one, two, alpha=0.4)
    for name in base:
        wanted = base[name] + slerp(one[name] - base[name], two[name] - base[name], alpha=0.4)
        torch.testing.assert_close(found[name], wanted)
        assert float((found[name] - base[name]).norm()) == pytest.approx(1.0, abs=1e-5)
    assert slerp_merge(base, one, two, alpha=0.0) is one
    assert slerp_merge(base, one, two, alpha=1.0) is two


def undo() -> Mitigation:
    return SLERP(alpha=0.0)


def middle() -> Mitigation:
    return SLERP(alpha=0.5)


def test_alpha_zero_undoes_a_stage(llama: Path) -> None:
    plain, run = two_stages(llama, "lora"), two_stages(llama, "lora", undo)
    assert equal(run.weights[0], plain.weights[0])
    assert equal(run.weights[1], plain.weights[0])


def test_in_a_stream_it_goes_along_the_arc(llama: Path) -> None:
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", middle)
    start = {name: leaf.detach() for name, leaf in run.module.backbone.load().named_parameters()}
    bent = 0
    for name, merged in run.weights[1].items():
        one, two = (weights[name] - start[name] for weights in plain.weights)
        torch.testing.assert_close(merged, start[name] + slerp(one, two, alpha=0.5), rtol=0, atol=1e-6)
        bent += slerp_weights(one, two, alpha=0.5) != (0.5, 0.5)
    assert bent > 5


@pytest.mark.parametrize("alpha", [-0.1, 1.1, float("nan")])
def test_a_share_outside_of_its_range_is_refused(alpha: float) -> None:
    with pytest.raises(UserError, match="alpha="):
        SLERP(alpha=alpha)

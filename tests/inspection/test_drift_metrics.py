"""Drift of weights, representations and outputs against dense computations and closed forms (C8 of the spec)."""

from __future__ import annotations

import math

import pytest
import torch

from residency.inspection.drift_metrics import (
    dense_drift,
    functional_drift,
    kl_from_top,
    kl_tokens,
    linear_cka,
    low_rank_cosine,
    low_rank_drift,
    low_rank_inner,
    low_rank_singular_values,
    parametric_drift,
    spectral_norm,
    top_log_probabilities,
)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factors(seed: int, out: int = 40, r: int = 4, width: int = 25) -> tuple[torch.Tensor, torch.Tensor]:
    return draw(out, r, seed=seed), draw(r, width, seed=seed + 100)


# -- weights: C8 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(40, 4, 25), (3, 8, 25), (40, 8, 5), (6, 6, 6)])
def test_factors_give_the_singular_values_of_their_product(shape: tuple[int, int, int]) -> None:
    out, r, width = shape
    left, right = factors(1, out, r, width)
    dense = torch.linalg.svdvals(left @ right)[: min(shape)]
    assert torch.allclose(low_rank_singular_values(left, right), dense, atol=1e-12)


def test_norms_of_a_lora_update() -> None:
    b, a = factors(2)
    s = 1.7
    drift = low_rank_drift(s * b, a)
    dense = s * b @ a
    assert drift.frobenius == pytest.approx(float(dense.norm()), rel=1e-12)
    assert drift.frobenius**2 == pytest.approx(float(s**2 * torch.trace(b.T @ b @ a @ a.T)), rel=1e-12)
    assert drift.spectral == pytest.approx(float(torch.linalg.matrix_norm(dense, 2)), rel=1e-12)
    assert drift.stable_rank == pytest.approx((drift.frobenius / drift.spectral) ** 2)
    assert 1 <= drift.stable_rank <= 4
    same = dense_drift(dense)
    assert (same.frobenius, same.spectral) == pytest.approx((drift.frobenius, drift.spectral), rel=1e-4)


def test_a_rank_one_update_has_stable_rank_one() -> None:
    assert low_rank_drift(draw(30, 1), draw(1, 20)).stable_rank == pytest.approx(1.0)
    nothing = low_rank_drift(torch.zeros(30, 4), draw(4, 20))
    assert (nothing.frobenius, nothing.spectral) == (0, 0)
    assert math.isnan(nothing.stable_rank)
    assert math.isnan(dense_drift(torch.zeros(4, 4)).stable_rank)


def test_cosine_of_updates() -> None:
    one, two = factors(3), factors(4)
    dense = torch.nn.functional.cosine_similarity((one[0] @ one[1]).ravel(), (two[0] @ two[1]).ravel(), 0)
    assert low_rank_cosine(one, two) == pytest.approx(float(dense), abs=1e-12)
    assert low_rank_inner(one, two) == pytest.approx(float(((one[0] @ one[1]) * (two[0] @ two[1])).sum()), rel=1e-9)
    assert low_rank_cosine(one, (-3 * one[0], one[1])) == pytest.approx(-1.0)
    # The gauge of a factorisation does not matter.
    g = draw(4, 4, seed=9)
    assert low_rank_cosine(one, (one[0] @ g, torch.linalg.inv(g) @ one[1])) == pytest.approx(1.0)
    assert math.isnan(low_rank_cosine(one, (torch.zeros(40, 4), two[1])))
    # The update of a stage is a difference of products, which is a product of twice the rank.
    step = (torch.cat([one[0], -two[0]], 1), torch.cat([one[1], two[1]], 0))
    assert low_rank_drift(*step).frobenius == pytest.approx(float((one[0] @ one[1] - two[0] @ two[1]).norm()))


def test_dense_updates() -> None:
    w = draw(30, 50)
    exact = float(torch.linalg.matrix_norm(w, 2))
    assert dense_drift(w).spectral == pytest.approx(exact, rel=1e-7)
    assert dense_drift(w.T).spectral == pytest.approx(exact, rel=1e-7)
    wide = draw(300, 500)
    exact, bound = float(torch.linalg.matrix_norm(wide, 2)), spectral_norm(wide, exact_up_to=100)
    assert 0.99 * exact <= bound <= exact * (1 + 1e-12)
    assert spectral_norm(torch.zeros(3, 3)) == 0.0
    bias = draw(7)
    assert dense_drift(bias).frobenius == dense_drift(bias).spectral == pytest.approx(float(bias.norm()))


# -- backbone ---------------------------------------------------------------------------------------------------------


def test_a_frozen_backbone_drifts_by_exactly_nothing() -> None:
    w = draw(8, 8).float()
    assert parametric_drift(w, w.clone())[0] == 0.0
    moved, size = parametric_drift(1.5 * w, w)
    assert 100 * math.sqrt(moved / size) == pytest.approx(50.0)
    assert functional_drift(now=2.31, before=2.31) == 0.0
    assert functional_drift(now=2.2, before=2.0) == pytest.approx(10.0)
    assert math.isnan(functional_drift(now=1.0, before=0.0))


# -- representations --------------------------------------------------------------------------------------------------


def test_cka_is_blind_to_rotation_shift_and_scale() -> None:
    h = draw(200, 30)
    rotation = torch.linalg.qr(draw(30, 30, seed=5)).Q
    assert linear_cka(h, h) == pytest.approx(1.0)
    assert linear_cka(h, 7.0 * h @ rotation + 3.0) == pytest.approx(1.0, abs=1e-9)
    other = draw(200, 12, seed=6)
    assert linear_cka(h, other) == pytest.approx(linear_cka(other, h))
    assert linear_cka(h.float() * 1e-4, other.float()) == pytest.approx(linear_cka(h, other), abs=1e-4)


@pytest.mark.parametrize(("n", "d"), [(100, 400), (400, 50)])
def test_unrelated_representations_have_no_similarity_whatever_their_width(n: int, d: int) -> None:
    """The plain estimator calls random data similar when d > n; the debiased one does not."""
    x, y = draw(n, d), draw(n, d, seed=1)
    centred = [h - h.mean(0) for h in (x, y)]
    k, m = (h @ h.T for h in centred)
    plain = float((k * m).sum() / (k.norm() * m.norm()))
    assert abs(linear_cka(x, y)) < 0.05
    if d > n:
        assert plain > 0.7


def test_cka_falls_with_noise() -> None:
    h = draw(150, 20)
    values = [linear_cka(h, h + noise * draw(150, 20, seed=2)) for noise in (0.0, 0.3, 1.0, 3.0)]
    assert values == sorted(values, reverse=True)
    assert math.isnan(linear_cka(h, torch.ones(150, 3)))
    with pytest.raises(ValueError, match="same tokens"):
        linear_cka(h, h[:-1])


# -- output distributions ---------------------------------------------------------------------------------------------


def test_kl_equals_torch_distributions() -> None:
    p, q = draw(9, 50), 2 * draw(9, 50, seed=1)
    expected = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
    )
    assert torch.allclose(kl_tokens(p, q), expected)
    assert kl_tokens(p, p + 3.0).max() < 1e-12
    assert not torch.allclose(kl_tokens(p, q), kl_tokens(q, p))


def test_kl_from_the_top_is_a_lower_bound_that_becomes_exact() -> None:
    p, q = 3 * draw(9, 50), 3 * draw(9, 50, seed=1)
    whole = kl_tokens(p, q)
    last = torch.zeros(9, dtype=torch.float64)
    for k in (1, 5, 20, 49):
        part = kl_from_top(*top_log_probabilities(p, k=k), q)
        assert (part <= whole + 1e-9).all()
        # Splitting a bucket cannot make distributions more alike.
        assert (part >= last - 1e-9).all()
        last = part
    assert torch.allclose(kl_from_top(*top_log_probabilities(p, k=500), q), whole)
    assert float(kl_from_top(*top_log_probabilities(50 * p, k=3), 50 * p).max()) < 1e-9

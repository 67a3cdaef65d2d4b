"""Divergences between teacher and student: closed forms, buckets, and who gets a gradient."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from residency.mitigations.distillation.divergences import buckets, distillation_loss, generalised_jsd, top_log_probs

M, V = 5, 11


def random_logits(seed: int, *, scale: float = 2.0) -> Tensor:
    return scale * torch.randn(M, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(loss: Tensor, leaf: Tensor) -> Tensor:
    return torch.autograd.grad(loss, leaf)[0]


def written_out(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """τ² KL(teacher || student) by torch."""
    log_s, log_t = (F.log_softmax(z / temperature, -1) for z in (student, teacher))
    return temperature**2 * F.kl_div(log_s, log_t, log_target=True, reduction="batchmean")


@pytest.mark.parametrize("temperature", [0.7, 1.0, 2.0])
def test_distillation_is_forward_kl_with_its_closed_gradient(temperature: float) -> None:
    """∂/∂z_s = λ τ (p_s - p_t) / n, also behind a factor; nothing reaches the teacher."""
    student, teacher = random_logits(0).requires_grad_(), random_logits(1).requires_grad_()
    loss = distillation_loss(student, teacher, temperature=temperature)
    torch.testing.assert_close(loss, written_out(student, teacher, temperature))
    other = written_out(teacher, student, temperature)
    assert not torch.isclose(loss, other, rtol=1e-3), "the other direction is another number"
    (3 * loss).backward()
    p_s, p_t = (F.softmax(z.detach() / temperature, -1) for z in (student, teacher))
    torch.testing.assert_close(student.grad, 3 * temperature * (p_s - p_t) / M)
    assert teacher.grad is None
    assert torch.autograd.gradcheck(lambda z: distillation_loss(z, teacher.detach(), temperature=temperature), student)


def test_equal_distributions_cost_nothing_and_pull_nowhere() -> None:
    for logits in (random_logits(0), random_logits(0).float(), random_logits(0).bfloat16()):
        student = logits.clone().requires_grad_()
        loss = distillation_loss(student, logits, temperature=2.0)
        assert float(loss.detach()) == 0
        pull = gradient(loss, student)
        assert pull.dtype == logits.dtype
        assert not pull.any()


def test_a_constant_on_all_logits_changes_nothing() -> None:
    student, teacher = random_logits(0), random_logits(1)
    shift = torch.arange(M, dtype=torch.float64)[:, None]
    wanted = distillation_loss(student, teacher, temperature=2.0)
    torch.testing.assert_close(distillation_loss(student + shift, teacher - 3 * shift, temperature=2.0), wanted)


def test_the_gradient_keeps_its_size_as_the_temperature_grows() -> None:
    """With τ², λ means the same at every temperature: the limit is (z_s - z_t) / V for centred logits."""
    student, teacher = (z - z.mean(-1, keepdim=True) for z in (random_logits(0), random_logits(1)))
    student.requires_grad_()
    pull = gradient(distillation_loss(student, teacher, temperature=1e5), student)
    torch.testing.assert_close(pull, (student.detach() - teacher) / (V * M), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("strength", [0.3, 4.0])
def test_the_minimum_lies_between_teacher_and_labels(strength: float) -> None:
    """C6: labels y and a teacher p_t pull a model to (y + λ p_t) / (1 + λ): there the gradient of the sum is 0."""
    teacher = random_logits(1)
    labels = F.one_hot(torch.arange(M) % V, V).double()
    best = (labels + strength * F.softmax(teacher, -1)) / (1 + strength)
    student = best.log().requires_grad_()
    task = F.cross_entropy(student, labels)
    loss = task + strength * distillation_loss(student, teacher, temperature=1.0)
    assert gradient(loss, student).abs().max() < 1e-12


def test_the_mean_squared_error_interpolates_too() -> None:
    """C6 on a linear model: near equal logits the divergence is half a squared distance, and least squares between
    labels and teacher ends at (y + λ ŷ) / (1 + λ)."""
    base, strength, small = random_logits(0), 2.5, 1e-4
    y, teacher = base + small * random_logits(1), base + small * random_logits(2)
    student = ((y + strength * teacher) / (1 + strength)).requires_grad_()
    both = distillation_loss(student, y, temperature=1.0) + strength * distillation_loss(
        student, teacher, temperature=1.0
    )
    there = gradient(both, student).abs().max()
    elsewhere = gradient(distillation_loss(student, y, temperature=1.0), student).abs().max()
    assert there < 1e-3 * elsewhere


# --- the k likeliest tokens and a bucket for the rest ----------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 4, V - 1])
def test_top_k_is_the_divergence_of_the_buckets(k: int) -> None:
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    top, ids = top_log_probs(teacher, k=k, temperature=2.0)
    assert torch.equal(ids, teacher.topk(k, -1).indices)
    loss = distillation_loss(student, top, temperature=2.0, ids=ids)
    coarse_s, coarse_t = buckets(student / 2.0, ids), buckets(teacher / 2.0, ids)
    wanted = 4.0 * F.kl_div(coarse_s, coarse_t, log_target=True, reduction="batchmean")
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(gradient(loss, student), gradient(wanted, student))


def test_top_k_grows_to_the_whole_divergence() -> None:
    student, teacher = random_logits(0).requires_grad_(), random_logits(1)
    whole = distillation_loss(student, teacher, temperature=2.0)
    losses = []
    for k in range(1, V + 1):
        top, ids = top_log_probs(teacher, k=k, temperature=2.0)
        losses.append(distillation_loss(student, top, temperature=2.0, ids=ids))
    assert all(a <= b + 1e-12 for a, b in pairwise(losses)), "merging tokens can only hide a difference"
    torch.testing.assert_close(losses[-1], whole)
    torch.testing.assert_close(gradient(losses[-1], student), gradient(whole, student))


def test_top_k_of_an_equal_student_pulls_nowhere() -> None:
    student = random_logits(0).float().requires_grad_()
    top, ids = top_log_probs(student.detach(), k=3, temperature=2.0)
    loss = distillation_loss(student, top, temperature=2.0, ids=ids)
    assert abs(float(loss.detach())) < 1e-6
    assert gradient(loss, student).abs().max() < 1e-6


def test_a_student_that_is_sure_does_not_break_the_tail() -> None:
    """All of the student's mass on one token: no nan, no inf, and the tail is pulled up."""
    sure = torch.zeros(1, V)
    sure[0, 0] = 200.0
    sure.requires_grad_()
    teacher = torch.zeros(1, V)
    top, ids = top_log_probs(teacher, k=2, temperature=1.0)
    loss = distillation_loss(sure, top, temperature=1.0, ids=ids)
    pull = gradient(loss, sure)
    assert torch.isfinite(loss)
    assert torch.isfinite(pull).all()
    assert pull[0, 0] > 0


@pytest.mark.parametrize("k", [None, 1, 3, V])
def test_buckets_sum_to_one(k: int | None) -> None:
    logits = random_logits(0).requires_grad_()
    ids = None if k is None else random_logits(1).topk(k, -1).indices
    parts = buckets(logits, ids)
    assert parts.shape == (M, V if k in (None, V) else k + 1)  # type: ignore[operator]
    torch.testing.assert_close(parts.exp().sum(-1), torch.ones(M, dtype=torch.float64))
    assert torch.isfinite(gradient(parts.sum(), logits)).all()


def test_impossible_tokens_do_not_poison_the_rest() -> None:
    """A vocabulary that was padded for speed has logits of minus infinity."""
    logits = random_logits(0)
    logits[:, -2:] = -torch.inf
    teacher = random_logits(1)
    teacher[:, -2:] = -torch.inf
    student = logits.requires_grad_()
    for loss in (
        distillation_loss(student, teacher, temperature=2.0),
        generalised_jsd(buckets(teacher, None), buckets(student, None), alpha=0.5).mean(),
    ):
        assert torch.isfinite(loss)
        assert torch.isfinite(gradient(loss, student)).all()


# --- generalised Jensen-Shannon --------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.2, 0.5, 1.0])
def test_exchanging_teacher_and_student_exchanges_alpha(alpha: float) -> None:
    teacher, student = buckets(random_logits(0), None), buckets(random_logits(1), None)
    forward = generalised_jsd(teacher, student, alpha=alpha)
    assert (forward > 0).all()
    torch.testing.assert_close(forward, generalised_jsd(student, teacher, alpha=1 - alpha))
    if alpha != 0.5:
        assert not torch.allclose(forward, generalised_jsd(student, teacher, alpha=alpha))


def test_the_ends_are_the_two_divergences() -> None:
    teacher, student = buckets(random_logits(0), None), buckets(random_logits(1), None)
    wanted = {
        0.0: F.kl_div(student, teacher, log_target=True, reduction="none").sum(-1),
        1.0: F.kl_div(teacher, student, log_target=True, reduction="none").sum(-1),
    }
    for alpha, value in wanted.items():
        torch.testing.assert_close(generalised_jsd(teacher, student, alpha=alpha), value)
        # Near an end the divergence is the other one times the small weight: the ends are what it is proportional to.
        near = abs(alpha - 1e-6)
        torch.testing.assert_close(generalised_jsd(teacher, student, alpha=near) / 1e-6, value, rtol=1e-3, atol=0)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_jsd_of_equal_distributions_is_flat(alpha: float) -> None:
    student = random_logits(0).requires_grad_()
    loss = generalised_jsd(buckets(student.detach(), None), buckets(student, None), alpha=alpha).mean()
    assert abs(float(loss.detach())) < 1e-12
    assert gradient(loss, student).abs().max() < 1e-12


def test_jsd_matches_scipy() -> None:
    """At α = 1/2 it is the Jensen-Shannon divergence, the square of scipy's distance."""
    from scipy.spatial.distance import jensenshannon

    teacher, student = buckets(random_logits(0), None), buckets(random_logits(1), None)
    wanted = [jensenshannon(t, s) ** 2 for t, s in zip(teacher.exp().numpy(), student.exp().numpy(), strict=True)]
    torch.testing.assert_close(generalised_jsd(teacher, student, alpha=0.5), torch.tensor(wanted, dtype=torch.float64))


@pytest.mark.parametrize("seed", range(4))
def test_a_cache_of_all_tokens_has_no_rest(seed: int) -> None:
    """In float32 the kept mass is 1 but for rounding, and that is no probability of a token that there is not."""
    student, teacher = (torch.randn(6, 257, generator=torch.Generator().manual_seed(s)) for s in (seed, seed + 9))
    student = (teacher + 0.1 * student).requires_grad_()
    kept, ids = top_log_probs(teacher, k=257, temperature=2.0)
    whole = distillation_loss(student, teacher, temperature=2.0)
    cached = distillation_loss(student, kept, temperature=2.0, ids=ids)
    torch.testing.assert_close(cached, whole, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(gradient(cached, student), gradient(whole, student), rtol=1e-4, atol=1e-7)

"""The Fisher information of linear models in closed form, by every way of estimating it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residency.core.batching import make_batch
from residency.core.types import Batch, Example
from residency.mitigations.penalties.fisher import (
    batch_fisher_diagonal,
    completions,
    data_losses,
    draw_tokens,
    fisher_diagonal,
    one_per_token,
    sampled_losses,
    true_fisher_diagonal,
)


class Readout(nn.Module):
    """A linear layer on a table of features: the prompt is the row, the completion the class or the target."""

    def __init__(self, features: Tensor, classes: int) -> None:
        super().__init__()
        self.features = features
        self.layer = nn.Linear(features.shape[1], classes, bias=False, dtype=features.dtype)

    def outputs(self, batch: Batch) -> Tensor:
        return self.layer(self.features[batch.input_ids]).flatten(0, 1)[batch.target_at]

    def nll(self, batch: Batch) -> Tensor:
        return F.cross_entropy(self.outputs(batch), batch.targets, reduction="none")

    def fisher(self, pairs: Sequence[tuple[int, int]], losses: Callable[[Batch], Tensor], *, size: int) -> Tensor:
        """Of (prompt, completion) pairs in batches of one size."""
        examples = [Example.of(domain="d", row=str(i), prompt=(x,), completion=(y,)) for i, (x, y) in enumerate(pairs)]
        batches = [make_batch(examples[i : i + size], layout="packed") for i in range(0, len(examples), size)]
        return fisher_diagonal(self, {"layer.weight": self.layer.weight}, batches, losses)["layer.weight"]


@pytest.mark.parametrize("size", [1, 8, 50])
def test_fisher_of_a_linear_softmax_model(size: int) -> None:
    """(p_c - y_c)² x_j², averaged over examples."""
    torch.manual_seed(0)
    model = Readout(torch.randn(20, 6, dtype=torch.float64), classes=4)
    pairs = [(i % 20, (i * i) % 4) for i in range(50)]
    x = model.features[[row for row, _ in pairs]]
    y = F.one_hot(torch.tensor([label for _, label in pairs]), 4)
    errors = model.layer(x).softmax(-1).detach() - y
    wanted = torch.einsum("nc,nj->cj", errors**2, x**2) / 50
    torch.testing.assert_close(model.fisher(pairs, model.nll, size=size).double(), wanted, rtol=1e-5, atol=0)


def test_fisher_of_logistic_regression() -> None:
    """Labels as frequent as the model says them: the data's Fisher is the model's own, E[p (1 - p) x²]."""
    x = torch.tensor([[2.0, 1.0], [1.0, -3.0], [-1.0, 0.5]], dtype=torch.float64)
    model = Readout(x, classes=2)
    # The difference of the logits is ± ln 3, so one class has p = 1/4 and three labels in four are the other.
    w = torch.linalg.solve(x[:2], torch.tensor([math.log(3), -math.log(3)], dtype=torch.float64))
    with torch.no_grad():
        model.layer.weight.copy_(torch.stack([torch.zeros_like(w), w]))
    pairs = [(0, label) for label in (1, 1, 1, 0)] + [(1, label) for label in (0, 0, 0, 1)]
    wanted = (0.25 * 0.75 * x[:2] ** 2).mean(0)
    for row in model.fisher(pairs, model.nll, size=4).double():
        torch.testing.assert_close(row, wanted, rtol=1e-5, atol=0)


def test_gradients_are_squared_before_they_are_averaged() -> None:
    """C13: where noise dominates, the square of a batch's mean gradient is F / B; ours does not know the batch size."""
    torch.manual_seed(0)
    count, noise = 1024, torch.randn(1024, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    model = Readout(torch.ones(1, 1, dtype=torch.float64), classes=1)
    nn.init.constant_(model.layer.weight, 0.1)

    def losses(batch: Batch) -> Tensor:
        return 0.5 * (model.outputs(batch)[:, 0] - noise[batch.targets]) ** 2

    trap = {b: float((0.1 - noise).view(-1, b).mean(1).square().mean()) for b in (1, 8, 64)}
    assert trap == pytest.approx({1: 1.01, 8: 0.14, 64: 0.026}, rel=0.25)
    for size in trap:
        found = model.fisher([(0, i) for i in range(count)], losses, size=size)
        assert float(found) == pytest.approx(1.01, rel=1e-5)


def test_a_fisher_information_needs_examples() -> None:
    with pytest.raises(ValueError, match="at least one example"):
        fisher_diagonal(nn.Linear(1, 1), {}, [], lambda batch: torch.zeros(0))


# --- other labels, other gradients ------------------------------------------------------------------------------------


def softmax_model() -> Readout:
    torch.manual_seed(0)
    return Readout(torch.randn(20, 6, dtype=torch.float64), classes=4)


def rows(pairs: Sequence[tuple[int, ...]], domain: str = "d") -> list[Example]:
    return [Example.of(domain=domain, row=str(i), prompt=(x,), completion=tuple(y)) for i, (x, *y) in enumerate(pairs)]


def packed(examples: Sequence[Example]) -> Batch:
    return make_batch(examples, layout="packed")


def own_fisher(model: Readout, x: Tensor) -> Tensor:
    """E[p_c (1 - p_c) x_j²]: the model's own information, whatever the labels are."""
    p = model.layer(x).softmax(-1).detach()
    return torch.einsum("nc,nj->cj", p * (1 - p), x**2) / len(x)


def of(model: Readout) -> dict[str, Tensor]:
    return {"layer.weight": model.layer.weight}


def test_true_fisher_sums_over_labels_and_ignores_the_data() -> None:
    model = softmax_model()
    wanted = own_fisher(model, model.features)
    for label in (0, 3):
        examples = rows([(i, label) for i in range(20)])
        labels = [(c,) for c in range(4)]
        found = true_fisher_diagonal(model, of(model), examples, labels, data_losses(model.outputs), packed)
        torch.testing.assert_close(found["layer.weight"].double(), wanted, rtol=1e-5, atol=1e-9)


def test_true_fisher_of_some_labels_is_that_of_the_model_restricted_to_them() -> None:
    model = softmax_model()
    p = model.layer(model.features)[:, :2].softmax(-1).detach()
    wanted = torch.einsum("nc,nj->cj", p * (1 - p), model.features**2) / 20
    examples = rows([(i, 0) for i in range(20)])
    found = true_fisher_diagonal(model, of(model), examples, [(0,), (1,)], data_losses(model.outputs), packed)
    torch.testing.assert_close(found["layer.weight"][:2].double(), wanted, rtol=1e-5, atol=1e-9)
    assert float(found["layer.weight"][2:].abs().max()) < 1e-9


def test_sampled_fisher_is_the_true_one_on_average() -> None:
    model = softmax_model()
    examples = rows([(i % 20, 0) for i in range(4000)])
    losses = sampled_losses(model.outputs, seed=0, stage=0)
    batches = [packed(examples[k : k + 500]) for k in range(0, 4000, 500)]
    found = fisher_diagonal(model, of(model), batches, losses)["layer.weight"].double()
    wanted = own_fisher(model, model.features)
    assert float((found - wanted).norm() / wanted.norm()) < 0.05


def test_sampled_labels_are_a_function_of_seed_stage_and_row() -> None:
    model = softmax_model()
    examples = rows([(i % 20, 0, 1) for i in range(30)])

    def fisher(size: int, seed: int = 0, stage: int = 0) -> Tensor:
        losses = sampled_losses(model.outputs, seed=seed, stage=stage)
        batches = [packed(examples[k : k + size]) for k in range(0, 30, size)]
        return fisher_diagonal(model, of(model), batches, losses)["layer.weight"]

    state = torch.get_rng_state()
    one, eight = fisher(1), fisher(8)
    torch.testing.assert_close(one, eight, rtol=1e-5, atol=0)
    assert torch.equal(eight, fisher(8))
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.allclose(eight, fisher(8, seed=1))
    assert not torch.allclose(eight, fisher(8, stage=1))


def test_tokens_are_drawn_as_often_as_they_are_likely() -> None:
    logits = torch.tensor([0.1, 0.0, 0.6, 0.3, 0.0]).log().expand(2000, 5)
    drawn = draw_tokens(logits, torch.arange(2000) / 2000)
    assert torch.bincount(drawn, minlength=5).tolist() == pytest.approx([200, 0, 1200, 600, 0], abs=1)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_batch_fisher_is_the_trap(size: int) -> None:
    """C13 again: ≈ 1 / 0.14 / 0.026 of the per-example value, which is what reproducing published code takes."""
    torch.manual_seed(0)
    noise = torch.randn(1024, dtype=torch.float64)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    model = Readout(torch.ones(1, 1, dtype=torch.float64), classes=1)
    nn.init.constant_(model.layer.weight, 0.1)

    def losses(batch: Batch) -> Tensor:
        return 0.5 * (model.outputs(batch)[:, 0] - noise[batch.targets]) ** 2

    examples = rows([(0, i) for i in range(1024)])
    batches = [packed(examples[k : k + size]) for k in range(0, 1024, size)]
    found = batch_fisher_diagonal(of(model), batches, losses)["layer.weight"]
    assert float(found) == pytest.approx({1: 1.01, 8: 0.14, 64: 0.026}[size], rel=0.25)


def test_one_per_token_keeps_what_stands_before_a_token() -> None:
    (example,) = rows([(7, 1, 2, 3)])
    split = list(one_per_token([example]))
    assert [(e.prompt, e.completion) for e in split] == [((7,), (1,)), ((7, 1), (2,)), ((7, 1, 2), (3,))]
    assert {e.row for e in split} == {example.row}


def test_token_fisher_squares_every_token() -> None:
    """Where a token depends on the one before it alone, the sum over tokens is that of single rows."""
    model = softmax_model()
    examples = rows([(5, 1, 2), (3, 0, 1)])
    single = list(one_per_token(examples))
    found = fisher_diagonal(model, of(model), [packed(single)], data_losses(model.outputs))["layer.weight"]
    pairs = [(5, 1), (1, 2), (3, 0), (0, 1)]
    x = model.features[[row for row, _ in pairs]]
    errors = model.layer(x).softmax(-1).detach() - F.one_hot(torch.tensor([y for _, y in pairs]), 4)
    wanted = torch.einsum("nc,nj->cj", errors**2, x**2) / 4
    torch.testing.assert_close(found.double(), wanted, rtol=1e-5, atol=0)
    whole = fisher_diagonal(model, of(model), [packed(examples)], data_losses(model.outputs))["layer.weight"]
    assert not torch.allclose(whole.double(), 2 * wanted), "cross terms of tokens are part of the sequence's"


def test_labels_are_distinct_and_in_order() -> None:
    examples = rows([(1, 5), (2, 6), (3, 5)])
    assert completions(examples) == [(5,), (6,)]

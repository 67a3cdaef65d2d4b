"""Elastic weight consolidation (Kirkpatrick et al. 2017): a quadratic pull towards what earlier domains need.

    L = L_t + λ/2 · Σ_i F_i (θ_i - θ*_i)²

F is the diagonal of the empirical Fisher information: the mean over examples of the squared gradient of
log p(completion | prompt), summed over the completion's tokens. Gradients are squared per example: squaring the mean
gradient of a batch of B noise-dominated examples gives about F / B.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from residency.batching import by_token_budget, make_batch
from residency.domains.sampler import learned_examples
from residency.errors import UserError
from residency.mitigations.base import Mitigation
from residency.objectives.sft import token_nll
from residency.per_example import ExampleLosses, per_example_gradients, supports_batched
from residency.randomness import permutation
from residency.tensors import snapshot
from residency.types import Batch, Capability, Example, Outputs, Stage, Tensors

if TYPE_CHECKING:
    from residency.module import ContinualModule

__all__ = ["EWC", "add_quadratics", "fisher_diagonal", "quadratic_penalty"]


class _Quadratic(torch.autograd.Function):
    # Its own backward: the gradient λ P (θ - θ*) is known, and autograd's version of it costs three more passes.
    @staticmethod
    def forward(ctx: Any, strength: float, count: int, *tensors: Tensor) -> Tensor:
        parameters, anchors, precisions = tensors[:count], tensors[count : 2 * count], tensors[2 * count :]
        distances = torch._foreach_sub(list(parameters), list(anchors))
        pulls = torch._foreach_mul(distances, list(precisions))
        torch._foreach_mul_(pulls, strength)
        ctx.pulls = pulls
        products = torch._foreach_mul(distances, pulls)
        return 0.5 * torch.stack([p.sum() for p in products]).sum()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Any, ...]:
        pulls = torch._foreach_mul(ctx.pulls, grad_outputs[0])
        return (None, None, *pulls, *[None] * (2 * len(pulls)))


def quadratic_penalty(parameters: Tensors, anchor: Tensors, precision: Tensors, *, strength: float) -> Tensor:
    """λ/2 Σ P (θ - θ*)².

    Args:
        parameters: θ, live leaves.
        anchor: θ*, same names and shapes.
        precision: P >= 0, same names and shapes.
        strength: λ.

    Returns:
        Scalar; its gradient with respect to θ is λ P (θ - θ*).
    """
    names = list(parameters)
    tensors = [*parameters.values(), *(anchor[n] for n in names), *(precision[n] for n in names)]
    penalty: Tensor = _Quadratic.apply(strength, len(names), *tensors)  # type: ignore[no-untyped-call]
    return penalty


def add_quadratics(
    first: tuple[Tensors, Tensors, Tensor], second: tuple[Tensors, Tensors]
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Σ_k P_k (θ - θ_k)² of any number of domains as ONE quadratic, exactly and in constant memory.

        P1 (θ - a)² + P2 (θ - b)² = (P1 + P2) (θ - c)² + P1 P2 / (P1 + P2) · (a - b)²,   c = (P1 a + P2 b) / (P1 + P2)

    Args:
        first: (precision, anchor, constant) so far.
        second: (precision, anchor) to add.

    Returns:
        (precision, anchor, constant); where both precisions are 0 the anchor is the second one.
    """
    precision, anchor, constant = first
    added, at = second
    total = {name: precision[name] + added[name] for name in added}
    share = {name: torch.where(total[name] > 0, added[name] / total[name], torch.ones_like(at[name])) for name in added}
    centre = {name: torch.lerp(anchor[name], at[name], share[name]) for name in added}
    rest = sum((precision[n] * share[n] * (anchor[n] - at[n]).square()).sum() for n in added)
    return total, centre, constant + rest


def fisher_diagonal(
    model: nn.Module, leaves: Tensors, batches: Iterable[Batch], losses: ExampleLosses
) -> dict[str, Tensor]:
    """Mean over examples of the squared gradient of one example's loss.

    Args:
        model: Owner of the leaves, in evaluation mode (no dropout).
        leaves: θ by name.
        batches: Any grouping of the examples; the result does not depend on it.
        losses: Batch -> (B,) negative log-likelihoods.

    Returns:
        F >= 0 by name, float32.
    """
    fisher = {name: torch.zeros_like(leaf, dtype=torch.float32) for name, leaf in leaves.items()}
    count = 0
    batched: bool | None = None
    for batch in batches:
        if batched is None:
            batched = supports_batched(model, leaves, batch, losses)
        for name, gradients in per_example_gradients(model, leaves, batch, losses, batched=batched):
            fisher[name] += gradients.detach().float().square().sum(0)
        count += batch.size
    if count == 0:
        raise ValueError("a Fisher information needs at least one example, got none")
    return {name: value / count for name, value in fisher.items()}


class EWC(Mitigation):
    """Elastic weight consolidation.

    Args:
        strength: λ. The penalty is λ/2 Σ F (θ - θ*)², with F per sequence (summed over tokens). 0 = off.
        mode: `separate` keeps the sum of one quadratic per domain (exactly, in constant memory); `online` decays the
            past and keeps one anchor: F ← decay · F + F_t, θ* = θ_t (Schwarz et al. 2018).
        decay: γ of `online`, in [0, 1].
        fisher_samples: Examples of the finished domain on which F is estimated.
        batch_tokens: Tokens per pass of the estimate; changes memory, not the result.
    """

    requires: ClassVar[frozenset[Capability]] = frozenset({"fixed_coordinates"})
    instead: ClassVar[str] = "configs/mitigation/replay.yaml, or an adapter with persistent coordinates (lora, full)"
    training_only: ClassVar[frozenset[str]] = frozenset({"strength"})

    def __init__(
        self,
        *,
        strength: float = 1000.0,
        mode: Literal["separate", "online"] = "separate",
        decay: float = 1.0,
        fisher_samples: int = 64,
        batch_tokens: int = 256,
    ) -> None:
        super().__init__()
        if strength < 0 or not 0 <= decay <= 1 or fisher_samples < 1:
            raise UserError(
                f"EWC with strength={strength}, decay={decay}, fisher_samples={fisher_samples}",
                why="strength must be >= 0, decay in [0, 1], fisher_samples >= 1",
                fix="correct these values in model.mitigations",
            )
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.fisher_samples = fisher_samples
        self.batch_tokens = batch_tokens
        self.add_state("precision", {})
        self.add_state("anchor", {})
        self.add_state("constant", torch.zeros(()))

    def loss_terms(self, module: ContinualModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """The penalty; nothing before the first domain is finished."""
        precision, anchor, constant = self._quadratic()
        if not precision or self.strength == 0:
            return {}
        parameters = module.adapter.trainable(module.model)
        penalty = quadratic_penalty(parameters, anchor, precision, strength=self.strength)
        return {"penalty": penalty + 0.5 * self.strength * constant}

    def on_domain_end(self, module: ContinualModule, stage: Stage) -> None:
        """Estimate F at the final weights of the domain and add its quadratic."""
        leaves = module.adapter.trainable(module.model)
        examples = self._sample(learned_examples(module.dataset, stage.domain), stage)
        fisher = fisher_diagonal(module.model, leaves, self._batches(module, examples), _losses(module))
        anchor = snapshot(leaves)
        precision, old_anchor, constant = self._quadratic()
        if not precision:
            self.state.update(precision=fisher, anchor=anchor)
        elif self.mode == "online":
            decayed = {name: self.decay * precision[name] + fisher[name] for name in fisher}
            self.state.update(precision=decayed, anchor=anchor)
        else:
            total, centre, rest = add_quadratics((precision, old_anchor, constant), (fisher, anchor))
            self.state.update(precision=total, anchor=centre, constant=rest)

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def _quadratic(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        precision, anchor, constant = (self.state[key] for key in ("precision", "anchor", "constant"))
        assert isinstance(precision, dict)
        assert isinstance(anchor, dict)
        assert isinstance(constant, Tensor)
        return precision, anchor, constant

    def _sample(self, examples: Sequence[Example], stage: Stage) -> list[Example]:
        order = permutation(len(examples), stage.seed, "fisher", stage.index)
        return [examples[i] for i in order[: self.fisher_samples]]

    def _batches(self, module: ContinualModule, examples: Sequence[Example]) -> Iterable[Batch]:
        for group in by_token_budget(examples, tokens=self.batch_tokens):
            yield make_batch(group, layout=module.layout).to(module.device)


def _losses(module: ContinualModule) -> ExampleLosses:
    def losses(batch: Batch) -> Tensor:
        nll = token_nll(module.forward(batch), batch.targets)
        return nll.new_zeros(batch.size).index_add(0, batch.target_example, nll)

    return losses

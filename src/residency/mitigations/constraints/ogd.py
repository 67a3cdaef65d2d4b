"""Orthogonal gradient descent (Farajtabar et al. 2020): no step along what changes earlier outputs.

For stored examples of earlier domains the gradient of an output, taken once at the end of their domain, is kept and
made orthonormal (Gram-Schmidt over the whole flat vector θ of trainable coordinates). From then on

    Δθ <- Δθ - Qᵀ Q Δθ                                    so that to first order these outputs do not move

It is the UPDATE that is projected, weight decay included. The memory is (examples, coordinates): for adapters, not for
full fine-tuning of large models.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.batching import make_batch, wanted_targets
from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.types import Capability, Example, Stage, Tensors
from residency.domains.sampler import learned_examples
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.constraints.linear_maps import kept_share
from residency.mitigations.contract import StageModule

__all__ = ["OGD", "extend_basis", "project_out"]

# What is left of a vector, relative to its length, below which it says nothing new.
_NEW = 1e-4


def extend_basis(basis: Tensor, vectors: Tensor) -> Tensor:
    """Gram-Schmidt, twice per vector: once leaves rounding errors of the size of what was removed.

    Args:
        basis: (k, n) orthonormal rows.
        vectors: (m, n).

    Returns:
        (k', n) orthonormal rows, k <= k' <= k + m, the old ones first.
    """
    for vector in vectors:
        rest = vector
        for _ in range(2):
            rest = rest - basis.T @ (basis @ rest)
        if rest.norm() > _NEW * vector.norm():
            basis = torch.cat([basis, (rest / rest.norm())[None]])
    return basis


def project_out(step: Tensor, basis: Tensor, *, strength: float = 1.0) -> Tensor:
    """Δ - strength Qᵀ Q Δ.

    Args:
        step: (n,).
        basis: Q, (k, n) orthonormal rows.
        strength: Share that is removed, in [0, 1].
    """
    return step - strength * (basis.T @ (basis @ step))


class OGD(Mitigation):
    """Orthogonal gradient descent, on updates.

    Args:
        strength: Share of the forbidden part that is removed, in [0, 1]. 1 = the paper, 0 = off.
        examples: Stored gradients per domain, each as large as all trainable tensors in float32.
        output: What of an example must not move. `logit`: the summed logits of its own tokens, the paper's variant with
            ground-truth logits (OGD-GTL). `log_prob`: log p(completion | prompt), or
            what else the objective makes of one example.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"directions", "coordinates"})
    update_order: ClassVar[int] = 3
    requires: frozenset[Capability] = frozenset({"fixed_coordinates"})
    alternative: ClassVar[str] = "configs/mitigation/agem.yaml, or an adapter with persistent coordinates (lora, full)"
    training_only: ClassVar[frozenset[str]] = frozenset({"strength"})

    def __init__(
        self, *, strength: float = 1.0, examples: int = 16, output: Literal["logit", "log_prob"] = "logit"
    ) -> None:
        super().__init__()
        if not 0 <= strength <= 1 or examples < 1:
            raise UserError(
                f"OGD with strength={strength}, examples={examples}",
                why="strength is a share in [0, 1] (0 = off), and a domain is protected by at least one gradient",
                fix="use strength: 1.0 and examples: 16",
            )
        self.strength = strength
        self.examples = examples
        self.output = output
        self.add_state("basis", torch.zeros(0, 0))
        self.add_state("kept", torch.ones(()))

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Project the whole vector; nothing in the first domain."""
        basis = self._basis()
        if len(basis) == 0 or self.strength == 0:
            return after
        names = sorted(after)
        step = _flat([after[name] - before[name] for name in names])
        parts = project_out(step, basis, strength=self.strength).split([after[name].numel() for name in names])
        steps = {name: part.view_as(before[name]) for name, part in zip(names, parts, strict=True)}
        final = {name: before[name] + part.to(before[name].dtype) for name, part in steps.items()}
        self.state["kept"] = kept_share(before, after, final)
        return final

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Take the gradients of the domain's outputs into the basis."""
        learned = learned_examples(module.dataset, stage.domain)
        order = permutation(len(learned), stage.seed, "ogd", stage.index)
        chosen = module.objective.judged(module, [learned[i] for i in order[: self.examples]])
        gradients = torch.stack([self._gradient(module, example) for example in chosen])
        basis = self._basis()
        self.state["basis"] = extend_basis(basis if len(basis) else gradients[:0], gradients)

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def grows_by(self, trainable: int) -> int:
        """A float32 direction over all parameters per example."""
        return 4 * trainable * self.examples if self.strength else 0

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`directions`: in the basis; `kept`: share of the last update's norm."""
        kept = self.state["kept"]
        assert isinstance(kept, Tensor)
        return {"directions": float(len(self._basis())), "kept": float(kept)}

    def _gradient(self, module: StageModule, example: Example) -> Tensor:
        trainable = module.adapter.trainable(module.model)
        leaves = [trainable[name] for name in sorted(trainable)]
        batch = make_batch([example], layout=module.layout).to(module.device)
        if self.output == "logit":
            own = module.forward(batch).gather(1, batch.targets[:, None]).squeeze(1)
            value = own[wanted_targets(batch)].sum()
        else:
            value = -module.example_losses(batch).sum()
        gradients = torch.autograd.grad(value, leaves, allow_unused=True)
        return _flat([torch.zeros_like(p) if g is None else g for p, g in zip(leaves, gradients, strict=True)])

    def _basis(self) -> Tensor:
        basis = self.state["basis"]
        assert isinstance(basis, Tensor)
        return basis


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors])

"""Fisher-weighted merging (Matena and Raffel 2022): the mean in which every parameter counts as much as it matters."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from residency.core.batching import by_token_budget, make_batch
from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.tensors import remembered, snapshot
from residency.core.types import Capability, Tensors
from residency.domains.sampler import learned_examples
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import take_over
from residency.mitigations.penalties.fisher import fisher_diagonal
from residency.mitigations.penalties.quadratic import add_quadratics

__all__ = ["FisherMerge", "fisher_merge"]


def fisher_merge(
    first: tuple[Tensors, Tensors], second: tuple[Tensors, Tensors]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """θ = (F_1 θ_1 + F_2 θ_2) / (F_1 + F_2), and F = F_1 + F_2: merging one by one is merging all at once.

    Args:
        first: (F_1, θ_1).
        second: (F_2, θ_2); taken where both F are 0.

    Returns:
        (F, θ).
    """
    precision, merged, _ = add_quadratics((*first, torch.zeros(())), second)
    return precision, merged


class FisherMerge(Mitigation):
    """θ_t ← Σ_i F_i θ_i / Σ_i F_i over all stages so far, F_i the diagonal Fisher information of domain i at θ_i.

    The mode of the product of one Laplace approximation per domain, in the coordinates that train: for LoRA these are
    the factors A and B of the one adapter that all stages go on with, as for EWC, and not the updates B A, whose
    Fisher information would be as large as the backbone. Fisher information is estimated at, and the merge
    made of, the weights that the mixing before it gives.

    Args:
        past: Factor on the Fisher information of all earlier stages, >= 0. 0 = off, 1 = all count alike.
        fisher_samples: Examples of the finished domain on which F is estimated.
        batch_tokens: Tokens per pass of the estimate; changes memory, not the result.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    requires: frozenset[Capability] = frozenset({"averageable", "fixed_coordinates"})
    alternative: ClassVar[str] = (
        "configs/mitigation/weight_mixing.yaml, or an adapter with persistent coordinates (lora, full)"
    )

    def __init__(self, *, past: float = 1.0, fisher_samples: int = 64, batch_tokens: int = 256) -> None:
        super().__init__()
        if not past >= 0 or fisher_samples < 1:
            raise UserError(
                f"FisherMerge with past={past}, fisher_samples={fisher_samples}",
                why="past multiplies the information of earlier domains and is not negative; fisher_samples is >= 1",
                fix="give past: 1.0 and fisher_samples: 64",
            )
        self.past = past
        self.fisher_samples = fisher_samples
        self.batch_tokens = batch_tokens
        self.add_state("precision", {})
        self.add_state("merged", {})

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Estimate F at the trained weights, merge with all earlier stages."""
        if self.past == 0:
            return after
        precision, merged = self.state["precision"], self.state["merged"]
        assert isinstance(precision, dict)
        assert isinstance(merged, dict)
        leaves = module.adapter.trainable(module.model)
        take_over(module, after)
        fisher, tuned = self._fisher(module), remembered(leaves)
        if not precision:
            self.state.update(precision=fisher, merged=tuned)
            return after
        old = {name: self.past * value for name, value in precision.items()}
        total, centre = fisher_merge((old, merged), (fisher, tuned))
        self.state.update(precision=total, merged=centre)
        state = {**snapshot(module.adapter.state(module.model)), **centre}
        return module.adapter.weights(module.model, state)

    def remembers(self, trainable: int, index: int) -> int:
        """Precision and merged weights, float32, once a stage is finished."""
        return 8 * trainable if index else 0

    def own_tokens(self) -> int:
        """Of one pass of the estimate."""
        return self.batch_tokens

    def changes_weights(self, index: int) -> bool:
        """Not when off, and not after the first stage."""
        return self.past > 0 and index > 0

    def _fisher(self, module: StageModule) -> dict[str, Tensor]:
        leaves = module.adapter.trainable(module.model)
        examples = learned_examples(module.dataset, module.stage.domain)
        order = permutation(len(examples), module.stage.seed, "fisher", module.stage.index)
        chosen = module.objective.judged(module, [examples[i] for i in order[: self.fisher_samples]])
        batches = (
            make_batch(group, layout=module.layout).to(module.device)
            for group in by_token_budget(chosen, tokens=self.batch_tokens)
        )
        with torch.enable_grad():
            return fisher_diagonal(module.model, leaves, batches, module.example_losses)

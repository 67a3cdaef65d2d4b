"""Elastic weight consolidation (Kirkpatrick et al. 2017): a quadratic pull towards what earlier domains need.

    L = L_t + λ/2 · Σ_i F_i (θ_i - θ*_i)²

F is the diagonal of the Fisher information, `penalties.fisher`: of log p(completion | prompt) where a likelihood is
learnt, else the mean squared gradient of what the objective makes of one example. Codes that
leave out the 1/2 (mammoth, Avalanche) need half of the λ given here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.tensors import remembered
from residency.core.types import Batch, Capability, Example, Outputs, Stage, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.penalties.fisher import (
    batch_fisher_diagonal,
    data_losses,
    fisher_diagonal,
    one_per_token,
    sampled_losses,
    true_fisher_diagonal,
)
from residency.mitigations.penalties.per_example import ExampleLosses
from residency.mitigations.penalties.quadratic import add_quadratics, penalty_numbers, penalty_term, pulled_gradients
from residency.mitigations.penalties.sampling import batches_of, lay_out, pack_facts, sample_examples, stage_labels

__all__ = ["EWC"]


class EWC(Mitigation):
    """Elastic weight consolidation.

    The pull λ F (θ - θ*) is added to the gradients once per optimizer step; the value is logged as
    `loss/<name>/penalty`, and `<name>/distance` and `<name>/pull` (norms of θ - θ* and of the pull) beside it. A pull
    of a tenth of the gradient's norm up to all of it is where λ acts; sweep it by powers of ten.

    Args:
        strength: λ. The penalty is λ/2 Σ F (θ - θ*)², with F per sequence (summed over tokens). 0 = off.
        mode: `separate` keeps the sum of one quadratic per domain (exactly, in constant memory); `online` decays the
            past and keeps one anchor: F ← decay · F + F_t, θ* = θ_t (Schwarz et al. 2018).
        decay: γ of `online`, in [0, 1].
        fisher: `empirical`: the data's labels. `true`: all labels of a labelled domain, weighted by the model (any
            other domain is refused when its stage starts). `sampled`: one label drawn from the model. `batch`: the
            square of the mean gradient of a batch of the training's size, only to reproduce published code.
        granularity: `sequence` squares the gradient of a whole completion. `token` squares that of every token and
            sums: no cross terms between tokens, which are 0 on average under the model's own labels; a backward pass
            per token.
        fisher_samples: Examples of the finished domain on which F is estimated.
        batch_tokens: Tokens per pass of the estimate; changes memory, not the result.

    Raises:
        UserError: A value is out of range, or `token` is asked of what has no tokens to square.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"coordinates"})
    requires: frozenset[Capability] = frozenset({"fixed_coordinates"})
    alternative: ClassVar[str] = (
        "configs/mitigation/replay.yaml, or an adapter with persistent coordinates (lora, full)"
    )
    training_only: ClassVar[frozenset[str]] = frozenset({"strength"})

    def __init__(
        self,
        *,
        strength: float = 1000.0,
        mode: Literal["separate", "online"] = "separate",
        decay: float = 1.0,
        fisher: Literal["empirical", "true", "sampled", "batch"] = "empirical",
        granularity: Literal["sequence", "token"] = "sequence",
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
        if granularity == "token" and fisher in ("true", "batch"):
            raise UserError(
                f"EWC with fisher={fisher} and granularity=token",
                why="a label is a whole completion, and a batch's gradient is no token's",
                fix="set granularity to sequence, or fisher to empirical or sampled",
            )
        if fisher in ("true", "sampled") or granularity == "token":
            # They put other tokens in the place of those of the data: only a likelihood has such.
            self.follows = frozenset({"completion"})
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.fisher = fisher
        self.granularity = granularity
        self.fisher_samples = fisher_samples
        self.batch_tokens = batch_tokens
        self.add_state("precision", {})
        self.add_state("anchor", {})
        self.add_state("constant", torch.zeros(()))
        self.add_state("facts", pack_facts({}))

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """Refuse a domain without labels before it is learned."""
        if self.fisher == "true":
            stage_labels(module, stage, asked_by=f"{self.name}.fisher=true")

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """The penalty's value, for the log; nothing before the first domain is finished."""
        return penalty_term(module.adapter.trainable(module.model), self.state, strength=self.strength)

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Add the penalty's gradient."""
        return pulled_gradients(gradients, module.adapter.trainable(module.model), self.state, strength=self.strength)

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """How far the weights are from the anchor, and how hard they are pulled."""
        return penalty_numbers(module.adapter.trainable(module.model), self.state, strength=self.strength)

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Estimate F at the final weights of the domain and add its quadratic."""
        examples = sample_examples(module, stage, count=self.fisher_samples)
        fisher = self._estimate(module, stage, examples)
        anchor = remembered(module.adapter.trainable(module.model))
        precision, old_anchor, constant = (self.state[key] for key in ("precision", "anchor", "constant"))
        assert isinstance(precision, dict)
        assert isinstance(old_anchor, dict)
        assert isinstance(constant, Tensor)
        if not precision:
            self.state.update(precision=fisher, anchor=anchor)
        elif self.mode == "online":
            decayed = {name: self.decay * precision[name] + fisher[name] for name in fisher}
            self.state.update(precision=decayed, anchor=anchor)
        else:
            total, centre, rest = add_quadratics((precision, old_anchor, constant), (fisher, anchor))
            self.state.update(precision=total, anchor=centre, constant=rest)
        how = {"fisher": self.fisher, "granularity": self.granularity, "reduction": "sum", "mode": self.mode}
        self.state["facts"] = pack_facts({**how, "examples": len(examples)})

    def remembers(self, trainable: int, index: int) -> int:
        """Precision and anchor, float32, once a stage is finished."""
        return 8 * trainable if index else 0

    def own_tokens(self) -> int:
        """Of one pass of the estimate."""
        return self.batch_tokens

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def _estimate(self, module: StageModule, stage: Stage, examples: Sequence[Example]) -> dict[str, Tensor]:
        model, leaves = module.model, module.adapter.trainable(module.model)
        losses: ExampleLosses = module.example_losses
        if self.fisher == "batch":
            size = stage.batch_size
            groups = [examples[k : k + size] for k in range(0, len(examples), size)]
            return batch_fisher_diagonal(leaves, (lay_out(module, group) for group in groups), losses)
        if self.fisher == "true":
            labels = stage_labels(module, stage, asked_by=f"{self.name}.fisher=true")
            every = data_losses(module.forward)
            return true_fisher_diagonal(model, leaves, examples, labels, every, lambda group: lay_out(module, group))
        if self.fisher == "sampled":
            losses = sampled_losses(module.forward, seed=stage.seed, stage=stage.index)
        if self.granularity == "sequence":
            batches = batches_of(module, examples, tokens=self.batch_tokens)
            return fisher_diagonal(model, leaves, batches, losses)
        tokens = list(one_per_token(examples))
        batches = batches_of(module, tokens, tokens=self.batch_tokens)
        per_token = fisher_diagonal(model, leaves, batches, losses)
        return {name: mean * (len(tokens) / len(examples)) for name, mean in per_token.items()}

"""Memory aware synapses (Aljundi et al. 2018): protect the parameters to which the output is sensitive, without labels.

    Ω_i = E_x |∂ ‖f(x)‖² / ∂θ_i|,     L = L_t + λ Σ_i Ω_i (θ_i - θ*_i)²

The absolute value is taken per example, before the mean: gradients of different examples do not cancel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from residency.core.errors import UserError
from residency.core.tensors import remembered
from residency.core.types import Batch, Capability, Outputs, Stage, Tensors
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.penalties.fisher import mean_over_examples
from residency.mitigations.penalties.per_example import ExampleLosses
from residency.mitigations.penalties.quadratic import penalty_numbers, penalty_term, pulled_gradients
from residency.mitigations.penalties.sampling import batches_of, sample_examples

__all__ = ["MAS", "hidden_states", "squared_norms"]


def squared_norms(outputs: Callable[[Batch], Tensor]) -> ExampleLosses:
    """Batch -> (B,) mean over an example's supervised positions of ‖f‖², from batch -> (M, D) outputs f."""

    def norms(batch: Batch) -> Tensor:
        found = outputs(batch).float().square().sum(-1)
        counts = torch.bincount(batch.target_example, minlength=batch.size)
        return found.new_zeros(batch.size).index_add(0, batch.target_example, found) / counts

    return norms


def hidden_states(model: nn.Module, forward: Callable[[Batch], Tensor], batch: Batch) -> Tensor:
    """(M, D) residual stream at the supervised positions, as the last normalisation layer finds it.

    Not behind that layer: RMSNorm gives every state nearly the same norm, and ‖h‖² would depend on nothing.
    """
    with _last_norm_input(model) as seen:
        forward(batch)
    if not seen:
        raise UserError(
            f"MAS on the hidden state of {type(model).__name__}",
            why="it has no normalisation layer, before which the hidden state is read",
            fix="set model.mitigations.<name>.output to log_probabilities",
        )
    x = seen[0]
    if batch.layout == "packed":
        return x[0, batch.target_at]
    width = batch.input_ids.shape[1]
    # Columns count from the end of a row: an adapter may have put virtual tokens in front of it.
    return x[batch.target_at // width, batch.target_at % width - width]


@contextmanager
def _last_norm_input(model: nn.Module) -> Iterator[list[Tensor]]:
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen[:] = args[:1]

    norms = [m for m in model.modules() if "Norm" in type(m).__name__]
    handles = [norm.register_forward_pre_hook(keep) for norm in norms]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


class MAS(Mitigation):
    """Memory aware synapses.

    Importances of all domains are summed, the anchor is the latest domain's. The pull is added to the gradients once
    per optimizer step; its value is logged as `loss/<name>/penalty`.

    Args:
        strength: λ. The penalty is λ Σ Ω (θ - θ*)², without a 1/2. 0 = off.
        output: f: `hidden`, the residual stream before the last norm, or `log_probabilities`. Never raw logits: adding
            a constant to all of them changes ‖f‖² and not the model.
        samples: Examples of the finished domain on which Ω is estimated.
        batch_tokens: Tokens per pass of the estimate; changes memory, not the result.

    Raises:
        UserError: A value is out of range.
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
        strength: float = 1.0,
        output: Literal["hidden", "log_probabilities"] = "hidden",
        samples: int = 64,
        batch_tokens: int = 256,
    ) -> None:
        super().__init__()
        if strength < 0 or samples < 1:
            raise UserError(
                f"MAS with strength={strength}, samples={samples}",
                why="strength must be >= 0 and samples >= 1",
                fix="correct these values in model.mitigations",
            )
        self.strength = strength
        self.output = output
        if output == "hidden":
            self.decoder_only = "the hidden state is read at the tokens of a batch (log_probabilities works)"
            self.not_on_classifiers = self.decoder_only
        self.samples = samples
        self.batch_tokens = batch_tokens
        self.add_state("precision", {})
        self.add_state("anchor", {})

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """The penalty's value, for the log; nothing before the first domain is finished."""
        return penalty_term(module.adapter.trainable(module.model), self.state, strength=2 * self.strength)

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Add the penalty's gradient."""
        leaves = module.adapter.trainable(module.model)
        return pulled_gradients(gradients, leaves, self.state, strength=2 * self.strength)

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """How far the weights are from the anchor, and how hard they are pulled."""
        return penalty_numbers(module.adapter.trainable(module.model), self.state, strength=2 * self.strength)

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Add the domain's importances, estimated at its final weights."""
        leaves = module.adapter.trainable(module.model)
        batches = batches_of(module, sample_examples(module, stage, count=self.samples), tokens=self.batch_tokens)
        found = mean_over_examples(module.model, leaves, batches, self._norms(module), torch.abs)
        old = self.state["precision"]
        assert isinstance(old, dict)
        total = {name: old[name] + new for name, new in found.items()} if old else found
        self.state.update(precision=total, anchor=remembered(leaves))

    def remembers(self, trainable: int, index: int) -> int:
        """Importances and anchor, float32, once a stage is finished."""
        return 8 * trainable if index else 0

    def own_tokens(self) -> int:
        """Of one pass of the estimate."""
        return self.batch_tokens

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def _norms(self, module: StageModule) -> ExampleLosses:
        if self.output == "hidden":
            through = module.backbone.work.through
            return squared_norms(lambda batch: through(hidden_states(module.model, module.forward, batch)))
        return squared_norms(lambda batch: module.forward(batch).float().log_softmax(-1))

"""EWC for LoRA in the space of the weights, with a Kronecker-factored Fisher information (K-FAC).

    L = L_t + λ/2 Σ_layers vec(ΔW - ΔW*)ᵀ (Ā ⊗ Ḡ) vec(ΔW - ΔW*),     ΔW = s B A

Diagonal EWC on A and B depends on the gauge of the factors and gives A no importance at all where B is 0; this one
measures what the layer computes. The formulas stand in `residency.mitigations.penalties.kronecker`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from residency.adapters.algebra.covariance import covariance_flops
from residency.core.errors import UserError
from residency.core.tensors import remembered, size_in_bytes
from residency.core.types import Batch, Capability, Outputs, Stage, Tensors
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.penalties.fisher import sampled_losses
from residency.mitigations.penalties.kronecker import kronecker_factors, low_rank_pulls, pull_flops
from residency.mitigations.penalties.per_example import ExampleLosses
from residency.mitigations.penalties.quadratic import add_pulls
from residency.mitigations.penalties.sampling import batches_of, pack_facts, sample_examples, unpack_facts

__all__ = ["KroneckerEWC", "merge_factors"]


def merge_factors(
    old: tuple[Tensors, Tensors, float], new: tuple[Tensors, Tensors], *, decay: float
) -> tuple[dict[str, Tensor], dict[str, Tensor], float]:
    """γ times the past plus one more domain as ONE pair of factors per layer: Ā averaged, Ḡ summed.

    Exact where the domains agree in Ā or in Ḡ; in general a sum of Kronecker products is not one (Ritter et al. 2018
    make the same approximation).

    Args:
        old: (Ā, Ḡ, weight of the past in domains).
        new: (Ā, Ḡ).
        decay: γ.

    Returns:
        (Ā, Ḡ, weight). Ḡ carries the weight: two equal domains with γ = 1 give 2 Ā ⊗ Ḡ.
    """
    (a_old, g_old, weight), (a_new, g_new) = old, new
    past = decay * weight
    mean = {name: torch.lerp(a_old[name], a_new[name], 1 / (past + 1)) for name in a_new}
    return mean, {name: decay * g_old[name] + g_new[name] for name in g_new}, past + 1


class KroneckerEWC(Mitigation):
    """EWC in weight space for plain LoRA.

    Memory: an (in, in) matrix per distinct layer input and an (out, out) matrix per layer, in float32, and one copy of
    A and B. For LoRA on q and v of a 135M model (30 layers, d = 576) 84 MB; on all linear layers 1.1 GB: watch
    `<name>/state_megabytes`. `separate` needs that once per domain.

    Args:
        strength: λ, comparable with EWC's: the Fisher information is per sequence. 0 = off.
        mode: `online`: one pair of factors and one anchor, F ← decay · F + F_t (`merge_factors`); `separate`: all
            domains' own, exactly.
        decay: γ of `online`, in [0, 1].
        fisher: `empirical`: the data's labels. `sampled`: drawn from the model, token by token.
        fisher_samples: Examples of the finished domain on which Ā and Ḡ are estimated.
        batch_tokens: Tokens per pass of the estimate; changes memory, not the result.

    Raises:
        UserError: A value is out of range.
    """

    shardable = True
    requires: frozenset[Capability] = frozenset({"fixed_coordinates", "low_rank"})
    alternative: ClassVar[str] = "configs/mitigation/ewc.yaml, or plain LoRA (configs/adapter/lora.yaml)"
    training_only: ClassVar[frozenset[str]] = frozenset({"strength"})
    decoder_only = "it matches what a layer sees with the tokens of a batch; encoder and decoder see different ones"
    not_on_classifiers = "it matches what a layer sees with the tokens of a batch; a classifier reads more than these"

    def __init__(
        self,
        *,
        strength: float = 1000.0,
        mode: Literal["online", "separate"] = "online",
        decay: float = 1.0,
        fisher: Literal["empirical", "sampled"] = "empirical",
        fisher_samples: int = 64,
        batch_tokens: int = 256,
    ) -> None:
        super().__init__()
        if strength < 0 or not 0 <= decay <= 1 or fisher_samples < 1:
            raise UserError(
                f"KroneckerEWC with strength={strength}, decay={decay}, fisher_samples={fisher_samples}",
                why="strength must be >= 0, decay in [0, 1], fisher_samples >= 1",
                fix="correct these values in model.mitigations",
            )
        if fisher == "sampled":
            self.follows = frozenset({"completion"})
        self.strength = strength
        self.mode = mode
        self.decay = decay
        self.fisher = fisher
        self.fisher_samples = fisher_samples
        self.batch_tokens = batch_tokens
        # Names are "<domain>/<path or parameter>"; `online` has the domain 0 only.
        for key in ("inputs", "outputs", "anchor"):
            self.add_state(key, {})
        self.add_state("facts", pack_facts({"weights": [], "shared": {}}))

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """The penalty's value, for the log; nothing before the first domain is finished."""
        pulls = self._pulls(module)
        return {} if pulls is None else {"penalty": pulls[0]}

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Add the penalty's gradient."""
        pulls = self._pulls(module)
        return gradients if pulls is None else add_pulls(gradients, pulls[1])

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """‖ΔW - ΔW*‖ from the latest anchor, the norm of the pull on the factors, and the memory of the state."""
        pulls = self._pulls(module)
        if pulls is None:
            return {}
        layers, leaves = module.adapter.low_rank_layers(module.model), module.adapter.trainable(module.model)
        last = len(self._facts["weights"]) - 1
        half_square, _ = low_rank_pulls(layers, leaves, self._of("anchor", last), strength=1.0)
        pull = torch.stack([p.norm() for p in pulls[1].values()]).norm()
        megabytes = size_in_bytes(self.state) / 1e6
        return {"distance": float(2 * half_square) ** 0.5, "pull": float(pull), "state_megabytes": megabytes}

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Estimate the factors at the final weights of the domain."""
        layers, leaves = module.adapter.low_rank_layers(module.model), module.adapter.trainable(module.model)
        losses: ExampleLosses = module.example_losses
        if self.fisher == "sampled":
            losses = sampled_losses(module.forward, seed=stage.seed, stage=stage.index)
        examples = sample_examples(module, stage, count=self.fisher_samples)
        batches = list(batches_of(module, examples, tokens=self.batch_tokens))
        owners = {layer.path: module.model.get_submodule(layer.path) for layer in layers}
        shared, inputs, outputs = kronecker_factors(owners, batches, losses)
        seen = sum(batch.tokens for batch in batches)
        module.backbone.work.multiplied(covariance_flops([*inputs.values(), *outputs.values()], tokens=seen))
        weights: list[float] = self._facts["weights"]
        index, weight = len(weights), 1.0
        if self.mode == "online" and weights:
            old = (self._of("inputs", 0), self._of("outputs", 0), weights[0])
            inputs, outputs, weight = merge_factors(old, (inputs, outputs), decay=self.decay)
            index, weights = 0, []
        anchor = remembered(leaves)
        for key, found in (("inputs", inputs), ("outputs", outputs), ("anchor", anchor)):
            kept = self.state[key]
            assert isinstance(kept, dict)
            self.state[key] = {**kept, **{f"{index}/{name}": tensor for name, tensor in found.items()}}
        how = {"fisher": self.fisher, "reduction": "sum", "mode": self.mode, "examples": len(examples)}
        self.state["facts"] = pack_facts({**how, "weights": [*weights, weight], "shared": shared})

    def own_tokens(self) -> int:
        """Of one pass of the estimate."""
        return self.batch_tokens

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    @property
    def _facts(self) -> dict[str, Any]:
        packed = self.state["facts"]
        assert isinstance(packed, Tensor)
        return unpack_facts(packed)

    def _of(self, key: str, domain: int) -> dict[str, Tensor]:
        named, prefix = self.state[key], f"{domain}/"
        assert isinstance(named, dict)
        return {name.removeprefix(prefix): t for name, t in named.items() if name.startswith(prefix)}

    def _pulls(self, module: StageModule) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Value and gradients, summed over domains; `None` where there are none."""
        facts = self._facts
        if not facts["weights"] or self.strength == 0:
            return None
        layers, leaves = module.adapter.low_rank_layers(module.model), module.adapter.trainable(module.model)
        of_layer: dict[str, str] = facts["shared"]
        parts = []
        for domain in range(len(facts["weights"])):
            inputs, outputs = self._of("inputs", domain), self._of("outputs", domain)
            inputs = {path: inputs[owner] for path, owner in of_layer.items()}
            pulls = low_rank_pulls(
                layers,
                leaves,
                self._of("anchor", domain),
                strength=self.strength,
                inputs=inputs.__getitem__,
                outputs=outputs.__getitem__,
            )
            parts.append(pulls)
        each = sum(pull_flops(leaves[layer.b], leaves[layer.a]) for layer in layers)
        module.backbone.work.multiplied(len(parts) * each)
        return torch.stack([value for value, _ in parts]).sum(), reduce(add_pulls, (pulls for _, pulls in parts))

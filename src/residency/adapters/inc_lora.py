"""IncLoRA and O-LoRA: a new LoRA block for every domain, all of them summed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from residency.adapters.algebra.gauge import nearest_gauge
from residency.adapters.algebra.low_rank import low_rank_factors
from residency.adapters.algebra.orthogonality import Orthogonality, overlap, squared_cosine
from residency.adapters.base import Adapter, Observe
from residency.adapters.peft_tools.folding import merged_lora
from residency.adapters.peft_tools.lora_blocks import (
    block_name,
    block_names,
    block_state,
    check_additive,
    concatenated,
    delta,
    factors,
    load_blocks,
    merged,
    open_block,
    switched,
    use_blocks,
    write_adapter,
)
from residency.adapters.peft_tools.wrapping import wrap
from residency.core.tensors import Computed
from residency.core.types import Stage, Tensors, untyped

__all__ = ["IncLoRA"]


class IncLoRA(Adapter):
    """One LoRA block per domain: ΔW = sum over i <= t of s B_i A_i. Only the newest trains; no task id at test time.

    With a `penalty` it is O-LoRA (Wang et al. 2023, "Orthogonal Subspace Learning for Language Model Continual
    Learning"), without one its baseline IncLoRA. Memory and time of a forward pass grow with the number of domains.

    There are no fixed coordinates: EWC and its kin are refused. WeightMixing works on the sum of the blocks.

    Args:
        config: Of every block; plain LoRA or rsLoRA. Dropout acts on all blocks while one of them trains.
        penalty: O-LoRA's, or null.

    Raises:
        UserError: The blocks would not be a sum (DoRA, a base-changing initialisation, a trained bias).
    """

    not_on_classifiers = "its blocks work together, and a head that trains beside them can be that of one block only"
    provides = frozenset({"averageable", "linear", "reference", "mergeable", "exportable"})

    def __init__(self, *, config: LoraConfig, penalty: Orthogonality | None = None) -> None:
        check_additive(config, owner="IncLoRA")
        self.config = config
        self.penalty = penalty

    def attach(self, model: nn.Module) -> nn.Module:
        """Add the block of the first domain.

        Raises:
            UserError: PEFT refuses the model.
        """
        return wrap(model, self.config, name=block_name(0))

    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Open a block and freeze the others."""
        name = open_block(model, stage.index)
        use_blocks(model, block_names(model), trains=name)

    def loss_terms(self, model: nn.Module, stage: Stage) -> Mapping[str, Tensor]:
        """O-LoRA's penalty: `orthogonality` (0 for the first block) and `shrinkage`, each if its strength is not 0."""
        terms: dict[str, Tensor] = {}
        if self.penalty is None:
            return terms
        if self.penalty.strength:
            pairs = _newest_and_older(model)
            summed = sum(overlap(new, old, norm=self.penalty.norm) for new, old in pairs if len(old))
            terms["orthogonality"] = torch.as_tensor(self.penalty.strength * summed)
        if self.penalty.shrinkage:
            norms = [leaf.norm() for leaf in self.trainable(model).values()]
            terms["shrinkage"] = self.penalty.shrinkage * torch.stack(norms).sum()
        return terms

    @torch.no_grad()
    def metrics_to_log(self, model: nn.Module, stage: Stage) -> Mapping[str, float]:
        """`norm_a`, `norm_b`: of the newest block over all layers; `cos2`: mean squared cosine of its rows with older
        ones. A penalty that falls because `norm_a` does has protected nothing.
        """
        leaves = self.trainable(model)
        squares = {"norm_a": 0.0, "norm_b": 0.0}
        for name, leaf in leaves.items():
            squares["norm_a" if "_A." in name else "norm_b"] += float(leaf.square().sum())
        found = {name: value**0.5 for name, value in squares.items()}
        cosines = [squared_cosine(new, old) for new, old in _newest_and_older(model) if len(old)]
        return found | ({"cos2": float(torch.stack(cosines).mean())} if cosines else {})

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All blocks, frozen ones too."""
        return block_state(model)

    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Rebuild the blocks of a state; the newest of them is trainable then.

        Raises:
            UserError: Names or shapes differ.
        """
        names = load_blocks(model, state, owner=type(self).__name__)
        use_blocks(model, names, trains=names[-1])

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """The sum of the updates of all blocks of every layer, (out, in), computed when read."""
        layers = factors(state)
        return Computed(layers, lambda path: delta(model, state, path, layers[path]))

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Factorise anew what the newest block has to hold beside the frozen ones, best at its rank (Eckart-Young).

        Exact for a mixture of the states before and after a stage, which differ by the newest block alone.

        Returns:
            `truncation`: norm of what the rank cannot hold over the norm of all updates.
        """
        live = self.state(model)
        lost = total = 0.0
        for path, blocks in factors(live).items():
            newest = max(blocks)
            old = {name: pair for name, pair in blocks.items() if name != newest}
            wanted = weights[path] - (delta(model, live, path, old) if old else 0)
            a, b = (live[blocks[newest][factor]] for factor in "AB")
            scale = float(untyped(model.get_submodule(path)).scaling[newest])
            new_b, new_a = low_rank_factors(wanted / scale, rank=a.shape[0], a_norm=float(a.norm()))
            lost += float((wanted - scale * (new_b @ new_a)).square().sum())
            total += float(weights[path].square().sum())
            new_b, new_a = nearest_gauge(new_b, new_a, like=(b, a))
            a.copy_(new_a)
            b.copy_(new_b)
        return {"truncation": (lost / total) ** 0.5 if total else 0.0}

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """All blocks off: bit for bit the pretrained (or the quantised) model."""
        return switched(model, [])

    def folded_for_scoring(self, model: nn.Module) -> AbstractContextManager[Any]:
        """LoRA folded into the weights (`residency.adapters.peft_tools.folding`)."""
        return merged_lora(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain transformers model with all blocks folded in; `model` is used up."""
        return merged(model, *concatenated(model))

    def export(self, model: nn.Module, path: Path) -> None:
        """All t blocks as one plain LoRA of rank t r, which `PeftModel.from_pretrained` loads; exact."""
        write_adapter(path, *concatenated(model))


def _newest_and_older(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Per LoRA layer: A of the newest block, live, and A of all older ones below each other, (0, in) if none."""
    live = {name: p for name, p in model.named_parameters() if "lora_" in name}
    found: list[tuple[Tensor, Tensor]] = []
    for blocks in factors(live).values():
        *old, newest = (live[blocks[name]["A"]] for name in sorted(blocks))
        found.append((newest, torch.cat([a.detach() for a in old]) if old else newest[:0].detach()))
    return found

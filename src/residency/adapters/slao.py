"""SLAO (arXiv 2512.23017, "Merge before Forget"): one LoRA that goes on, and a merged copy that answers."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from residency.adapters.base import Adapter, Observe, copy_state
from residency.adapters.peft_tools.folding import merged_lora
from residency.adapters.peft_tools.lora_blocks import (
    add_block,
    check_additive,
    factors,
    merged,
    switched,
    use_blocks,
    write_adapter,
)
from residency.adapters.peft_tools.wrapping import wrap
from residency.core.errors import UserError
from residency.core.types import Stage

__all__ = ["SLAO", "merge_weight", "orthonormal_rows", "step_towards"]

_TUNED, _MERGED = "tuned", "merged"
_SERVES = "serves_merged"


class SLAO(Adapter):
    """Fine-tune one LoRA through all domains, and merge it into a second one after each; the merged one is scored.

    Domain 1 is ordinary LoRA. Before domain i >= 2, A becomes orthonormal rows that span what the A before spanned,
    and B goes on. After domain i, A_merged becomes A and B_merged moves by λ(i) = i^-decay towards B. Memory does not
    grow with the number of domains.

    A is drawn anew per domain, so there are no fixed coordinates: EWC and its kin are refused. It mixes its own
    states, so WeightMixing is refused too.

    Args:
        config: Plain LoRA or rsLoRA.
        decay: Exponent of λ(i): 0.5 is the paper's 1 / sqrt(i); 0 merges nothing (λ = 1), which is one LoRA continued
            with an orthonormal A.

    Raises:
        UserError: The LoRA is not a sum on a frozen base.
    """

    continues = False
    provides = frozenset({"reference", "mergeable", "exportable"})

    def __init__(self, *, config: LoraConfig, decay: float = 0.5) -> None:
        check_additive(config, owner="SLAO")
        if decay < 0:
            raise UserError(
                f"model.adapter SLAO with decay {decay}",
                why="λ(i) = i^-decay is a share of the way to the new B, and a negative decay goes beyond it",
                fix="give 0.5 (the paper) or another number >= 0",
            )
        self.config = config
        self.decay = decay

    def attach(self, model: nn.Module) -> nn.Module:
        """Add both pairs; the merged one answers, and is no change yet.

        Raises:
            UserError: PEFT refuses the model, or the rank is above the width of a layer.
        """
        first = not isinstance(model, PeftModel)
        model = wrap(model, self.config, name=_TUNED)
        if narrow := [a.shape for a, *_ in _layers(model, merged=False) if a.shape[0] > a.shape[1]]:
            raise UserError(
                f"model.adapter SLAO with rank {narrow[0][0]} on a layer with {narrow[0][1]} inputs",
                why="A starts every domain with orthonormal rows, and there are no more of them than inputs",
                fix=f"choose r <= {min(shape[1] for shape in narrow)}, or leave the layer out of target_modules",
            )
        if first:
            add_block(model, _MERGED)
            model.register_buffer(_SERVES, torch.tensor(True, device=next(model.parameters()).device))
            _use(model, merged_answers=True)
        return model

    @torch.no_grad()
    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """From the second domain on, make the rows of A orthonormal; the tuned pair takes over."""
        if stage.index > 0:
            for a, _, _, _ in _layers(model):
                a.copy_(orthonormal_rows(a))
        _use(model, merged_answers=False)

    @torch.no_grad()
    def end_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Merge; the merged pair answers."""
        weight = merge_weight(stage.index + 1, decay=self.decay)
        for a, b, a_merged, b_merged in _layers(model):
            a_merged.copy_(a)
            b_merged.copy_(step_towards(b_merged, b, weight=weight))
        _use(model, merged_answers=True)

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """Both pairs, and which of them answers."""
        live = {name: p.detach() for name, p in model.named_parameters() if "lora_" in name}
        return live | {_SERVES: model.get_buffer(_SERVES)}

    def load_state(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy a stored state; the pair that answered then answers again.

        Raises:
            UserError: Names or shapes differ.
        """
        copy_state(self.state(model), state, owner=type(self).__name__)
        _use(model, merged_answers=bool(state[_SERVES]))

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Adapters off: bit for bit the pretrained (or the quantised) model."""
        return switched(model, [])

    def folded_for_scoring(self, model: nn.Module) -> AbstractContextManager[Any]:
        """LoRA folded into the weights (`residency.adapters.peft_tools.folding`)."""
        return merged_lora(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain transformers model with the merged pair folded in; `model` is used up."""
        return merged(model, *_stored(model))

    def export(self, model: nn.Module, path: Path) -> None:
        """The merged pair as a plain LoRA, which `PeftModel.from_pretrained` loads."""
        write_adapter(path, *_stored(model))


def merge_weight(domain: int, *, decay: float) -> float:
    """λ(i) = i^-decay for the i-th domain, i from 1; λ(1) = 1."""
    return float(domain**-decay)


def orthonormal_rows(a: Tensor) -> Tensor:
    """(r, in) -> (r, in): Qᵀ of Aᵀ = Q R with a positive diagonal of R, so that A Aᵀ = I; needs r <= in."""
    q, r = torch.linalg.qr(a.T)
    sign = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    rows: Tensor = (q * sign).T
    return rows


def step_towards(old: Tensor, new: Tensor, *, weight: float) -> Tensor:
    """old + weight (new - old); exactly `new` for weight 1."""
    return new if weight == 1.0 else old + weight * (new - old)


def _use(model: nn.Module, *, merged_answers: bool) -> None:
    # The tuned pair stays the trainable one while the merged pair answers.
    use_blocks(model, [_MERGED if merged_answers else _TUNED], trains=_TUNED)
    model.get_buffer(_SERVES).fill_(merged_answers)


def _layers(model: nn.Module, *, merged: bool = True) -> list[tuple[Tensor, ...]]:
    """Live A and B of the tuned pair, then (`merged`) of the merged pair, of every layer."""
    live = dict(model.named_parameters())
    order = [(pair, factor) for pair in ((_TUNED, _MERGED) if merged else (_TUNED,)) for factor in "AB"]
    return [tuple(live[pairs[p][f]] for p, f in order) for pairs in factors(live).values()]


def _stored(model: Any) -> tuple[PeftConfig, dict[str, Tensor]]:
    """Config and tensors of the merged pair, as PEFT stores them."""
    return copy.deepcopy(model.peft_config[_MERGED]), get_peft_model_state_dict(model, adapter_name=_MERGED)

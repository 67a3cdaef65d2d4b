"""Any tuner of PEFT through one class: LoRA, rsLoRA, DoRA, IA3, OFT, ... are choices of a `PeftConfig`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from torch import nn
from torch.optim import Optimizer

from residency.adapters.algebra.gauge import nearest_gauge
from residency.adapters.algebra.low_rank import low_rank_factors, product_factors
from residency.adapters.base import Adapter, LowRankLayer, OptimizerFactory, missing_capability
from residency.adapters.peft_tools.folding import merged_lora
from residency.adapters.peft_tools.tuners import capabilities, check_config, kind_of
from residency.adapters.peft_tools.wrapping import expected_remarks, is_quantised, task_of, wrap
from residency.core.errors import UserError
from residency.core.tensors import Products, Term, terms_of
from residency.core.types import Tensors, untyped

__all__ = ["Peft", "lora", "low_rank_factors"]

_PAIRS = ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B."))


class Peft(Adapter):
    """A parameter-efficient adapter of the PEFT library.

    Args:
        config: Any `peft.PeftConfig`, for example `{class_path: peft.LoraConfig, init_args: {r: 8, ...}}`. The few
            that cannot work are refused with the reason (`residency.adapters.peft_tools.tuners`).
        lr_ratio: Learning rate of LoRA's B over that of everything else: LoRA+ (Hayou et al. 2024) uses 4 to 16.

    Raises:
        UserError: The config cannot train here, or `lr_ratio` is given for a tuner without B.
    """

    def __init__(self, *, config: PeftConfig, lr_ratio: float = 1.0) -> None:
        check_config(config)
        if lr_ratio != 1.0 and kind_of(config) != "LORA":
            raise UserError(
                f"model.adapter.lr_ratio {lr_ratio} with {type(config).__name__}",
                why="it is the learning rate of LoRA's factor B, which this tuner does not have",
                fix="set it to 1.0, or use configs/adapter/lora_plus.yaml",
            )
        self.config = config
        self.lr_ratio = lr_ratio
        self.provides = capabilities(config)
        self.shardable = kind_of(config) == "LORA" and not getattr(config, "use_dora", False)

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap the model with PEFT; only the adapter's parameters stay trainable.

        Raises:
            UserError: The tuner does not fit the model, its layers or its quantisation.
        """
        if task_of(model) == "SEQ_CLS":
            # A head moves beside the factors.
            self.provides = self.provides - {"low_rank"}
        return wrap(model, self.config)

    def optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """One group, or two for LoRA+: whatever the user's optimizer is, B steps `lr_ratio` times as far."""
        if self.lr_ratio == 1.0:
            return super().optimizer(model, factory)
        leaves = self.trainable(model)
        fast = {name for name in leaves if any(b in name for _, b in _PAIRS)}
        groups = [[p for name, p in leaves.items() if (name in fast) == wanted] for wanted in (False, True)]
        optimizer = factory([{"params": group} for group in groups])
        optimizer.param_groups[1]["lr"] *= self.lr_ratio
        return optimizer

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """LoRA: the update s B A of every adapted weight, (out, in), as a product; other tensors as they are.

        Averaging the factors A and B instead would add cross terms: on random factors it misses the average of the
        updates by 64 % in norm.
        """
        self._check_averageable()
        pairs = dict(_pairs(state))
        factors = {*pairs, *pairs.values()}
        names = [*pairs, *(name for name in state if name not in factors)]

        def terms(name: str) -> Sequence[Term] | None:
            return [(_scale(model, name), state[pairs[name]], state[name])] if name in pairs else None

        def compute(name: str) -> torch.Tensor:
            if name not in pairs:
                return state[name]
            return _scale(model, name) * (state[pairs[name]].float() @ state[name].float())

        return Products(names, compute, terms)

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Set the factors to the best approximation of each update at the adapter's rank (Eckart and Young 1936).

        A multiple of one state's update is exact: c s B A is c B and A, which is what scaling the adapter by c does.
        All others are written in the gauge nearest to the live factors, which mitigations may have remembered.

        Returns:
            `truncation`: norm of what the rank cannot hold over the norm of all updates.
        """
        self._check_averageable()
        live = self.trainable(model)
        pairs = dict(_pairs(live))
        lost = total = 0.0
        for name in weights:
            if name not in pairs:
                live[name].copy_(weights[name])
                continue
            a, b, scale = live[name], live[pairs[name]], _scale(model, name)
            fitted = _fitted(weights, name, scale=scale, rank=a.shape[0], a_norm=float(a.norm()))
            if fitted is None:
                b.zero_()
                continue
            near_b, near_a = fitted[:2] if _is_one_state(weights, name, a) else nearest_gauge(*fitted[:2], like=(b, a))
            b.copy_(near_b)
            a.copy_(near_a)
            lost += scale**2 * fitted[2]
            total += scale**2 * fitted[3]
        return {"truncation": (lost / total) ** 0.5 if total else 0.0}

    def low_rank(self, model: nn.Module, state: Tensors) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
        """LoRA: s B and A of every layer, under the name of A; not where the factors are blocks of a larger product."""
        if "averageable" not in self.provides:
            return {}
        return {a: (_scale(model, a) * state[b].float(), state[a].float()) for a, b in _pairs(state)}

    def low_rank_layers(self, model: nn.Module) -> list[LowRankLayer]:
        """The LoRA layers.

        Raises:
            UserError: The tuner is not plain LoRA, or adapts an embedding.
        """
        leaves = self.trainable(model)
        pairs = [(a, b) for a, b in _pairs(leaves) if _PAIRS[0][0] in a]
        if "low_rank" not in self.provides or len(leaves) != 2 * len(pairs):
            raise missing_capability(self, "low_rank")
        return [LowRankLayer(path=a.split(_PAIRS[0][0])[0], a=a, b=b, scale=_scale(model, a)) for a, b in pairs]

    def adapted_weight(self, model: nn.Module, name: str) -> torch.Tensor:
        """The weight of the layer whose A has this name."""
        from peft.utils.integrations import dequantize_module_weight

        marker = next(a for a, _ in _PAIRS if a in name)
        layer: Any = model.get_submodule(name.split(marker)[0])
        weight: torch.Tensor = dequantize_module_weight(layer.get_base_layer()).detach()
        # An embedding is (tokens, dimensions), and GPT-2 stores (in, out).
        return weight.T if "embedding" in marker or layer.fan_in_fan_out else weight

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Adapters off: bit for bit the pretrained (or the quantised) model."""
        if "reference" not in self.provides:
            return super().reference(model)
        result: AbstractContextManager[Any] = untyped(model).disable_adapter()
        return result

    def folded_for_scoring(self, model: nn.Module) -> AbstractContextManager[Any]:
        """LoRA folded into the weights (`residency.adapters.peft_tools.folding`)."""
        return merged_lora(model)

    def merge(self, model: nn.Module) -> nn.Module:
        """The plain transformers model with the adapter folded in; `model` is used up.

        On 4-bit and 8-bit weights the result is a model in full precision: folding into the codes themselves would
        change the function (pitfalls P6).
        """
        if "mergeable" not in self.provides:
            raise missing_capability(self, "mergeable")
        if is_quantised(model):
            model = _on_dequantised_base(model)
        result: nn.Module = untyped(model).merge_and_unload(safe_merge=True)
        return result

    def export(self, model: nn.Module, path: Path) -> None:
        """A folder that `PeftModel.from_pretrained` loads."""
        if "exportable" not in self.provides:
            raise missing_capability(self, "exportable")
        untyped(model).save_pretrained(path)

    def _check_averageable(self) -> None:
        if "averageable" not in self.provides:
            raise missing_capability(self, "averageable")


def _on_dequantised_base(model: Any) -> nn.Module:
    """The same adapter on a copy of its base in full precision, by way of what `export` writes."""
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        base = model.get_base_model()
        base.dequantize()
        # transformers leaves these as they were, and PEFT would not let go of IA3's layers.
        base.is_loaded_in_4bit = base.is_loaded_in_8bit = False
        with expected_remarks():
            result: nn.Module = PeftModel.from_pretrained(model.unload(), folder)
            return result


def _fitted(
    weights: Tensors, name: str, *, scale: float, rank: int, a_norm: float
) -> tuple[torch.Tensor, torch.Tensor, float, float] | None:
    """B and A of an update over s, and the squared norms of what is lost and of the whole; `None` if it is zero."""
    terms = terms_of(weights, name)
    if terms is not None:
        return product_factors([(c / scale, left, right) for c, left, right in terms], rank=rank, a_norm=a_norm)
    wanted = weights[name] / scale
    b, a = low_rank_factors(wanted, rank=rank, a_norm=a_norm)
    return b, a, float((wanted - b @ a).square().sum()), float(wanted.square().sum())


def _is_one_state(weights: Tensors, name: str, a: torch.Tensor) -> bool:
    """Whether an update is one product of the right rank: a multiple of a state, whose own factors are taken."""
    terms = [(left, right) for c, left, right in terms_of(weights, name) or () if c and left.any() and right.any()]
    return len(terms) == 1 and terms[0][1].shape == a.shape


def _pairs(state: Tensors) -> list[tuple[str, str]]:
    """(name of A, name of B) of every LoRA layer in a state."""
    return [
        (name, name.replace(a, b)) for name in state for a, b in _PAIRS if a in name and name.replace(a, b) in state
    ]


def _scale(model: nn.Module, name: str) -> float:
    """The factor s of the LoRA layer that holds parameter `name`."""
    marker = next(a for a, _ in _PAIRS if a in name)
    path, rest = name.split(marker)
    return float(untyped(model.get_submodule(path)).scaling[rest.split(".")[0]])


def lora(**options: Any) -> Peft:
    """Short for `Peft(config=LoraConfig(**options))`."""
    return Peft(config=LoraConfig(**options))

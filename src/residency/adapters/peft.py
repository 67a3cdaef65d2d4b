"""Any tuner of PEFT through one class: LoRA, rsLoRA, DoRA, IA3, OFT, ... are choices of a `PeftConfig`."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from residency.adapters.base import Adapter
from residency.errors import UserError
from residency.tensors import Computed
from residency.types import Capability, Tensors

__all__ = ["Peft", "low_rank_factors"]

# LoRA initialisations that write into the frozen weight: with the adapter off, the model is not the base any more.
_BASE_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# The effect on the model is linear (or a scale) in these parameters, so their mean is the mean of the effects.
_AVERAGED_AS_THEY_ARE = frozenset(
    {"IA3", "PROMPT_TUNING", "PREFIX_TUNING", "LN_TUNING", "FOURIERFT", "WAVEFT", "SHIRA", "C3A", "TRAINABLE_TOKENS"}
)
_VIRTUAL_TOKENS = frozenset(
    {"PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "CPT", "CARTRIDGE", "PREFIX_TUNING"}
)
_PAIRS = ((".lora_A.", ".lora_B."), (".lora_embedding_A.", ".lora_embedding_B."))


class Peft(Adapter):
    """A parameter-efficient adapter of the PEFT library.

    Args:
        config: Any `peft.PeftConfig`, for example `{class_path: peft.LoraConfig, init_args: {r: 8, ...}}`.
    """

    def __init__(self, *, config: PeftConfig) -> None:
        kind = _kind(config)
        if kind in _VIRTUAL_TOKENS:
            raise UserError(
                f"adapter config {type(config).__name__}",
                why="it prepends virtual tokens, and positions of supervised tokens would shift",
                fix="use a tuner that changes weights, for example configs/adapter/lora.yaml or ia3.yaml",
            )
        self.config = config
        self.provides = _capabilities(config, kind)

    def attach(self, model: nn.Module) -> nn.Module:
        """Wrap the model with PEFT; only the adapter's parameters stay trainable."""
        if isinstance(model, PeftModel):
            return model  # type: ignore[no-any-return]
        # A copy: PEFT writes the base model's name and the resolved targets into the config it is given.
        config = copy.deepcopy(self.config)
        config.task_type = config.task_type or "CAUSAL_LM"
        try:
            with warnings.catch_warnings():
                # PEFT asks transformers for a property that transformers has renamed.
                warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
                return get_peft_model(model, config)  # type: ignore[arg-type, no-any-return]
        except (ValueError, TypeError, NotImplementedError) as error:
            raise UserError(
                f"PEFT refuses {type(config).__name__} on {type(model).__name__}: {error}",
                why="the tuner does not fit this model, its layers or its quantisation",
                fix="correct model.adapter.config (often target_modules), or use configs/adapter/lora.yaml",
            ) from error

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """LoRA: the update s B A of every adapted weight, (out, in), computed when read; other tensors as they are.

        Averaging the factors A and B instead would add cross terms: on random factors it misses the average of the
        updates by 64 % in norm.
        """
        self._check_averageable()
        pairs = dict(_pairs(state))
        factors = {*pairs, *pairs.values()}
        names = [*pairs, *(name for name in state if name not in factors)]

        def compute(name: str) -> Tensor:
            if name not in pairs:
                return state[name]
            scale = _scale(model, name)
            return scale * (state[pairs[name]].float() @ state[name].float())

        return Computed(names, compute)

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Set the factors to the best approximation of each update at the adapter's rank (Eckart and Young 1936).

        Returns:
            `truncation`: norm of what the rank cannot hold over the norm of all updates.
        """
        self._check_averageable()
        live = self.trainable(model)
        pairs = dict(_pairs(live))
        lost = total = 0.0
        for name in weights:
            wanted = weights[name]
            if name not in pairs:
                live[name].copy_(wanted)
                continue
            a, b, scale = live[name], live[pairs[name]], _scale(model, name)
            new_b, new_a = low_rank_factors(wanted / scale, rank=a.shape[0], a_norm=float(a.norm()))
            lost += float((wanted - scale * (new_b @ new_a)).square().sum())
            total += float(wanted.square().sum())
            a.copy_(new_a)
            b.copy_(new_b)
        return {"truncation": (lost / total) ** 0.5 if total else 0.0}

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        """Adapters off."""
        if "reference" not in self.provides:
            return super().reference(model)
        return model.disable_adapter()  # type: ignore[operator, no-any-return]

    def export(self, model: nn.Module, path: Path) -> None:
        """A folder that `PeftModel.from_pretrained` loads."""
        model.save_pretrained(path)  # type: ignore[operator]

    def _check_averageable(self) -> None:
        if "averageable" not in self.provides:
            super().weights(nn.Module(), {})


def _kind(config: PeftConfig) -> str:
    return str(getattr(config.peft_type, "value", config.peft_type))


def _capabilities(config: PeftConfig, kind: str) -> frozenset[Capability]:
    """What a PEFT config can promise (spec/adapters 1.3)."""
    found: set[Capability] = {"fixed_coordinates", "exportable"}
    init = str(getattr(config, "init_lora_weights", True)).lower()
    changes_base = init.startswith(_BASE_CHANGING) or getattr(config, "kasa_config", None) is not None
    if not changes_base and getattr(config, "bias", "none") == "none" and kind != "OSF":
        found.add("reference")
    # Updates relative to a changed base are no updates of the pretrained weights, but they average all the same.
    plain_lora = kind == "LORA" and not getattr(config, "use_bdlora", None) and not config.is_prompt_learning
    if plain_lora or kind in _AVERAGED_AS_THEY_ARE:
        found.add("averageable")
    if kind == "OSF":
        found.discard("fixed_coordinates")
    return frozenset(found)


def _pairs(state: Tensors) -> list[tuple[str, str]]:
    """(name of A, name of B) of every LoRA layer in a state."""
    return [
        (name, name.replace(a, b)) for name in state for a, b in _PAIRS if a in name and name.replace(a, b) in state
    ]


def _scale(model: nn.Module, name: str) -> float:
    """The factor s of the LoRA layer that holds parameter `name`."""
    marker = next(a for a, _ in _PAIRS if a in name)
    path, rest = name.split(marker)
    return float(model.get_submodule(path).scaling[rest.split(".")[0]])  # type: ignore[index, union-attr]


def low_rank_factors(matrix: Tensor, *, rank: int, a_norm: float) -> tuple[Tensor, Tensor]:
    """The best rank-r factorisation B A of a matrix, with a chosen scale of A.

    A factorisation has a free gauge (B G, G^-1 A). It is fixed so that A has orthogonal rows of equal length and its
    former norm: the step that an optimizer makes in B A afterwards keeps its size.

    Args:
        matrix: (out, in).
        rank: r.
        a_norm: Frobenius norm that A shall have; 0 gives 1.

    Returns:
        B (out, r) and A (r, in).
    """
    smallest = min(matrix.shape)
    wide = min(2 * rank + 8, smallest)
    if smallest <= 4 * rank:
        u, s, vh = torch.linalg.svd(matrix.float(), full_matrices=False)
    else:
        # Randomised range finding is exact up to rounding for rank <= `wide`, as a mean of two rank-r updates is
        # (Halko et al. 2011, algorithm 4.4). Its draw is fixed, so that the result is a function of the matrix.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix.float(), q=wide, niter=4)
            vh = v.T
    length = (a_norm or 1.0) / min(rank, smallest) ** 0.5
    # A rank above the matrix's own dimensions leaves directions over; they stay empty.
    spare = max(0, rank - smallest)
    return F.pad(u[:, :rank] * (s[:rank] / length), (0, spare)), F.pad(vh[:rank] * length, (0, 0, 0, spare))


def lora(**options: Any) -> Peft:
    """Short for `Peft(config=LoraConfig(**options))`."""
    return Peft(config=LoraConfig(**options))

"""One row per adapter, mitigation, objective and domain reader: every property test runs on every row.

A new plug-in is one row here, and inherits all of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from peft import IA3Config, LoraConfig, OFTConfig, VeraConfig

from residency.adapters import Adapter, Bottleneck, Freeze, Full, GaLore, Peft, SinkhornResidual
from residency.adapters.peft import lora
from residency.domains import packaged
from residency.domains.base import Domain
from residency.domains.jsonl import Jsonl
from residency.mitigations import EWC, Mitigation, Replay, WeightMixing
from residency.objectives import SFT, Objective

__all__ = ["ADAPTERS", "MITIGATIONS", "OBJECTIVES", "READERS", "AdapterRow", "MitigationRow"]


@dataclass(frozen=True, kw_only=True)
class AdapterRow:
    """What an adapter promises.

    Args:
        make: A fresh adapter.
        identity: Whether the attached model equals the pretrained one: bit for bit, up to rounding, or not at all.
        loads_with: Which library reads what `export` writes.
        average: Largest relative error of `load_weights(weights(state))`.
    """

    make: Callable[[], Adapter]
    identity: Literal["exact", "close"] = "exact"
    loads_with: Literal["peft", "transformers", "residency"] = "peft"
    average: float = 1e-5


@dataclass(frozen=True, kw_only=True)
class MitigationRow:
    """A mitigation that acts on the tiny stream, and the same at strength 0."""

    make: Callable[[], Mitigation]
    off: Callable[[], Mitigation]


def _lora(**options: object) -> Callable[[], Adapter]:
    return lambda: lora(target_modules="all-linear", r=4, **options)


ADAPTERS: dict[str, AdapterRow] = {
    "full": AdapterRow(make=Full, loads_with="transformers"),
    "lora": AdapterRow(make=_lora(lora_alpha=8)),
    "lora_dropout": AdapterRow(make=_lora(lora_dropout=0.2)),
    "rslora": AdapterRow(make=_lora(use_rslora=True)),
    "dora": AdapterRow(make=_lora(use_dora=True), identity="close"),
    "pissa": AdapterRow(make=_lora(init_lora_weights="pissa"), identity="close"),
    "ia3": AdapterRow(make=lambda: Peft(config=IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]))),
    "oft": AdapterRow(
        make=lambda: Peft(config=OFTConfig(target_modules="all-linear", oft_block_size=8)), identity="close"
    ),
    "vera": AdapterRow(make=lambda: Peft(config=VeraConfig(target_modules=["q_proj", "o_proj"], r=4))),
    "lora_qv": AdapterRow(make=lambda: Peft(config=LoraConfig(target_modules=["q_proj", "v_proj"], r=2))),
    "freeze": AdapterRow(make=lambda: Freeze(bottom=1, freeze=["norm"]), loads_with="transformers"),
    "galore": AdapterRow(make=lambda: GaLore(rank=4, gap=3), loads_with="transformers"),
    "bottleneck": AdapterRow(make=lambda: Bottleneck(placement="houlsby", reduction=8), loads_with="residency"),
    "sinkhorn": AdapterRow(
        make=lambda: SinkhornResidual(inner=_lora()(), rank=2, structural_lr_ratio=1.0), loads_with="residency"
    ),
}

MITIGATIONS: dict[str, MitigationRow] = {
    "replay": MitigationRow(make=lambda: Replay(ratio=0.25, capacity=12), off=lambda: Replay(ratio=0.0)),
    "ewc": MitigationRow(make=lambda: EWC(strength=1000.0, fisher_samples=6), off=lambda: EWC(strength=0.0)),
    "ewc_online": MitigationRow(
        make=lambda: EWC(strength=1000.0, mode="online", decay=0.9, fisher_samples=6),
        off=lambda: EWC(strength=0.0, mode="online"),
    ),
    "weight_mixing": MitigationRow(make=lambda: WeightMixing(alpha=0.6), off=lambda: WeightMixing(alpha=1.0)),
}

OBJECTIVES: dict[str, Callable[[], Objective]] = {"sft": SFT}

READERS: dict[str, type[Domain]] = {
    "jsonl": Jsonl,
    **{name: getattr(packaged, name) for name in packaged.__all__},
}

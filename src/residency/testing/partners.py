"""Plug-ins that a new one is combined with: one adapter for each way in which weights move, two mitigations."""

from __future__ import annotations

from collections.abc import Mapping

from peft import LoraConfig

from residency.adapters import Full, IncLoRA, Peft
from residency.mitigations import EWC, Replay
from residency.testing.rows import AdapterRow, MitigationRow

__all__ = ["ADAPTERS", "MITIGATIONS"]

ADAPTERS: Mapping[str, AdapterRow] = {
    "full": AdapterRow(make=Full, loads_with="transformers"),
    "lora_dropout": AdapterRow(
        make=lambda: Peft(config=LoraConfig(target_modules="all-linear", r=4, lora_dropout=0.2)), seeded=True
    ),
    "inc_lora": AdapterRow(
        make=lambda: IncLoRA(config=LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=6))
    ),
}
"""All weights; a fixed set of new ones, with draws in every step; new ones in every stage."""

MITIGATIONS: Mapping[str, MitigationRow] = {
    "ewc": MitigationRow(make=lambda: EWC(strength=1000.0, fisher_samples=6), off=lambda: EWC(strength=0.0)),
    "replay": MitigationRow(make=lambda: Replay(ratio=0.25, capacity=12), off=lambda: Replay(ratio=0.0)),
}
"""A penalty that needs fixed coordinates; a memory that changes the rows of every batch."""

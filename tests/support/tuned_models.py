"""A tiny model with a PEFT tuner, a few steps of training, and its logits: what the adapter tests share."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from torch import Tensor, nn

from residency.adapters import Adapter, Peft
from residency.backbones import CausalLM, Quantisation
from residency.core.batching import make_batch
from residency.core.types import Batch, Example, Layout
from residency.testing.model_copies import copied

__all__ = ["EXAMPLES", "attach", "backbone", "fresh", "layer", "learn", "logits", "merged_weight", "mixed", "weight"]

EXAMPLES = [
    Example.of(domain="x", row=str(i), prompt=tuple(range(5 + i, 9 + 2 * i)), completion=(40 + i, 50 + i, 0))
    for i in range(3)
]


def backbone(folder: Path, *, quantised: bool = False, **options: Any) -> CausalLM:
    """The tiny model, in NF4 with double quantisation if asked for."""
    return CausalLM(path=str(folder), quantisation=Quantisation() if quantised else None, **options)


def fresh(folder: Path) -> nn.Module:
    """A copy of the tiny model, which is loaded once."""
    model: nn.Module = copied(_loaded(folder), {})
    return model


@cache
def _loaded(folder: Path) -> nn.Module:
    return backbone(folder).load()


def attach(folder: Path, adapter: Adapter | PeftConfig, *, quantised: bool = False, seed: int = 0) -> Any:
    """A fresh model with an adapter."""
    adapter = Peft(config=adapter) if isinstance(adapter, PeftConfig) else adapter
    model = backbone(folder, quantised=True).load() if quantised else fresh(folder)
    torch.manual_seed(seed)
    return adapter.attach(model)


def logits(model: nn.Module, layout: Layout = "padded", examples: list[Example] | None = None) -> Tensor:
    """(M, V) in evaluation mode."""
    model.eval()
    with torch.no_grad():
        return _forward(model, make_batch(examples or EXAMPLES, layout=layout)).clone()


def learn(model: nn.Module, *, steps: int = 4, lr: float = 2e-2, optimizer: type = torch.optim.AdamW) -> float:
    """A few steps on `EXAMPLES`; the last loss."""
    leaves = [p for p in model.parameters() if p.requires_grad]
    stepper, batch, loss = optimizer(leaves, lr=lr), make_batch(EXAMPLES, layout="padded"), torch.zeros(())
    model.train()
    for step in range(steps):
        torch.manual_seed(step)
        stepper.zero_grad()
        loss = nn.functional.cross_entropy(_forward(model, batch), batch.targets)
        loss.backward()
        stepper.step()
    return float(loss.detach())


def mixed(one: dict[str, Tensor], other: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean of two states."""
    return {name: (one[name] + other[name]) / 2 for name in one}


def _forward(model: nn.Module, batch: Batch) -> Tensor:
    return CausalLM(path="unused").logits(model, batch)


def layer(model: Any, name: str = "layers.0.self_attn.q_proj") -> Any:
    """An adapted layer (or a plain one)."""
    return next(module for path, module in model.named_modules() if path.endswith(name))


def weight(folder: Path, name: str = "layers.0.self_attn.q_proj") -> torch.Tensor:
    """The pretrained weight, (out, in)."""
    found: torch.Tensor = layer(backbone(folder).load(), name).weight.detach()
    return found


def merged_weight(model: Any, name: str = "layers.0.self_attn.q_proj") -> torch.Tensor:
    """The weight with the adapter folded in, (out, in); uses the model up."""
    return layer(model.merge_and_unload(), name).weight.detach()  # type: ignore[no-any-return]

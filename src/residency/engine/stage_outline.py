"""A model with its adapter, without values: its sizes, how its layers will run, and what of it a rank keeps."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from residency.backbones.outline import Outline
from residency.backbones.structure import blocks as blocks_of
from residency.backbones.work import Work, is_checkpointed
from residency.core.errors import UserError
from residency.engine.memory import Blocks, Gathered, Held, Way
from residency.engine.module import ContinualModule

__all__ = ["Device", "StageOutline", "held_in_parts", "outlined"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Where a rank computes.

    Args:
        kind: `cpu` or `cuda`.
        precision: Of the Trainer.
        ranks: How many train together.
        parts: Whether each of them keeps a part of the base.
    """

    kind: str
    precision: str
    ranks: int
    parts: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutline:
    """A model with its adapter on the meta device, and its sizes.

    Args:
        model: Every parameter without values.
        stored: Bytes of its weights, those of the adapter included.
        own: Of these, what the adapter adds.
        blocks: Sizes of its decoder.
        way: How its layers will run.
        work: Counts its passes; it looks at the layers once.
    """

    model: nn.Module
    stored: int
    own: int
    blocks: Blocks
    way: Way
    work: Work = field(default_factory=Work, repr=False)


def outlined(module: ContinualModule, device: Device) -> StageOutline:
    """The model of a run, without weights.

    Raises:
        UserError: The backbone does not say what it will be, or the adapter is made of the weights themselves.
    """
    bare = module.backbone.outline()
    if bare is None:
        raise UserError(
            f"{type(module.backbone).__name__} and --dry-run",
            why="an estimate reads what the model will be from its config, which this backbone does not offer",
            fix="use residency.backbones.CausalLM, or train a few steps and look at peak_memory_bytes in results.json",
        )
    try:
        model = module.adapter.attach(bare.model)
    except (NotImplementedError, RuntimeError) as error:
        raise UserError(
            f"{type(module.adapter).__name__} and --dry-run: {' '.join(str(error).split())[:200]}",
            why="it is made of the values of the weights, which an estimate does not load",
            fix="estimate the same stream with configs/adapter/lora.yaml: its sizes are alike",
        ) from error
    own = sum(p.numel() * p.element_size() for name, p in model.named_parameters() if _adds(name))
    width = 2 if device.precision.startswith(("bf16", "16")) else bare.width
    blocks = _blocks(model, width=width)
    way = _way(module, model, bare, device)
    return StageOutline(model=model, stored=bare.stored + own, own=own, blocks=blocks, way=way)


def _adds(name: str) -> bool:
    """Whether a parameter is the adapter's own."""
    # PEFT keeps the modules of the base inside of its own: only names of adapters have these parts.
    return any(part in name for part in ("lora_", "ia3_", "prompt", "adapter", "modules_to_save", "trainable_tokens"))


def _blocks(model: nn.Module, *, width: int) -> Blocks:
    core: Any = model
    config = core.config.get_text_config() if hasattr(core.config, "get_text_config") else core.config
    hidden, heads, layers = config.hidden_size, config.num_attention_heads, config.num_hidden_layers
    head_dim = getattr(config, "head_dim", None) or hidden // heads
    # Between the factors of LoRA lies what `lora_A` gives: one number per row of it.
    thin = sum(len(p) for name, p in model.named_parameters() if "lora_A" in name)
    return Blocks(
        layers=layers,
        hidden=hidden,
        feed_forward=getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * hidden,
        queries=heads * head_dim,
        keys=(getattr(config, "num_key_value_heads", None) or heads) * head_dim,
        heads=heads,
        vocabulary=config.vocab_size,
        thin=thin // layers,
        width=width,
    )


def _way(module: ContinualModule, model: nn.Module, bare: Outline, device: Device) -> Way:
    if is_checkpointed(model) or getattr(module.backbone, "gradient_checkpointing", False):
        return "checkpointed"
    reads_rows = getattr(module.backbone, "attention", "auto") != "model"
    if module.layout_choice == "padded" or not reads_rows:
        return "padded"
    plain = all("lora_A" in n or "lora_B" in n for n, p in model.named_parameters() if p.requires_grad)
    named = any(name.endswith("gate_proj") for name, _ in model.named_modules())
    exact = device.kind == "cpu" and bare.width == 4 and "mixed" not in device.precision and not bare.quantised
    return "node" if plain and named and exact else "modules"


def held_in_parts(held: Held, found: StageOutline, device: Device, *, trained: bool) -> Held:
    """What one of several ranks holds of a base in parts; without the kernels that step aside there.

    Args:
        held: By a device that has all of it.
        found: The model.
        device: One of several.
        trained: Whether what trains is in parts as well.
    """
    inner = [
        sum(p.numel() * p.element_size() for name, p in block.named_parameters() if not _adds(name))
        for block in blocks_of(found.model).values()
    ]
    base = found.stored - found.own
    gathered = Gathered(around=base - sum(inner), block=max(inner), trained=trained)
    cut = replace(held, weights=found.own + base // device.ranks, logits=True, gathered=gathered)
    if not trained:
        return cut
    gradients, optimizer = (size // device.ranks for size in (held.gradients, held.optimizer))
    return replace(cut, gradients=gradients, optimizer=optimizer, largest=0, stepping=0)

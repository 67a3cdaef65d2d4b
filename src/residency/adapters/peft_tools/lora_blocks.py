"""Several named adapters of PEFT in one model: which there are, which take part, which one trains.

A block is one PEFT adapter. Its name holds the position of the domain that opened it, never the domain's own name.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import save_file
from torch import Tensor, nn

from residency.adapters.base import copy_state
from residency.adapters.peft_tools.tuners import capabilities, check_config
from residency.adapters.peft_tools.wrapping import expected_remarks, is_quantised
from residency.core.errors import UserError
from residency.core.types import Tensors

__all__ = [
    "Factors",
    "add_block",
    "block_name",
    "block_names",
    "block_state",
    "check_additive",
    "concatenated",
    "delta",
    "factors",
    "load_blocks",
    "merged",
    "open_block",
    "switched",
    "use_blocks",
    "write_adapter",
]

_BLOCK = re.compile(r"\.(block\d{3})(?:\.|$)")
_PAIR = re.compile(r"^(.+)\.lora_(?:embedding_)?([AB])\.(\w+)(?:\.weight)?$")

Factors = dict[str, dict[str, dict[str, str]]]
"""Path of a layer -> block -> "A" or "B" -> name of the tensor."""


def check_additive(config: LoraConfig, *, owner: str) -> None:
    """Refuse a LoRA whose blocks do not add up to an update of the pretrained weight.

    Raises:
        UserError: With what to change.
    """
    check_config(config)
    options = ("use_dora", "use_bdlora", "lora_bias", "velora_config", "modules_to_save", "trainable_token_indices")
    wrong = [option for option in options if getattr(config, option)]
    if wrong or not {"reference", "averageable"} <= capabilities(config):
        given = wrong[0] if wrong else f"init_lora_weights {config.init_lora_weights}, bias {config.bias}"
        raise UserError(
            f"model.adapter {owner} with {given}",
            why="blocks of several domains are summed on one frozen base, and this LoRA is not such a sum",
            fix="use plain LoRA or rsLoRA: init_lora_weights true, bias none, no DoRA, no modules_to_save; "
            "one DoRA that is continued is configs/adapter/dora.yaml",
        )


def block_name(index: int) -> str:
    """Name of the block that the domain at this position (from 0) opens."""
    return f"block{index:03d}"


def block_names(model: Any) -> list[str]:
    """All blocks, oldest first."""
    return sorted(model.peft_config)


def add_block(model: Any, name: str) -> None:
    """Add a block that is like the first one; drawn from the global generator."""
    config = copy.deepcopy(next(iter(model.peft_config.values())))
    config.inference_mode = False
    with expected_remarks():
        model.add_adapter(name, config)
    model.train(model.training)  # what was added came in training mode


def open_block(model: Any, index: int) -> str:
    """A fresh block for a domain; the first one is attached with the model.

    A stage that is begun twice begins anew: what a first beginning has left is thrown away.
    """
    if index and (left := [name for name in block_names(model) if name >= block_name(index)]):
        model.base_model.set_adapter([block_name(0)], inference_mode=True)
        for name in left:
            model.delete_adapter(name)
    if (name := block_name(index)) not in model.peft_config:
        add_block(model, name)
    return name


def use_blocks(model: Any, active: Sequence[str], *, trains: str) -> None:
    """Which blocks are summed in the forward pass, and the one whose tensors are trainable (pitfalls P1)."""
    model.base_model.set_adapter(list(active), inference_mode=True)
    model.base_model.set_requires_grad(trains, True)


@contextmanager
def switched(model: Any, active: Sequence[str]) -> Iterator[None]:
    """Inside the context only these blocks take part; none = the pretrained model, bit for bit.

    PEFT's own switch makes every active block trainable when it is switched on again; here everything is as before.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    before = list(layers[0].active_adapters)
    was_off = layers[0].disable_adapters
    grads = [(p, p.requires_grad) for p in model.parameters()]
    try:
        if active and not was_off:
            model.base_model.set_adapter(list(active), inference_mode=True)
        else:
            model.base_model.disable_adapter_layers()
        yield
    finally:
        if not was_off:
            model.base_model.enable_adapter_layers()
        model.base_model.set_adapter(before, inference_mode=True)
        for parameter, grad in grads:
            parameter.requires_grad_(grad)


# -- state ----------------------------------------------------------------------------------------------------------


def block_state(model: nn.Module, *, extra: Sequence[str] = ()) -> dict[str, Tensor]:
    """All tensors of all blocks, and the tensors whose last name is one of `extra`."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        name: tensor.detach()
        for name, tensor in tensors.items()
        if _BLOCK.search(name) or name.rpartition(".")[2] in extra
    }


def load_blocks(model: Any, state: Tensors, *, owner: str, extra: Sequence[str] = ()) -> list[str]:
    """Rebuild the blocks that a state names and copy it, bit for bit; the model's blocks then.

    A model that has the same blocks keeps its tensors, so that an optimizer over them stays valid.

    Raises:
        UserError: Names or shapes differ.
    """
    wanted = sorted({found[1] for name in state if (found := _BLOCK.search(name))}) or block_names(model)
    for name in wanted:
        if name not in model.peft_config:
            add_block(model, name)
    model.base_model.set_adapter(wanted, inference_mode=True)
    for name in {*block_names(model)} - {*wanted}:
        model.delete_adapter(name)
    copy_state(block_state(model, extra=extra), state, owner=owner)
    return wanted


# -- LoRA: sums of updates ------------------------------------------------------------------------------------------


def factors(state: Tensors) -> Factors:
    """Where the factors of every block of every LoRA layer are, by layer, in the order of the state."""
    found: Factors = {}
    for name in state:
        if match := _PAIR.match(name):
            path, factor, block = match.groups()
            found.setdefault(path, {}).setdefault(block, {})[factor] = name
    return found


def delta(model: nn.Module, state: Tensors, path: str, blocks: Mapping[str, Mapping[str, str]]) -> Tensor:
    """The sum of s B A over blocks of one layer, (out, in).

    Args:
        model: For the scale s of every block.
        state: Holds the factors.
        path: Of the layer.
        blocks: As `factors(state)[path]`, or a part of it, at least one.
    """
    scaling: Any = model.get_submodule(path).scaling
    scale = float(next(iter(scaling.values())))
    return sum(  # type: ignore[return-value]
        scale * (state[names["B"]].float() @ state[names["A"]].float()) for names in blocks.values()
    )


def concatenated(model: Any) -> tuple[LoraConfig, dict[str, Tensor]]:
    """All t blocks as ONE LoRA of rank t r: [B_1 ... B_t] [A_1; ...; A_t] is their sum, exactly.

    Returns:
        Its config, and its tensors under the names that PEFT gives to a stored adapter.
    """
    state, count = block_state(model), len(model.peft_config)
    config = copy.deepcopy(next(iter(model.peft_config.values())))
    # The scale must stay: alpha / (t r), or alpha / sqrt(t r) with rsLoRA.
    wider = count**0.5 if config.use_rslora else count
    config.r *= count
    config.lora_alpha *= wider
    config.rank_pattern = {key: value * count for key, value in config.rank_pattern.items()}
    config.alpha_pattern = {key: value * wider for key, value in config.alpha_pattern.items()}
    tensors = {}
    for blocks in factors(state).values():
        for factor, dim in (("A", 0), ("B", 1)):
            names = [blocks[block][factor] for block in sorted(blocks)]
            key = _BLOCK.sub(lambda match: match[0].replace(f".{match[1]}", ""), names[0])
            tensors[key] = torch.cat([state[name] for name in names], dim)
    return config, tensors


# -- files ----------------------------------------------------------------------------------------------------------


def write_adapter(path: Path, config: PeftConfig, tensors: Tensors) -> None:
    """A folder that `PeftModel.from_pretrained` loads."""
    path.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.inference_mode = True
    config.save_pretrained(str(path))
    plain = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, path / "adapter_model.safetensors", metadata={"format": "pt"})


def merged(model: Any, config: PeftConfig, tensors: Tensors) -> nn.Module:
    """The plain model with one adapter folded in, in full precision where it was quantised; `model` is used up."""
    base = model.unload()
    if is_quantised(base):
        base = base.dequantize()
    with TemporaryDirectory() as folder, expected_remarks():
        write_adapter(Path(folder), config, tensors)
        loaded: Any = PeftModel.from_pretrained(base, folder)
    plain: nn.Module = loaded.merge_and_unload(safe_merge=True)
    return plain

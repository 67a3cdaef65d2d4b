"""InfLoRA (Liang and Li 2024): every block learns only where earlier domains have no inputs."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from residency.adapters.algebra.covariance import input_covariances
from residency.adapters.algebra.dual_gpm import Memory, directions, energy_threshold, remember
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
from residency.core.errors import UserError
from residency.core.tensors import Computed
from residency.core.types import Stage, Tensors, untyped

__all__ = ["InfLoRA"]

_BASIS, _FREE = "input_memory", "input_memory_is_free"


class InfLoRA(Adapter):
    """ΔW = sum over domains of s B_i A_i, in which A is computed and frozen, and only the newest B trains.

    Before domain t the rows of A_t become the directions in which its inputs are large and those of earlier domains
    are not: top left singular vectors of the covariance projected onto the free directions, divided by sqrt(3). A is
    never stepped, so an earlier input x in the memory M has B_t A_t x = 0 under any optimizer and any weight decay.
    After the domain its inputs are added to M (DualGPM). Both take a pass over the stage's data and one covariance
    (in x in, float32) per distinct input of adapted layers. Norms and biases are frozen here.

    There are no fixed coordinates: EWC and its kin are refused. WeightMixing works on the sum of the blocks.

    Args:
        config: Plain LoRA or rsLoRA of linear layers; its A is replaced.
        energy: ε at the beginning of a stream: share of the input energy of a domain that later ones must not touch.
        energy_at_end: ε_t grows linearly to this value at the last domain. At 1 nothing would be left free; the last
            domain's inputs are not remembered, as nothing follows.

    Raises:
        UserError: The LoRA is not a sum on a frozen base, or an energy is not in (0, 1].
    """

    uses_stream_length = True
    decoder_only = "it matches what a layer sees with the tokens of a batch; encoder and decoder see different ones"
    not_on_classifiers = "it matches what a layer sees with the tokens of a batch; a classifier reads more than these"
    provides = frozenset({"averageable", "reference", "mergeable", "exportable"})

    def __init__(self, *, config: LoraConfig, energy: float = 0.95, energy_at_end: float = 1.0) -> None:
        check_additive(config, owner="InfLoRA")
        if not 0 < energy <= energy_at_end <= 1:
            raise UserError(
                f"model.adapter InfLoRA with energy {energy} and energy_at_end {energy_at_end}",
                why="they are shares of the input energy, and what is protected does not shrink",
                fix="choose 0 < energy <= energy_at_end <= 1, for example 0.95 and 1.0",
            )
        self.config = config
        self.energy = energy
        self.energy_at_end = energy_at_end

    def attach(self, model: nn.Module) -> nn.Module:
        """Add the block of the first domain; its A is drawn, until the stage begins.

        Raises:
            UserError: PEFT refuses the model, or an embedding is among the targets.
        """
        model = wrap(model, self.config, name=block_name(0))
        if tables := [path for path, layer in _layers(model).items() if not layer.lora_A]:
            raise UserError(
                f"model.adapter InfLoRA on the embedding {tables[0]!r}",
                why="its inputs are token ids, which have no covariance",
                fix="leave embeddings out of target_modules, for example target_modules: all-linear",
            )
        _use(model, [block_name(0)])
        return model

    @torch.no_grad()
    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Open a block and set its A from the inputs of the new domain."""
        name = open_block(model, stage.index)
        _use(model, block_names(model))
        shared, found = input_covariances(_layers(model), observe)
        rank = {path: layer.r[name] for path, layer in _layers(model).items()}
        for owner, covariance in found.items():
            paths = [path for path, first in shared.items() if first == owner]
            memory = _memory(model.get_submodule(owner))
            rows = directions(covariance, memory, rank=max(rank[path] for path in paths)) / 3**0.5
            for path in paths:
                a = untyped(model.get_submodule(path)).lora_A[name].weight
                a.copy_(rows[: rank[path]])

    @torch.no_grad()
    def end_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Remember the inputs of the domain, as the trained model has them."""
        if stage.index + 1 == stage.stages:
            return
        threshold = energy_threshold(stage.index + 1, stage.stages, first=self.energy, last=self.energy_at_end)
        shared, found = input_covariances(_layers(model), observe)
        for path, owner in shared.items():
            if path == owner:
                layer = model.get_submodule(path)
                _keep(layer, remember(_memory(layer), found[path], threshold=threshold))

    def metrics_to_log(self, model: nn.Module, stage: Stage) -> Mapping[str, float]:
        """`used`: mean share of input directions that earlier domains have taken; at 1 nothing can be learnt."""
        memories = [memory for layer in _layers(model).values() if (memory := _memory(layer)) is not None]
        shares = [memory.used / len(memory.basis) for memory in memories]
        return {"used": sum(shares) / len(shares) if shares else 0.0}

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """All blocks and the memory."""
        return block_state(model, extra=(_BASIS, _FREE))

    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Rebuild blocks and memory of a state; B of the newest block is trainable then.

        Raises:
            UserError: Names or shapes differ.
        """
        for path, layer in _layers(model).items():
            basis = state.get(f"{path}.{_BASIS}")
            _keep(layer, None if basis is None else Memory(torch.empty_like(basis), False))
        names = load_blocks(model, state, owner=type(self).__name__, extra=(_BASIS, _FREE))
        _use(model, names)

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """The sum of the updates of all blocks of every layer, (out, in), computed when read."""
        layers = factors(state)
        return Computed(layers, lambda path: delta(model, state, path, layers[path]))

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Set B of the newest block to the best fit with its A as it is; exact for a mixture of the states before and
        after a stage. A stays, and with it the guarantee.

        Returns:
            `truncation`: norm of what the rows of A cannot hold over the norm of all updates.
        """
        live = self.state(model)
        lost = total = 0.0
        for path, blocks in factors(live).items():
            newest = max(blocks)
            old = {name: pair for name, pair in blocks.items() if name != newest}
            wanted = weights[path] - (delta(model, live, path, old) if old else 0)
            a, b = (live[blocks[newest][factor]] for factor in "AB")
            scale = float(untyped(model.get_submodule(path)).scaling[newest])
            new_b = (wanted / scale) @ torch.linalg.pinv(a.float())
            lost += float((wanted - scale * (new_b @ a.float())).square().sum())
            total += float(weights[path].square().sum())
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


def _layers(model: nn.Module) -> dict[str, Any]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}


def _use(model: nn.Module, names: list[str]) -> None:
    """All blocks in the forward pass; of the newest, B trains and A does not."""
    use_blocks(model, names, trains=names[-1])
    for layer in _layers(model).values():
        layer.lora_A[names[-1]].requires_grad_(False)


def _memory(layer: nn.Module) -> Memory | None:
    buffers = dict(layer.named_buffers(recurse=False))
    return Memory(buffers[_BASIS], bool(buffers[_FREE])) if _BASIS in buffers else None


def _keep(layer: nn.Module, memory: Memory | None) -> None:
    for name in (_BASIS, _FREE):
        if name in layer._buffers:
            delattr(layer, name)
    if memory is not None:
        device = next(layer.parameters()).device
        layer.register_buffer(_BASIS, memory.basis.to(device))
        layer.register_buffer(_FREE, torch.tensor(memory.free, device=device))

"""What a stage will take, before anything is loaded: memory of one device by part, tokens and FLOPs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from residency.adapters.base import Adapter, OptimizerFactory, changes
from residency.core.types import Batch, Example, Layout, Stage, untyped
from residency.domains.sampler import StageExamples
from residency.domains.stream_data import StreamData
from residency.engine import folds
from residency.engine.memory import Held, MemoryEstimate, Row, estimate_memory
from residency.engine.module import ContinualModule
from residency.engine.sharding import trains_in_parts
from residency.engine.stage_outline import Device, StageOutline, held_in_parts
from residency.metrics.cost import optimizer_state_bytes

__all__ = ["StageEstimate", "estimate_stage", "largest_that_fits"]

_LOOKED_AT = 128  # micro-batches of a stage
_BUCKET = 32_000_000  # bytes of gradients that ranks reduce at once


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """Of one stage.

    Args:
        domain: What it learns.
        micro_batch: Examples of a forward pass on one device.
        memory: Of one device.
        tokens: That all ranks read in the batches of the stage.
        flops: Of these passes, backward included; a mitigation's own passes are not in it.
        steps: Of the optimizer.
    """

    domain: str
    micro_batch: int
    memory: MemoryEstimate
    tokens: int
    flops: int
    steps: int


def estimate_stage(
    module: ContinualModule, data: StreamData, stage: Stage, found: StageOutline, device: Device, *, micro: int
) -> StageEstimate:
    """Memory, tokens and FLOPs of one stage.

    Args:
        module: Its adapter is attached to the outline; it is not built.
        data: Domains.
        stage: Which one.
        found: Of `outlined`.
        device: Of one rank.
        micro: Examples of a forward pass.
    """
    examples = data.examples(stage, module.backbone.tokenizer)
    objective = module.stage_settings.objective(stage.domain) or module.objective
    layout: Layout = "padded" if found.way == "padded" else "packed"
    groups = list(_groups(examples, micro))
    batches = [objective.collate(group, layout=layout) for group in groups]
    largest = max(batches, key=lambda batch: batch.input_ids.numel())
    own = max((m.own_tokens() for m in module.mitigations.values()), default=0)
    if own and stage.index + 1 < stage.stages:
        rows = {example.row: len(example) for group in groups for example in group}
        own = max(min(own, sum(rows.values())), *rows.values())
    held = _held(module, stage, found, device, own_tokens=own if stage.index + 1 < stage.stages else 0)
    row = _row(largest)
    if device.parts:
        held = held_in_parts(held, found, device, trained=trains_in_parts(module.adapter))
        row = replace(row, read=row.tokens)
    tokens, flops = _work(found, batches)
    passes = len(examples) / (micro * len(batches))
    return StageEstimate(
        domain=stage.domain,
        micro_batch=micro,
        memory=estimate_memory(found.blocks, row, held, way=found.way),
        tokens=round(tokens * passes),
        flops=round(flops * passes),
        steps=stage.steps,
    )


def _groups(examples: StageExamples, micro: int) -> Iterator[list[Example]]:
    """Micro-batches, evenly spread over the stage where there are many."""
    count = len(examples) // micro
    for k in range(min(count, _LOOKED_AT)):
        first = (k * count // min(count, _LOOKED_AT)) * micro
        yield [examples[position] for position in range(first, first + micro)]


def _row(batch: Batch) -> Row:
    return Row(tokens=batch.input_ids.numel(), read=len(batch.target_at.unique()), targets=len(batch.targets))


def _work(found: StageOutline, batches: Sequence[Batch]) -> tuple[int, int]:
    """(tokens, FLOPs) of a forward and a backward pass over batches, as a run counts them."""
    if not found.model.training:
        found.model.train()
    for batch in batches:
        out = torch.zeros((), requires_grad=True) * 1
        found.work.passed(found.model, batch, out)
        out.backward()  # tells `work` that it came
    return found.work.take()


def _held(module: ContinualModule, stage: Stage, found: StageOutline, device: Device, *, own_tokens: int) -> Held:
    adapter, model = module.adapter, found.model
    leaves = adapter.trainable(model)
    trainable = sum(p.numel() for p in leaves.values())
    sizes = [p.numel() * p.element_size() for p in leaves.values()]
    active = folds.active_hooks(module.mitigations.values())
    state = sum(t.numel() * t.element_size() for t in adapter.state(model).values())
    merges = bool(active["transform_weights"] or active["served_weights"])
    based = any(m.uses_base for m in module.mitigations.values())
    objective = module.stage_settings.objective(stage.domain) or module.objective
    readers = [m for m in module.mitigations.values() if m.uses_logits and m.touches_training(stage.index)]
    head: Any = untyped(model).get_output_embeddings().weight
    gradients = max(sizes) if adapter.steps_in_backward else sum(sizes)
    factory = module.stage_settings.factories(stage.domain, module.optimizer_factory, module.scheduler_factory)[0]
    return Held(
        weights=found.stored,
        gradients=gradients,
        optimizer=_optimizer_bytes(adapter, model, factory),
        largest=max(sizes),
        stepping=adapter.step_bytes(model) + (min(gradients, _BUCKET) if device.ranks > 1 else 0),
        copies=int(bool(active["transform_update"]) or changes(adapter, "transform_update")),
        kept=state * (merges + based) + sum(sizes) * objective.keeps_start,
        remembered={name: m.remembers(trainable, stage.index) for name, m in module.mitigations.items()},
        own_tokens=own_tokens,
        own_sums=2 * sum(sizes),
        head_trained=bool(head.requires_grad),
        logits=bool(readers) or objective.uses_logits,
        on_logits=bool(readers),
    )


def _optimizer_bytes(adapter: Adapter, model: nn.Module, factory: OptimizerFactory) -> int:
    """What an optimizer has after a step on tensors without values."""
    leaves = list(adapter.trainable(model).values())
    try:
        optimizer: Any = adapter.optimizer(model, factory)
        alike = _alike(optimizer, leaves)
        for leaf, *_ in alike:
            leaf.grad = torch.empty_like(leaf)
        optimizer.step()
        if all(len(some) == 1 for some in alike):
            return optimizer_state_bytes(optimizer)
        return sum(len(some) * _bytes(optimizer.state[some[0]]) for some in alike)
    except (RuntimeError, NotImplementedError, AttributeError, ValueError):
        # Kernels of others want real memory: two moments per number, of a byte each in the 8-bit kinds.
        name = getattr(getattr(factory, "func", factory), "__name__", str(factory))
        return (2 if "8bit" in name else 8) * sum(leaf.numel() for leaf in leaves)
    finally:
        for leaf in leaves:
            leaf.grad = None


def _bytes(state: Mapping[str, Any]) -> int:
    """Of the tensors that an optimizer keeps for one leaf."""
    return sum(value.numel() * value.element_size() for value in state.values() if isinstance(value, torch.Tensor))


def _alike(optimizer: Any, leaves: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Leaves of which an optimizer keeps equally much, together: one is stepped for all (else .3 s a stage)."""
    if not type(optimizer).__module__.startswith("torch.optim."):
        return [[leaf] for leaf in leaves]
    found: dict[tuple[Any, ...], list[torch.Tensor]] = {}
    for place, group in enumerate(optimizer.param_groups):
        for leaf in group["params"]:
            found.setdefault((place, leaf.shape, leaf.dtype), []).append(leaf)
    return list(found.values())


def _divisors(batch: int, *, ranks: int) -> list[int]:
    """Micro-batches into which a rank's share of a batch can be cut, the largest first."""
    share = batch // ranks
    return [micro for micro in range(share, 0, -1) if share % micro == 0]


def largest_that_fits(
    batch: int, estimate: Callable[[int], StageEstimate], *, ranks: int, limit: int
) -> StageEstimate | None:
    """The largest micro-batch whose peak is at most nine tenths of a limit; `None` = not even one example fits.

    Args:
        batch: Examples of an optimizer step.
        estimate: Of a micro-batch.
        ranks: That share the batch.
        limit: Bytes of one device.
    """
    found = map(estimate, _divisors(batch, ranks=ranks))
    return next((one for one in found if one.memory.peak <= 0.9 * limit), None)

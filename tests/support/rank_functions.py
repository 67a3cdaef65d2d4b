"""What the processes of a group run in the tests of `core.ranks`; a process imports them by name."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from residency.adapters.full import Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.parts import local, put_into, whole
from residency.core.ranks import (
    from_first,
    gather_facts,
    lockstep,
    mean_gradients,
    own_share,
    rank,
    ranks,
    spread,
    sum_over_ranks,
    together,
    tree_from_first,
)
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.estimate import estimate_stage
from residency.engine.sharding import base_in_parts
from residency.engine.stage import train_stage
from residency.engine.stage_outline import Device, outlined
from residency.engine.trainers import Trainers
from residency.testing.tiny_runs import domains, make_module
from support.allocator import held_bytes, watched_peak

UNEVEN = [1.0, 2.0, 3.0, 10.0]


def facts() -> list[Any]:
    return [gather_facts({"rank": rank(), "x": 0.1 * rank()}), from_first("first" if rank() == 0 else "other"), ranks()]


def nan() -> list[float]:
    return list(gather_facts(math.nan if rank() == 1 else math.inf))


def cut() -> list[list[int]]:
    """Shapes of this rank's parts of some tensors; they are torch's own, and together the tensors."""
    mesh, shapes = init_device_mesh("cpu", (ranks(),)), []
    for size in ((5, 2), (4,), (1, 3), (2, 2)):
        value = torch.arange(math.prod(size), dtype=torch.float64).reshape(size)
        expected = distribute_tensor(value, mesh, [Shard(0)])
        made = torch.zeros_like(expected)
        put_into(made, value)
        assert torch.equal(local(made), local(expected))
        assert torch.equal(whole(made), value)
        assert whole(value) is value
        put_into(plain := torch.zeros_like(value), value)
        assert torch.equal(plain, value)
        shapes.append(list(local(made).shape))
    return shapes


def tree(tree: Any) -> Any:
    return tree_from_first(tree if rank() == 0 else None)


def gradients() -> list[Any]:
    leaves = [nn.Parameter(torch.zeros(2)) for _ in range(3)]
    leaves[0].grad = torch.tensor([1.0, 2.0]) * (rank() + 1)
    if rank() == 1:
        leaves[1].grad = torch.tensor([3.0, 0.0])
    mean_gradients(leaves)
    return [None if leaf.grad is None else leaf.grad.tolist() for leaf in leaves]


def half() -> list[float]:
    leaf = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    leaf.grad = torch.tensor([1.0 if rank() else 256.0], dtype=torch.bfloat16)
    mean_gradients([leaf])
    assert leaf.grad is not None
    return leaf.grad.tolist()  # type: ignore[no-any-return]


def share() -> list[Any]:
    alone = [list(own_share(range(5))), float(sum_over_ranks(torch.tensor(1.0)))]
    with together():
        own = list(own_share(UNEVEN))
        total, count = sum_over_ranks(torch.tensor(sum(own))), sum_over_ranks(torch.tensor(len(own)))
        return [*alone, float(total / count), spread(lambda x: [x, rank()], UNEVEN), spread(lambda x: x, [])]


def in_lockstep() -> list[Any]:
    """Passes that this rank makes; a mean of what all ranks have whole; who computed what."""
    passes: list[float] = []

    def passed(item: float) -> list[Any]:
        passes.append(item)
        return [item, rank()]

    with together(), lockstep():
        own = list(own_share(UNEVEN))
        total, count = sum_over_ranks(torch.tensor(sum(own))), sum_over_ranks(torch.tensor(len(own)))
        found = spread(passed, UNEVEN, one_pass=True)
        return [passes, float(total / count), found, spread(lambda item: [item, rank()], UNEVEN)]


def kept_bytes(backbone: Path) -> dict[str, int]:
    """Of all tensors that this process holds because of a model that has been trained with and scored in parts."""
    ids = torch.arange(1, 9)[None]
    before = _alive()
    adapter = lora(r=2, target_modules=["q_proj"])
    model = adapter.attach(CausalLM(path=str(backbone)).load())
    frozen = sum(p.nbytes for p in model.parameters() if not p.requires_grad)
    leaves = [p for p in model.parameters() if p.requires_grad]
    with base_in_parts(model, torch.device("cpu"), adapter=adapter):
        with torch.inference_mode():
            model(input_ids=ids, use_cache=False)
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)
    model.zero_grad()
    return {"frozen": frozen, "leaves": sum(p.nbytes for p in leaves), "kept": _alive() - before}


def trained_bytes(backbone: Path) -> dict[str, int]:
    """Of all tensors that this process holds because of a model whose parts a step of AdamW has trained."""
    ids = torch.arange(1, 9)[None]
    before = _alive()
    adapter = Full()
    model = adapter.attach(CausalLM(path=str(backbone)).load())
    weights = sum(p.nbytes for p in model.parameters())
    with base_in_parts(model, torch.device("cpu"), adapter=adapter):
        optimizer = adapter.optimizer(model, torch.optim.AdamW)
        model(input_ids=ids, use_cache=False).logits.float().logsumexp(-1).sum().backward()
        optimizer.step()
    return {"weights": weights, "kept": _alive() - before}


def peaks_in_parts(backbone: Path, folder: Path, adapter: str, batch: int) -> list[tuple[int, int]]:
    """(estimated, allocated) peak of two stages of two ranks."""
    strategy = ModelParallelStrategy(tensor_parallel_size=1)
    options = {"accelerator": "cpu", "devices": ranks(), "strategy": strategy, "enable_progress_bar": False}
    trainers = Trainers(lambda: {**options, "gradient_clip_val": 1.0})
    data = StreamData(domains=domains(folder / f"data{rank()}"), batch_size=batch)
    stages = [
        Stage(index=k, domain=d, seed=0, kind=data.domains[d].kind, steps=2, batch_size=batch, stages=3)
        for k, d in enumerate(data.order)
    ]
    make = {"full": Full, "lora": lambda: lora(r=8, target_modules="all-linear")}[adapter]
    plan, module = (make_module(backbone, make(), {}, lr=1e-4) for _ in range(2))
    device = Device(kind="cpu", precision="32-true", ranks=ranks(), parts=True)

    def peaks() -> list[tuple[int, int]]:
        module.build(seed=0)
        with together(), lockstep(), base_in_parts(module.model, torch.device("cpu"), adapter=module.adapter):
            return [(estimated(stage), allocated(stage)) for stage in stages[:2]]

    def estimated(stage: Stage) -> int:
        outline = outlined(plan, device)
        return estimate_stage(plan, data, stage, outline, device, micro=batch // ranks()).memory.peak

    def allocated(stage: Stage) -> int:
        parameters = list(module.model.parameters())
        held = [*parameters, *(p.grad for p in parameters if p.grad is not None), *module.model.buffers()]
        history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None)
        own: dict[str, Any] = {"folder": folder / f"{rank()}-{stage.index}", "history": history, "observers": []}
        before = held_bytes([local(one.detach()) for one in held])
        with watched_peak() as peak:
            train_stage(module=module, data=data, trainers=trainers, stage=stage, checkpoint_every_n_steps=0, **own)
        return before + peak.highest

    return trainers.launch(peaks)


def _alive() -> int:
    gc.collect()
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors()}
    return sum(storages.values())


def _tensors() -> list[Tensor]:
    found = [one for one in gc.get_objects() if issubclass(type(one), Tensor)]
    return [one.to_local() if hasattr(one, "to_local") else one for one in found]

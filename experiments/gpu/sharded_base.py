"""LoRA on a base that FSDP2 shards over processes, the adapter replicated: does it learn what one process learns?

python experiments/gpu/sharded_base.py --ranks 2

On CPUs by gloo. Every decoder layer is sharded (`fully_shard(layer, ignored_params=the adapter's leaves)`), the leaves
stay plain tensors whose gradients are averaged at the end of a step, as data parallel training here does it. Prints
the largest difference of the adapter after three steps of SGD, and what each process holds of the base.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.examples import Example
from residency.core.ranks import mean_gradients, rank, ranks
from residency.core.types import untyped
from residency.testing.tiny_models import write_backbone

STEPS, ROWS = 3, 8


def examples(step: int) -> list[Example]:
    """Rows of unequal length."""
    draw = torch.Generator().manual_seed(step)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(1, 257, (count,), generator=draw).tolist())

    lengths = torch.randint(4, 20, (ROWS, 2), generator=draw).tolist()
    return [
        Example.of(domain="a", row=str(i), prompt=tokens(p), completion=tokens(c)) for i, (p, c) in enumerate(lengths)
    ]


def shard_base(model: nn.Module) -> None:
    """Cut the frozen weights of every layer into one part per process."""
    mesh = init_device_mesh("cpu", (ranks(),))
    leaves = {p for p in model.parameters() if p.requires_grad}
    core: Any = model
    for layer in core.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh, ignored_params=leaves)
    fully_shard(model, mesh=mesh, ignored_params=leaves)


def held(model: nn.Module) -> int:
    """Bytes of frozen weights in this process."""
    local = [getattr(p, "to_local", lambda p=p: p)() for p in model.parameters() if not p.requires_grad]
    return sum(p.numel() * p.element_size() for p in local)


def learn(folder: Path, *, sharded: bool, checkpointed: bool) -> dict[str, Any]:
    """Three steps; the leaves and what is held."""
    backbone = CausalLM(path=str(folder), gradient_checkpointing=checkpointed)
    torch.manual_seed(0)
    model = lora(r=4, lora_alpha=8, target_modules="all-linear").attach(backbone.load())
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    if sharded:
        shard_base(model)
    model.train()
    leaves = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(leaves, lr=0.1)
    for step in range(STEPS):
        rows = examples(step)
        total = sum(one.targets for one in rows)
        batch = make_batch(rows[rank() :: ranks()], layout="packed")
        (backbone.nll(model, batch).sum() * ranks() / total).backward()
        if sharded:
            mean_gradients(leaves)
        nn.utils.clip_grad_norm_(leaves, 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {"leaves": [p.detach().clone() for p in leaves], "held": held(model)}


def _one(index: int, folder: str, count: int, checkpointed: bool) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29611", "RANK": str(index), "WORLD_SIZE": str(count)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = learn(Path(folder), sharded=True, checkpointed=checkpointed)
    torch.save(found, Path(folder) / f"rank-{index}.pt")
    dist.destroy_process_group()


def compare(count: int, *, checkpointed: bool) -> dict[str, Any]:
    """One process against several."""
    with tempfile.TemporaryDirectory() as name:
        folder = write_backbone(Path(name))
        alone = learn(folder, sharded=False, checkpointed=checkpointed)
        spawn: Any = untyped(mp).spawn
        spawn(_one, (name, count, checkpointed), nprocs=count)
        parts = [torch.load(folder / f"rank-{i}.pt", weights_only=True) for i in range(count)]

    def apart(a: list[Tensor], b: list[Tensor]) -> float:
        return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))

    largest = max(float(leaf.abs().max()) for leaf in alone["leaves"])
    return {
        "ranks": count,
        "checkpointed": checkpointed,
        "difference": max(apart(part["leaves"], alone["leaves"]) for part in parts) / largest,
        "between_ranks": max(apart(part["leaves"], parts[0]["leaves"]) for part in parts),
        "base_bytes_alone": alone["held"],
        "base_bytes": [part["held"] for part in parts],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    options = parser.parse_args()
    for checkpointed in (False, True):
        print(json.dumps(compare(options.ranks, checkpointed=checkpointed)), flush=True)

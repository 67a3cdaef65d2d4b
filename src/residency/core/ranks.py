"""The processes that train one stage together (ranks), and what they tell each other.

A process without a group is rank 0 of 1, and every function here does then what it says without sending anything.
Facts travel as JSON, tensors as their bytes: nothing is pickled.

Work that every rank would do alike is split only inside `together()`: all ranks are in the same place there. Outside
of it rank 0 may be alone (it writes the record, looks inside the model), and waiting for the others would never end.
Inside `lockstep()` a pass through the model is itself something that all ranks do at once: nothing is split then that
would give one of them more passes than another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from residency.core.parts import in_parts
from residency.core.trees import flatten_tree, unflatten_tree

__all__ = [
    "from_first",
    "gather_facts",
    "lockstep",
    "mean_gradients",
    "own_share",
    "rank",
    "ranks",
    "spread",
    "sum_by_name",
    "sum_over_ranks",
    "together",
    "tree_from_first",
]

T = TypeVar("T")
R = TypeVar("R")

_BUCKET = 8_000_000  # elements that are reduced at once: 32 MB

_together = False
_lockstep = False


def _grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Which of the processes this one is; 0 writes."""
    return dist.get_rank() if _grouped() else 0


def ranks() -> int:
    """How many processes train together."""
    return dist.get_world_size() if _grouped() else 1


@contextmanager
def together() -> Iterator[None]:
    """Inside, every rank runs the same code, and `spread`, `own_share` and `sum_over_ranks` split it."""
    global _together
    before, _together = _together, True
    try:
        yield
    finally:
        _together = before


@contextmanager
def lockstep(wanted: bool = True) -> Iterator[None]:
    """Inside, every rank passes the model as often as the others, at the same time: its weights are in parts.

    Of `own_share` every rank has everything, so that sums over ranks count all of it as often as there are ranks, and
    means stay what they are. `spread` splits what takes one pass per item; whoever has none left repeats the last one.

    Args:
        wanted: Whether they do; otherwise nothing changes.
    """
    global _lockstep
    before, _lockstep = _lockstep, wanted
    try:
        yield
    finally:
        _lockstep = before


def _adds() -> bool:
    return _together and ranks() > 1


def _splits() -> bool:
    return _adds() and not _lockstep


# -- facts ----------------------------------------------------------------------------------------------------------


def gather_facts(fact: Any) -> list[Any]:
    """What every rank says, in their order. Called by all ranks.

    Args:
        fact: A JSON value; numbers arrive as they are, NaN included.
    """
    if ranks() == 1:
        return [fact]
    own = _bytes(fact)
    sizes = [own.new_zeros(1, dtype=torch.int64) for _ in range(ranks())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=own.device))
    longest = max(int(size) for size in sizes)
    parts = [own.new_zeros(longest) for _ in sizes]
    dist.all_gather(parts, torch.cat([own, own.new_zeros(longest - len(own))]))
    return [json.loads(bytes(part[: int(size)].tolist())) for part, size in zip(parts, sizes, strict=True)]


def from_first(fact: Any) -> Any:
    """What rank 0 says (a JSON value). Called by all ranks; the others' own is ignored."""
    if ranks() == 1:
        return fact
    own = _bytes(fact) if rank() == 0 else _bytes(None)
    size = torch.tensor([len(own)], device=own.device)
    dist.broadcast(size, 0)
    told = own if rank() == 0 else own.new_zeros(int(size))
    dist.broadcast(told, 0)
    return json.loads(bytes(told.tolist()))


def tree_from_first(tree: Mapping[str, Any] | None) -> Any:
    """A tree of tensors and JSON values (`core.trees`) of rank 0, bit for bit, on the CPU. Called by all ranks."""
    if ranks() == 1:
        return tree
    plain, tensors = flatten_tree(tree) if rank() == 0 else (None, {})
    shapes = [[name, str(t.dtype).removeprefix("torch."), list(t.shape)] for name, t in tensors.items()]
    plain, shapes = from_first([plain, shapes])
    for name, dtype, shape in shapes:
        sent = tensors[name] if rank() == 0 else torch.empty(shape, dtype=getattr(torch, dtype))
        flat = sent.detach().to(_device()).contiguous().reshape(-1).view(torch.uint8)
        if flat.numel():
            dist.broadcast(flat, 0)
        tensors[name] = flat.view(sent.dtype).reshape(sent.shape).cpu()
    return unflatten_tree(plain, tensors)


# -- numbers --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def mean_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace the gradients of all ranks by their mean, with equal bits on every rank. Called by all ranks.

    A parameter without a gradient on this rank counts as zero if another one has one, else it stays without. Of one
    that is in parts every rank has its part of the mean already.
    """
    leaves = [p for p in parameters if p.requires_grad and not in_parts(p)]
    reached = torch.tensor([p.grad is not None for p in leaves], dtype=torch.uint8, device=_device())
    dist.all_reduce(reached, op=dist.ReduceOp.MAX)
    for bucket in _buckets([p for p, somewhere in zip(leaves, reached.tolist(), strict=True) if somewhere]):
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
        flat = torch.cat([part.reshape(-1).float() if part.element_size() < 4 else part.reshape(-1) for part in parts])
        dist.all_reduce(flat)
        flat /= ranks()
        for p, part, mean in zip(bucket, parts, flat.split([part.numel() for part in parts]), strict=True):
            p.grad = part.copy_(mean.view_as(part))


def _buckets(leaves: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    for p in leaves:
        alike = not bucket or (p.dtype, p.device) == (bucket[0].dtype, bucket[0].device)
        if bucket and not (alike and sum(q.numel() for q in bucket) + p.numel() <= _BUCKET):
            yield bucket
            bucket = []
        bucket.append(p)
    if bucket:
        yield bucket


def sum_over_ranks(value: Tensor) -> Tensor:
    """The sum of what the ranks have, added in float64; inside `together()`, else the value itself."""
    if not _adds():
        return value
    total = value.detach().to(_device(), torch.float64, copy=True)
    dist.all_reduce(total)
    return total.to(value.device, value.dtype)


def sum_by_name(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`sum_over_ranks` of tensors by name; a name that a rank lacks counts as zero there."""
    if not _adds():
        return dict(values)
    own = {name: list(value.shape) for name, value in values.items()}
    shapes = {name: shape for told in gather_facts(own) for name, shape in told.items()}
    like = next(iter(values.values()), torch.zeros(0))
    missing = {name: like.new_zeros(shape) for name, shape in shapes.items() if name not in values}
    return {name: sum_over_ranks({**missing, **values}[name]) for name in sorted(shapes)}


# -- work -----------------------------------------------------------------------------------------------------------


def own_share(items: Iterable[T]) -> Iterator[T]:
    """Those of some items that are this rank's to work on: every W-th; all of them outside of `together()`."""
    return islice(items, rank(), None, ranks()) if _splits() else iter(items)


def spread(function: Callable[[T], R], items: Sequence[T], *, one_pass: bool = False) -> list[R]:
    """What a function makes of every item, each computed by one rank and known to all.

    Args:
        function: Gives a JSON value, a function of the item alone.
        items: The same on all ranks.
        one_pass: Whether it passes the model once, whatever the item. If not, every rank does everything in
            `lockstep()`.
    """
    if not (_splits() or (_adds() and one_pass)):
        return [function(item) for item in items]
    # In lockstep all ranks make as many passes: what whoever has no item left finds is not looked at.
    end = -(-len(items) // ranks()) * ranks() if _lockstep else len(items)
    found = [function(items[min(i, len(items) - 1)]) for i in range(rank(), end, ranks())]
    gathered = gather_facts(found)
    return [gathered[i % len(gathered)][i // len(gathered)] for i in range(len(items))]


def _bytes(fact: Any) -> Tensor:
    return torch.tensor(list(json.dumps(fact).encode()), dtype=torch.uint8, device=_device())


def _device() -> torch.device:
    """Where a collective wants its tensors."""
    nccl = _grouped() and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")

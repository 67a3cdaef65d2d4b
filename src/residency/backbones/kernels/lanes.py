"""Parts of a packed row side by side, in threads of their own, instead of every operation by all threads.

Examples of a packed row do not see each other, so the row may be cut between them. Each lane runs the whole model over
its share with its share of the threads: nobody waits at the end of every operation, and what one thread does anyway
(Python, small operations) is done for both at once. Gradients of the lanes are added in the order of the lanes: a run
gives the same bits again.
"""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from residency.backbones.kernels.autograd import apply, once_differentiable
from residency.core.types import Batch, segment_tokens

__all__ = ["run_in_lanes", "split"]

Run = Callable[[Batch], Tensor]
_Part = tuple[Batch, Tensor]
_Gradients = tuple[Tensor | None, ...]

_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
# A forked child has none of its parent's threads.
os.register_at_fork(after_in_child=_pools.clear)


def split(batch: Batch, lanes: int) -> list[_Part]:
    """A packed batch in parts of nearly equal numbers of tokens.

    Args:
        batch: Packed, with at least as many examples as there are lanes.
        lanes: How many parts.

    Returns:
        Per lane a batch of whole examples and, for each of its M' targets, its place among the batch's M.
    """
    sizes = [segment_tokens(segment) for segment in batch.segments]
    lane_of, loads = [0] * len(sizes), [0] * lanes
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):  # the longest first, to the emptiest lane
        lane_of[index] = min(range(lanes), key=loads.__getitem__)
        loads[lane_of[index]] += sizes[index]
    owner = torch.tensor(lane_of).repeat_interleave(torch.tensor(sizes))
    return [_part(batch, [i for i, lane in enumerate(lane_of) if lane == n], owner == n) for n in range(lanes)]


def _part(batch: Batch, members: Sequence[int], here: Tensor) -> _Part:
    """The examples `members` of a batch, whose tokens are those where `here`, (N,), is true."""
    mine = here[batch.target_at].nonzero().flatten()
    number = torch.zeros(len(batch.segments), dtype=torch.long)
    number[torch.tensor(members)] = torch.arange(len(members))
    part = Batch(
        layout="packed",
        input_ids=batch.input_ids[:, here],
        position_ids=batch.position_ids[:, here],
        attention_mask=None,
        segments=tuple(batch.segments[i] for i in members),
        target_at=(here.cumsum(0) - 1)[batch.target_at[mine]],
        targets=batch.targets[mine],
        target_example=number[batch.target_example[mine]],
        target_branch=batch.target_branch[mine],
        examples=tuple(batch.examples[i] for i in members),
    )
    return part, mine


def run_in_lanes(run: Run, batch: Batch, *, lanes: int, leaves: Sequence[Tensor]) -> Tensor:
    """`run(batch)`, computed lane by lane at the same time; differentiable once.

    Args:
        run: Batch -> (M, ...), a function of each example alone, without random numbers.
        batch: Packed, on the CPU.
        lanes: How many; the threads are divided among them.
        leaves: What `run` is differentiated with respect to, where gradients are on.

    Returns:
        (M, ...).
    """
    parts = split(batch, lanes)
    if torch.is_grad_enabled() and leaves:
        joined: Tensor = apply(_Lanes, run, parts, *leaves)
        return joined
    return _join(_side_by_side([partial(run, part) for part, _ in parts]), [places for _, places in parts])


class _Lanes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, run: Run, parts: Sequence[_Part], *leaves: Tensor) -> Tensor:
        found = _side_by_side([partial(_with_graph, run, part) for part, _ in parts])
        ctx.edges = [edge for edge, _ in found]
        ctx.places = [places for _, places in parts]
        ctx.leaves = leaves
        return _join([out for _, out in found], ctx.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> _Gradients:
        if ctx.edges is None:
            raise RuntimeError(
                "what was computed in lanes can be differentiated once; set model.backbone.lanes to 1 to keep its graph"
            )

        pairs = zip(ctx.edges, ctx.places, strict=True)
        found = _side_by_side(
            [partial(_gradients, edge, ctx.leaves, dy.index_select(0, places)) for edge, places in pairs]
        )
        ctx.edges = None
        return None, None, *map(_total, zip(*found, strict=True))


def _with_graph(run: Run, part: Batch) -> tuple[GradientEdge, Tensor]:
    with torch.enable_grad():
        out = run(part)
    # The edge keeps the graph and not the values, which are kept once, joined.
    return get_gradient_edge(out), out.detach()


def _gradients(edge: GradientEdge, leaves: Sequence[Tensor], dy: Tensor) -> _Gradients:
    return torch.autograd.grad(edge, leaves, dy, allow_unused=True)


def _total(gradients: Sequence[Tensor | None]) -> Tensor | None:
    known = [gradient for gradient in gradients if gradient is not None]
    return sum(known[1:], known[0]) if known else None


def _join(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    whole = parts[0].new_empty(sum(map(len, places)), *parts[0].shape[1:])
    for part, at in zip(parts, places, strict=True):
        whole.index_copy_(0, at, part)
    return whole


def _side_by_side(calls: Sequence[Callable[[], Any]]) -> list[Any]:
    """Results in order; every call in a thread of its own, as if it ran here."""
    pool = _pool(len(calls), max(1, torch.get_num_threads() // len(calls)))
    inference, gradient = torch.is_inference_mode_enabled(), torch.is_grad_enabled()
    here = [partial(contextvars.copy_context().run, _as_here, call, inference, gradient) for call in calls]
    futures = [pool.submit(call) for call in here]
    return [future.result() for future in futures]


def _as_here(call: Callable[[], Any], inference: bool, gradient: bool) -> Any:
    with torch.inference_mode(inference), torch.set_grad_enabled(gradient):
        return call()


def _use(threads: int) -> None:
    torch.set_num_threads(threads)
    # A thread adopts the number of the whole process when it first asks, and only then: ask while that is ours.
    torch.get_num_threads()


def _pool(lanes: int, threads: int) -> ThreadPoolExecutor:
    """Threads that have been told how many threads they may use."""
    if (lanes, threads) not in _pools:
        ours = torch.get_num_threads()
        started = threading.Barrier(lanes + 1)
        pool = ThreadPoolExecutor(lanes, "lane", initializer=_use, initargs=(threads,))
        for _ in range(lanes):
            pool.submit(started.wait)
        started.wait()
        # The number is also what threads that come later begin with.
        torch.set_num_threads(ours)
        _pools[lanes, threads] = pool
    return _pools[lanes, threads]

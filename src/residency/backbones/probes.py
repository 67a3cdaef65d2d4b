"""What a model answers on a few short texts: logits and one gradient, in any layout, comparable across layouts.

The gradient is that of the summed loss with respect to the rows of the embedding: it has passed through every layer,
and it does not depend on how texts lie in a batch (a prompt that is read once for its branches gets the sum of theirs).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residency.core.batching import make_batch
from residency.core.types import Batch, Example, Layout, untyped

__all__ = [
    "Answers",
    "beyond_reach",
    "difference",
    "narrowed",
    "probe_texts",
    "read_batch",
    "read_one_by_one",
    "sees_later_tokens",
]

Loss = Callable[[nn.Module, Batch], Tensor]

_WINDOW = 8
"""Tokens that a sliding window or a chunk is cut down to: the longest text is two and a half times as long."""
_NARROW = ("sliding_window", "attention_chunk_size")
_FAR = re.compile("window|chunk|index_topk|compress|block_size|stride")
_NEAR = re.compile("layers|feed_forward|pattern|head_chunk")
_LONGEST = 21


class Answers(NamedTuple):
    """What a model answers.

    Attributes:
        logits: (M, V) at the supervised positions, in the order of `Batch.targets`.
        gradient: (U, D) of the summed nll with respect to the embedding's row of each of the U tokens that occur.
    """

    logits: Tensor
    gradient: Tensor


def probe_texts(*, vocabulary: int, longest: int) -> tuple[list[Example], list[Example]]:
    """Texts that are supervised everywhere, and prompts with branches that are supervised at their ends.

    Args:
        vocabulary: Token ids are below it.
        longest: Positions that the model has.
    """
    draw = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        ids = torch.randint(min(1, vocabulary - 1), vocabulary, (max(1, min(count, longest - 1)),), generator=draw)
        return tuple(ids.tolist())

    whole = [Example.of(domain="probe", row=str(n), prompt=tokens(1), completion=tokens(n)) for n in (20, 11, 4)]
    ends = []
    for n in (min(13, max(1, longest - 4)), 6):
        first, second = tokens(3), tokens(3)
        # One branch parts from the completion behind its first token, another at once.
        branches = ((first[0], *second[1:]), (second[0],))
        ends.append(Example.of(domain="probe", row=str(n), prompt=tokens(n), completion=first, alternatives=branches))
    return whole, ends


def read_one_by_one(model: nn.Module, examples: Sequence[Example]) -> Answers:
    """Every text (and every branch with its prompt) alone, without padding, masks or positions: what is right."""
    rows, total = [], torch.zeros(())
    with _embedding_rows(model, examples) as rows_read:
        for example in examples:
            for branch in (example.completion, *example.alternatives):
                ids = torch.tensor([[*example.prompt, *branch[:-1]]], device=_device(model))
                logits = model(input_ids=ids, use_cache=False).logits[0, len(example.prompt) - 1 :]
                targets = torch.tensor(branch, device=logits.device)
                total = total.to(logits.device) + F.cross_entropy(logits.float(), targets, reduction="sum")
                rows.append(logits.detach())
        untyped(total).backward()
        return Answers(torch.cat(rows), rows_read())


def read_batch(model: nn.Module, examples: Sequence[Example], layout: Layout, *, logits: Loss, nll: Loss) -> Answers:
    """The same texts in one batch.

    Args:
        model: In evaluation mode.
        examples: As for `read_one_by_one`.
        layout: Of the batch.
        logits: (M, V) of a batch.
        nll: (M,) of a batch, as it is trained.
    """
    batch = make_batch(examples, layout=layout).to(_device(model))
    with torch.no_grad():
        found = logits(model, batch)
    with _embedding_rows(model, examples) as rows_read:
        untyped(nll(model, batch).sum()).backward()
        return Answers(found, rows_read())


def difference(expected: Answers, found: Answers) -> tuple[float, float]:
    """Largest deviation of logits and of gradient, each over the largest value that is expected."""
    if any(e.shape != f.shape for e, f in zip(expected, found, strict=True)):
        return float("inf"), float("inf")
    logits, gradient = (
        float((e.double() - f.double()).abs().max() / e.double().abs().max().clamp_min(1e-12))
        for e, f in zip(expected, found, strict=True)
    )
    return logits, gradient


@torch.no_grad()
def sees_later_tokens(model: nn.Module, example: Example) -> bool:
    """Whether a token's logits depend on the tokens behind it.

    A leak is small where weights are random and small, so it is measured against what the change does where it may.
    """
    ids = torch.tensor([[*example.prompt, *example.completion]], device=_device(model))
    at = ids.shape[1] // 2
    changed = ids.clone()
    changed[:, at:] = changed[:, at:].flip(1)
    moved = (model(input_ids=ids, use_cache=False).logits - model(input_ids=changed, use_cache=False).logits).abs()
    return bool(moved[:, :at].max() > 1e-5 * moved.max())


def beyond_reach(config: Any) -> str:
    """A number of the config that tells of far tokens apart from near ones, and that short texts do not reach; or ''.

    Sparse and compressed attention begin behind so many tokens (`index_topk`, `compress_rate`): what a check with
    short texts finds says nothing about them.
    """
    for owner in (config, config.get_text_config()):
        for name, value in sorted(vars(owner).items()):
            known = name in _NARROW or not _FAR.search(name) or _NEAR.search(name)
            if not known and isinstance(value, int) and not isinstance(value, bool) and value >= _LONGEST:
                return f"{name} = {value}"
    return ""


@contextmanager
def narrowed(model: nn.Module) -> Iterator[bool]:
    """Windows and chunks cut down, so that short texts reach beyond them; whether there is any."""
    owners: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        for owner in (module, config, getattr(config, "text_config", None)):
            if owner is not None:
                owners[id(owner)] = owner
    wide = [
        (owner, name, value)
        for owner in owners.values()
        for name in _NARROW
        if isinstance(value := vars(owner).get(name), int) and not isinstance(value, bool) and value > _WINDOW
    ]
    for owner, name, _ in wide:
        setattr(owner, name, _WINDOW)
    try:
        yield bool(wide)
    finally:
        for owner, name, value in wide:
            setattr(owner, name, value)


@contextmanager
def _embedding_rows(model: nn.Module, examples: Sequence[Example]) -> Iterator[Callable[[], Tensor]]:
    """Collects the gradients of the embedding's rows; nothing else of the model gets one."""
    used = {0, *(t for e in examples for part in (e.prompt, e.completion, *e.alternatives) for t in part)}
    table = torch.tensor(sorted(used), device=_device(model))
    read: list[tuple[Tensor, Tensor]] = []
    embedding = untyped(model).get_input_embeddings()
    own = vars(embedding).get("forward")

    # Not a hook: kernels step aside where somebody has hooked in.
    def forward(self: Any, ids: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plain = own or MethodType(type(self).forward, self)
        leaf: Tensor = plain(ids, *args, **kwargs).detach().requires_grad_()
        read.append((ids, leaf))
        return leaf.clone()  # some models write into what they get

    def collect() -> Tensor:
        total = torch.zeros(len(table), read[0][1].shape[-1], device=table.device)
        for ids, leaf in read:
            if leaf.grad is not None:
                at = torch.searchsorted(table, ids.flatten())
                total.index_add_(0, at, leaf.grad.flatten(0, -2).float())
        return total

    wanted = [p for p in model.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    embedding.forward = MethodType(forward, embedding)
    try:
        with torch.enable_grad():
            yield collect
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        del embedding.forward
        if own is not None:
            embedding.forward = own


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device

"""Head and cross-entropy in one node, a few rows at a time: the logits of a batch never exist as a whole.

For one position with features h and target y the loss is L = log sum_v exp(w_v . h) - w_y . h, so that

    dL/dh = sum_v p_v w_v - w_y,        dL/dw_v = (p_v - [v = y]) h,        p = softmax(W h)

dL/dh is computed with the loss, while the logits of these rows are at hand, and scaled in the backward pass: with a
frozen head nothing else is needed, and memory does not grow with the vocabulary. A head that is trained keeps p where
that is small, and computes it again where it is not.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from residency.backbones.kernels.autograd import apply, once_differentiable
from residency.backbones.kernels.hooks import watched
from residency.core.types import untyped

__all__ = ["bare_head", "free_head", "head_nll", "without_head"]

_CHUNK = 16_000_000
"""Logits at a time, 64 MB: half as many cost a tenth more time, four times as many save nothing (CPU, V = 49152)."""
_KEEP = 64_000_000
"""Probabilities that a trained head may keep for its backward pass: 256 MB."""
_DTYPES = (torch.float32, torch.float64, torch.bfloat16)  # float16 would lose small probabilities
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}
_LOOSE = 5e-2

_bare: ContextVar[bool] = ContextVar("bare", default=False)


def head_nll(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
    """Negative log-likelihood of each target under softmax(W h + b); differentiable once.

    Args:
        features: (M, D).
        weight: (V, D).
        bias: (V,) or `None`.
        targets: (M,).

    Returns:
        (M,) in nats, float32 (float64 for float64 features).
    """
    nll: Tensor = apply(_HeadNLL, features, weight, bias, targets)
    return nll


class _HeadNLL(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.trained = any(ctx.needs_input_grad[1:3])
        ctx.kept = ctx.trained and len(features) * len(weight) <= _KEEP
        losses, saved = [], []
        for h, y in _chunks(features, targets, vocabulary=len(weight)):
            powers, total, nll = _softmax(h, weight, bias, y)
            losses.append(nll)
            if ctx.kept:
                saved.append(powers.div_(total))
            elif ctx.needs_input_grad[0]:
                saved.append((powers.to(weight.dtype) @ weight).div_(total.to(weight.dtype)).sub_(weight[y]))
        ctx.save_for_backward(features if ctx.trained else None, weight, bias, targets, _joined(saved))
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        features, weight, bias, targets, saved = ctx.saved_tensors
        needs = ctx.needs_input_grad
        of_features = of_weight = of_bias = None
        if ctx.kept:
            error = _error(saved, targets, dy).to(weight.dtype)
            of_features = error @ weight if needs[0] else None
            of_weight, of_bias = error.T @ features, error.sum(0)
        else:
            of_features = saved * dy[:, None].to(saved.dtype) if needs[0] else None
            if ctx.trained:
                of_weight, of_bias = _again(features, weight, bias, targets, dy)
        return of_features, of_weight if needs[1] else None, of_bias if needs[2] else None, None


def _joined(parts: Sequence[Tensor]) -> Tensor | None:
    return None if not parts else parts[0] if len(parts) == 1 else torch.cat(tuple(parts))


def _chunks(*tensors: Tensor, vocabulary: int) -> Iterator[tuple[Tensor, ...]]:
    # Rows that are shared out evenly: a last chunk of one row would read the whole head for it.
    parts = max(1, -(-len(tensors[0]) * vocabulary // _CHUNK))
    yield from zip(*(tensor.tensor_split(parts) for tensor in tensors), strict=True)


def _softmax(h: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(exp(z - max z) (m, V), their sums (m, 1), nll (m,)) of a few rows: one exponential per logit."""
    logits = F.linear(h, weight, bias)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logits = logits.sub_(logits.amax(-1, keepdim=True))
    own = logits.gather(1, y[:, None])
    powers = logits.exp_()
    total = powers.sum(-1, keepdim=True)
    return powers, total, (total.log() - own)[:, 0]


def _error(p: Tensor, y: Tensor, dy: Tensor) -> Tensor:
    """dL/dz = dy (p - onehot(y)), (m, V)."""
    error = p * dy[:, None]
    return error.scatter_add_(1, y[:, None], -dy[:, None])


def _again(features: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias, the probabilities computed again."""
    of_weight, of_bias = torch.zeros_like(weight), weight.new_zeros(len(weight))
    for h, y, g in _chunks(features, targets, dy, vocabulary=len(weight)):
        powers, total, _ = _softmax(h, weight, bias, y)
        error = _error(powers.div_(total), y, g).to(weight.dtype)
        of_weight.addmm_(error.T, h)
        of_bias += error.sum(0)
    return of_weight, of_bias


# -- a model without its head -----------------------------------------------------------------------------------------


@contextmanager
def without_head() -> Iterator[None]:
    """A model whose head is free gives features instead of logits."""
    token = _bare.set(True)
    try:
        yield
    finally:
        _bare.reset(token)


class _Free:
    """The forward of a head that can be left out."""

    def __init__(self, head: nn.Module) -> None:
        self._head = head

    def __call__(self, x: Tensor) -> Tensor:
        return x if _bare.get() else nn.Linear.forward(untyped(self._head), x)


def free_head(model: nn.Module) -> bool:
    """Let the head be left out, where it is a plain layer behind which the model does nothing (a cap, a scale).

    Args:
        model: On any device.

    Returns:
        Whether it can be: found by trying.
    """
    head = _output(model)
    if type(head) is not nn.Linear or head.weight.dtype not in _DTYPES:
        return False
    untyped(head).forward = _Free(head)
    if not _is_last(model, head):
        del head.forward
        return False
    return True


def bare_head(model: nn.Module) -> nn.Linear | None:
    """The head of a model, with or without adapter, if it can be left out now: not wrapped, and nobody watches it."""
    head = _output(model)
    if type(head) is not nn.Linear or not isinstance(vars(head).get("forward"), _Free) or watched(head):
        return None
    return None if torch.is_autocast_enabled(head.weight.device.type) or watched(model) else head


def _output(model: nn.Module) -> Any:
    unwrap: Any = getattr(model, "get_base_model", None)
    core: Any = unwrap() if unwrap else model
    find = getattr(core, "get_output_embeddings", None)
    return find() if find else None


@torch.no_grad()
def _is_last(model: nn.Module, head: nn.Linear) -> bool:
    """Whether features come out as the head has got them, and logits as it has made them."""
    ids = torch.arange(min(4, head.out_features), device=head.weight.device)[None]
    read: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    try:
        logits = model(input_ids=ids, use_cache=False).logits
        with without_head():
            features = model(input_ids=ids, use_cache=False).logits
    except (TypeError, ValueError, RuntimeError, AttributeError, IndexError):
        return False
    finally:
        handle.remove()
    if len(read) != 2 or not torch.equal(features.to(read[1].dtype), read[1]):
        return False
    made = F.linear(read[0], head.weight, head.bias).to(logits.dtype)
    if made.shape != logits.shape:
        return False
    return bool((made - logits).abs().max() <= _TOLERANCE.get(head.weight.dtype, _LOOSE) * made.abs().max())

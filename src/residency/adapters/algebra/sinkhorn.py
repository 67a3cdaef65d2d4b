"""Mixing matrices of virtual streams: doubly stochastic by construction, by Sinkhorn's iterations, or free."""

from __future__ import annotations

from itertools import permutations
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = [
    "MIXER",
    "Mixer",
    "Mixing",
    "add_mixer",
    "birkhoff",
    "initial_logits",
    "mix",
    "mixers",
    "mixing_matrix",
    "mixing_parameters",
    "residual",
    "sinkhorn",
]

MIXER = "residency_mixing"
"""Name of the mixer inside a block."""

Mixing = Literal["exact", "sinkhorn", "unconstrained"]
"""`exact`: convex combination of all permutations. `sinkhorn`: normalised rows and columns in turn.
`unconstrained`: the matrix itself is the parameter."""


def sinkhorn(logits: Tensor, *, iterations: int = 20, eps: float = 1e-6) -> Tensor:
    """Nearly doubly stochastic: softmax over rows, then columns and rows in turn (Sinkhorn and Knopp 1967).

    The order is that of manifold-constrained hyper-connections (arXiv 2512.24880): the axis that is normalised last,
    the columns, sums to one; the rows do up to what `iterations` leave.

    Args:
        logits: (k, k).
        iterations: Column normalisations, at least 1.
        eps: Added to what is divided by.

    Returns:
        (k, k) float32.
    """
    m = torch.softmax(logits.float(), dim=-1) + eps
    m = m / (m.sum(0, keepdim=True) + eps)
    for _ in range(iterations - 1):
        m = m / (m.sum(1, keepdim=True) + eps)
        m = m / (m.sum(0, keepdim=True) + eps)
    return m


def birkhoff(logits: Tensor, *, streams: int) -> Tensor:
    """Exactly doubly stochastic: a convex combination of all permutation matrices (arXiv 2601.05732).

    Args:
        logits: (k!,).
        streams: k.

    Returns:
        (k, k) float32.
    """
    orders = torch.tensor(list(permutations(range(streams))), device=logits.device)
    matrices = torch.eye(streams, device=logits.device)[orders]
    return torch.einsum("p,pij->ij", torch.softmax(logits.float(), dim=0), matrices)


def mixing_matrix(logits: Tensor, *, kind: Mixing, streams: int, iterations: int = 20) -> Tensor:
    """(k, k) from the parameters of one kind: (k!,) if exact, (k, k) otherwise."""
    if kind == "exact":
        return birkhoff(logits, streams=streams)
    if kind == "sinkhorn":
        return sinkhorn(logits, iterations=iterations)
    return logits.float()


def initial_logits(
    *, kind: Mixing, streams: int, spread: float = 0.1, generator: torch.Generator | None = None
) -> Tensor:
    """Small random parameters: far from the identity, so that the gate has a gradient while it is still zero.

    The unconstrained arm starts at the very matrix of the Sinkhorn arm, so that arms differ by the constraint alone.

    Args:
        kind: Of the matrix.
        streams: k.
        spread: Standard deviation.
        generator: What is drawn from; the global one by default. Kinds draw different numbers of values.
    """
    if kind == "exact":
        return spread * torch.randn(len(list(permutations(range(streams)))), generator=generator)
    logits = spread * torch.randn(streams, streams, generator=generator)
    return sinkhorn(logits) if kind == "unconstrained" else logits


def mix(h: Tensor, *, read: Tensor, write: Tensor, matrix: Tensor, gate: Tensor, log_alpha: Tensor) -> Tensor:
    """h + exp(log_alpha) reshape((M - I) z) W_w with z = reshape(h W_r) and M = (1 - gate) I + gate `matrix`.

    Only the difference to the identity is written: at gate 0 the result is h, bit for bit.

    A doubly stochastic M has spectral norm 1, but the map of h has the matrix I + exp(log_alpha) W_r ((M - I) ⊗ I) W_w,
    whose norm is 1 only where exp(log_alpha) <= 1, W_r has orthonormal columns and W_w is its transpose: as at the
    start, not as trained. Two streams that change places at gate 1 give 2 exp(log_alpha) - 1, which is 1.71 at
    exp(log_alpha) = 1.355.

    Args:
        h: (..., D), the residual stream.
        read: W_r, (D, k r).
        write: W_w, (k r, D).
        matrix: (k, k) over the streams.
        gate: Scalar in 0 ... 1.
        log_alpha: Scalar.
    """
    k = matrix.shape[0]
    z = (h @ read).unflatten(-1, (k, -1))
    moved = gate * (torch.einsum("ij,...jr->...ir", matrix, z) - z)
    written: Tensor = log_alpha.exp() * (moved.flatten(-2) @ write)
    return h + written


def residual(matrix: Tensor) -> Tensor:
    """How far a matrix is from doubly stochastic: the largest |row or column sum - 1|."""
    return torch.maximum((matrix.sum(0) - 1).abs().max(), (matrix.sum(1) - 1).abs().max())


class Mixer(nn.Module):
    """The parameters of one block's mixing, in float32, and its equation."""

    def __init__(self, width: int, *, kind: Mixing, streams: int, rank: int, iterations: int) -> None:
        super().__init__()
        self.kind, self.streams, self.iterations = kind, streams, iterations
        read = nn.init.orthogonal_(torch.empty(width, streams * rank))
        self.read = nn.Parameter(read)
        self.write = nn.Parameter(read.T.clone())
        # One draw, whatever the kind: all arms have the same W_r, and the same draws in everything that follows.
        generator = torch.Generator().manual_seed(int(torch.randint(2**31 - 1, ())))
        self.logits = nn.Parameter(initial_logits(kind=kind, streams=streams, generator=generator))
        self.gate = nn.Parameter(torch.zeros(()))
        self.log_alpha = nn.Parameter(torch.zeros(()))
        self.enabled = True

    def matrix(self) -> Tensor:
        """(k, k), before it is blended with the identity."""
        return mixing_matrix(self.logits, kind=self.kind, streams=self.streams, iterations=self.iterations)

    def forward(self, h: Tensor) -> Tensor:
        if not self.enabled:
            return h
        parts = {"read": self.read, "write": self.write, "gate": self.gate, "log_alpha": self.log_alpha}
        return mix(h.to(self.read.dtype), matrix=self.matrix(), **parts).to(h.dtype)


def _behind(block: nn.Module, args: Any, output: Any) -> Any:
    """Forward hook of a block; a function of the block, so that a deep copy of the model has its own."""
    mixer: Any = block.get_submodule(MIXER)
    return (mixer(output[0]), *output[1:]) if isinstance(output, tuple) else mixer(output)


def add_mixer(block: nn.Module, mixer: Mixer) -> None:
    """Put a mixer behind a block."""
    block.add_module(MIXER, mixer.to(next(block.parameters()).device))
    block.register_forward_hook(_behind)


def mixers(model: nn.Module) -> list[Mixer]:
    """All mixers of a model, from the bottom up."""
    return [module for module in model.modules() if isinstance(module, Mixer)]


def mixing_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of all mixers by their names in the model."""
    return {name: p for name, p in model.named_parameters() if f".{MIXER}." in name}

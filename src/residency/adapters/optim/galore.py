"""Gradients in a low-rank subspace (GaLore, Zhao et al. 2024), around any optimizer of torch.

The wrapped optimizer never sees a projected weight. It moves a proxy, which has the shape of the projected gradient
and starts every step at zero; how far the proxy moved is the update, which is projected back and added to the weight.
So any optimizer works unchanged, its moments have the low rank, and decay is applied to the weight itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

__all__ = ["GaLoreOptimizer", "lift", "project", "projector"]

_OWN = ("projector", "projected_steps")


def projector(gradient: Tensor, *, rank: int) -> Tensor:
    """The top singular subspace of a gradient on its smaller side (projection `std` of the paper's code).

    Args:
        gradient: (m, n).
        rank: r; capped at min(m, n).

    Returns:
        P with orthonormal rows, P Pᵀ = I: (r, n) if m >= n, else (r, m).
    """
    exact = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    u, _, vh = torch.linalg.svd(exact, full_matrices=False)
    basis: Tensor = vh if gradient.shape[0] >= gradient.shape[1] else u.T
    # A copy: a view of the first rows would keep all singular vectors in memory.
    return basis[:rank].to(gradient.dtype).clone(memory_format=torch.contiguous_format)


def project(gradient: Tensor, p: Tensor) -> Tensor:
    """Into the subspace: (m, n) -> G Pᵀ (m, r) if m >= n, else P G (r, n)."""
    return gradient @ p.T if gradient.shape[0] >= gradient.shape[1] else p @ gradient


def lift(low: Tensor, p: Tensor, shape: Sequence[int]) -> Tensor:
    """Out of the subspace: low P if m >= n, else Pᵀ low; both (m, n) = `shape`."""
    return low @ p if shape[0] >= shape[1] else p.T @ low


def _low_shape(shape: Sequence[int], rank: int) -> tuple[int, int]:
    m, n = shape
    r = min(rank, m, n)
    return (m, r) if m >= n else (r, n)


class GaLoreOptimizer(Optimizer):
    """Steps some matrices in a low-rank subspace of their gradients, and everything else plainly.

    Every `gap` steps a matrix gets the subspace of its present gradient; the moments are not rotated with it, as in
    the paper's code. Weight decay of projected matrices is decoupled, whatever the wrapped optimizer does, and acts on
    the whole matrix before the update, as in `torch.optim.AdamW` (the paper's code decays after the update, which
    differs by lr² x decay x update).

    Full rank is not the wrapped optimizer: an element-wise one (Adam) is not invariant under a rotation. With SGD,
    with or without momentum, it is.

    `state_dict` is the wrapped optimizer's, with moments of low-rank shape, plus per projected matrix the tensor
    `projector` and the number `projected_steps`: tensors and numbers only.

    Args:
        projected: Matrices (m, n) that are stepped at low rank.
        plain: Everything else.
        factory: Makes the wrapped optimizer from parameter groups.
        rank: r; capped at min(m, n).
        gap: Steps between two new subspaces.
        scale: Factor of the update that is projected back.
    """

    def __init__(
        self,
        *,
        projected: Sequence[Tensor],
        plain: Sequence[Tensor],
        factory: Callable[[Iterable[Any]], Optimizer],
        rank: int,
        gap: int,
        scale: float,
    ) -> None:
        self.rank, self.gap, self.scale = rank, gap, scale
        self._proxies = {p: nn.Parameter(p.new_zeros(_low_shape(p.shape, rank))) for p in projected}
        sides = [(list(plain), list(plain)), (list(projected), list(self._proxies.values()))]
        sides = [side for side in sides if side[0]]
        self.inner = factory([{"params": seen} for _, seen in sides])
        groups = [{**g, "params": own} for g, (own, _) in zip(self.inner.param_groups, sides, strict=True)]
        self._complete = False
        super().__init__(groups, dict(self.inner.defaults))
        self._complete = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Parameters that are added later are stepped plainly."""
        super().add_param_group(param_group)
        if self._complete:
            self.inner.add_param_group({**param_group, "params": list(param_group["params"])})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Project, let the wrapped optimizer step, project back."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            theirs.update(self._for_inner(mine))
        for weight, proxy in self._proxies.items():
            self._descend(weight, proxy)
        self.inner.step()
        for mine, theirs in zip(self.param_groups, self.inner.param_groups, strict=True):
            # Some optimizers keep numbers of their own beside their options.
            mine.update({k: v for k, v in theirs.items() if k not in ("params", "weight_decay")})
            for weight in mine["params"]:
                if weight in self._proxies:
                    self._ascend(weight, self._proxies[weight], decay=mine["lr"] * mine.get("weight_decay", 0.0))
        return loss

    def _for_inner(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """What a scheduler or the user set; a proxy is not decayed, its weight is."""
        options = {k: v for k, v in group.items() if k != "params"}
        return options | ({"weight_decay": 0.0} if self._is_projected(group) else {})

    def _is_projected(self, group: Mapping[str, Any]) -> bool:
        return group["params"][0] in self._proxies

    def _descend(self, weight: Tensor, proxy: nn.Parameter) -> None:
        proxy.grad = None
        if weight.grad is None:
            return
        state = self.state[weight]
        steps = state.get("projected_steps", 0)
        if steps % self.gap == 0:
            state["projector"] = projector(weight.grad, rank=self.rank)
        state["projected_steps"] = steps + 1
        proxy.zero_()
        proxy.grad = project(weight.grad, state["projector"])

    def _ascend(self, weight: Tensor, proxy: nn.Parameter, *, decay: float) -> None:
        if proxy.grad is None:
            return
        weight.mul_(1 - decay)
        weight.add_(lift(proxy, self.state[weight]["projector"], weight.shape), alpha=self.scale)
        proxy.grad = None

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def _order(self) -> list[Tensor]:
        return [weight for group in self.param_groups for weight in group["params"]]

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers, in torch's own layout."""
        stored = self.inner.state_dict()
        state = {i: dict(entry) for i, entry in stored["state"].items()}
        for i, weight in enumerate(self._order):
            if weight in self._proxies and self.state[weight]:
                state[i] = {**state.get(i, {}), **self.state[weight]}
        groups = [
            {k: v for k, v in mine.items() if k != "params"} | {"params": theirs["params"]}
            for mine, theirs in zip(self.param_groups, stored["param_groups"], strict=True)
        ]
        return {"state": state, "param_groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore moments, subspaces, counters and options, bit for bit."""
        own, rest = {}, {}
        for i, entry in state_dict["state"].items():
            own[i] = {k: v for k, v in entry.items() if k in _OWN}
            if moments := {k: v for k, v in entry.items() if k not in _OWN}:
                rest[i] = moments
        groups = [
            {**saved, **({"weight_decay": 0.0} if self._is_projected(mine) else {})}
            for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True)
        ]
        self.inner.load_state_dict({"state": rest, "param_groups": groups})
        for mine, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            mine.update({k: v for k, v in saved.items() if k != "params"})
        for i, weight in enumerate(self._order):
            if found := own.get(i):
                self.state[weight] = {**found, "projector": found["projector"].to(weight.device, weight.dtype)}

"""Gradient projection memory (Saha et al. 2021): no step where the inputs of earlier domains are.

After a domain, the inputs R = (x_1 ... x_n) of every trainable matrix are looked at; M is spanned by the fewest
directions that hold the share ε of their energy, those remembered before included. From then on

    ΔW <- ΔW - ΔW M Mᵀ                                    so that ΔW x = 0 for x in the span of M

It is the UPDATE that is projected, weight decay included: Adam's update from a perfectly projected gradient had 16 % of
its norm inside the span. The memory is the one of DualGPM, which keeps the free directions where they are the fewer.

With LoRA, A and B are matrices with inputs of their own: x for A, and A x for B. Neither alone would do. With only A
projected, B still moves what A x is mapped to; with only B projected, A moves away under it. With both, A x and then
B A x stay what they were for every x in A's span whose A x is in B's span. B's inputs have r dimensions and soon use
them all: then B rests and A goes on learning in what is free (`used` says how far this is).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from residency.adapters.algebra.covariance import covariance_flops, input_covariances
from residency.adapters.algebra.dual_gpm import Memory, project, project_flops, remember, remember_flops, without
from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.types import Batch, Capability, Stage, Tensors
from residency.domains.sampler import learned_examples
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.constraints.linear_maps import LinearMap, kept_share, linear_maps, passes
from residency.mitigations.contract import StageModule

__all__ = ["GPM", "project_update"]


def project_update(before: Tensor, after: Tensor, memory: Memory, place: LinearMap) -> Tensor:
    """W + ΔW (I - M Mᵀ) for ΔW = after - before.

    Args:
        before: W, as stored.
        after: W + ΔW.
        memory: M, over the input features.
        place: Which axis these are.
    """
    step = place.by_input((after - before).to(memory.basis.dtype))
    return before + place.by_input(project(step, memory)).to(before.dtype)


class GPM(Mitigation):
    """Gradient projection memory, on updates.

    Args:
        energy: ε, share of the energy of a domain's inputs that later domains must not touch, in [0, 1]. 0 = off.
        growth: ε grows by this with every domain.
        samples: Examples of the finished domain whose inputs are looked at.
        rest: What happens from the second domain on to trainable tensors that have no input features (norms, biases,
            embeddings): `frozen`, without which nothing is guaranteed, as they move the inputs themselves; or `free`.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"inputs", "coordinates"})
    update_order: ClassVar[int] = 3
    requires: frozenset[Capability] = frozenset({"fixed_coordinates", "linear"})
    alternative: ClassVar[str] = "configs/mitigation/replay.yaml, or an adapter of linear layers (lora, full)"
    training_only: ClassVar[frozenset[str]] = frozenset({"rest"})

    def __init__(
        self,
        *,
        energy: float = 0.95,
        growth: float = 0.003,
        samples: int = 64,
        rest: Literal["frozen", "free"] = "frozen",
    ) -> None:
        super().__init__()
        if not 0 <= energy <= 1 or growth < 0 or samples < 1:
            raise UserError(
                f"GPM with energy={energy}, growth={growth}, samples={samples}",
                why="energy is a share in [0, 1] (0 = off), growth is at least 0, samples at least 1",
                fix="use the paper's energy: 0.95 and growth: 0.003",
            )
        self.energy = energy
        self.growth = growth
        self.samples = samples
        self.rest = rest
        self.add_state("basis", {})
        self.add_state("free", {})
        self.add_state("kept", torch.ones(()))
        self._reduced: tuple[Any, dict[str, Memory]] = (None, {})

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Project every matrix; nothing in the first domain."""
        memories = self.memories()
        if not memories:
            return after
        places = linear_maps(module.model, after)
        memories = self._outside_of_others(module, memories)

        def final(name: str) -> Tensor:
            if (place := places.get(name)) is None:
                return before[name] if self.rest == "frozen" else after[name]
            memory = memories.get(place.owner)
            return after[name] if memory is None else project_update(before[name], after[name], memory, place)

        projected = {name: final(name) for name in after}
        used = [(after[name], memories[place.owner]) for name, place in places.items() if place.owner in memories]
        module.backbone.work.multiplied(sum(project_flops(matrix, memory) for matrix, memory in used))
        self.state["kept"] = kept_share(before, after, projected)
        return projected

    @torch.no_grad()
    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Remember the inputs of the domain, as the final weights have them."""
        if self.energy == 0:
            return
        learned = learned_examples(module.dataset, stage.domain)
        order = permutation(len(learned), stage.seed, "gpm", stage.index)
        examples = [learned[i] for i in order[: self.samples]]
        owners = {place.owner for place in linear_maps(module.model, module.adapter.trainable(module.model)).values()}
        layers = {owner: module.model.get_submodule(owner) for owner in sorted(owners)}
        tokens = 0

        def observe() -> Iterator[Batch]:
            nonlocal tokens
            for batch in passes(module, examples):
                tokens += batch.tokens
                yield batch

        shared, covariances = input_covariances(layers, observe)
        memories, threshold = self.memories(), min(1.0, self.energy + self.growth * stage.index)
        found = {
            path: remember(memories.get(path), covariance, threshold=threshold)
            for path, covariance in covariances.items()
        }
        work = covariance_flops(covariances.values(), tokens=tokens)
        work += sum(remember_flops(memories.get(path), memory) for path, memory in found.items())
        module.backbone.work.multiplied(work)
        memories |= {path: found[first] for path, first in shared.items()}
        # As a checkpoint brings it back: a product with a transposed view is rounded in another order.
        self.state["basis"] = {path: memory.basis.contiguous() for path, memory in memories.items()}
        self.state["free"] = {path: torch.tensor(memory.free) for path, memory in memories.items()}

    def touches_training(self, index: int) -> bool:
        """Not at energy 0."""
        return self.energy > 0 and super().touches_training(index)

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`used`: mean share of input directions that are taken; `kept`: of the last update's norm."""
        shares = [memory.used / len(memory.basis) for memory in self.memories().values()]
        kept = self.state["kept"]
        assert isinstance(kept, Tensor)
        return {"used": sum(shares) / len(shares) if shares else 0.0, "kept": float(kept)}

    def _outside_of_others(self, module: StageModule, memories: dict[str, Memory]) -> dict[str, Memory]:
        """The memories such that projecting keeps what other mitigations have frozen; constant within a stage."""
        key = (module.stage.index, self.state["basis"])
        if self._reduced[0] is None or self._reduced[0][0] != key[0] or self._reduced[0][1] is not key[1]:
            frozen = module.frozen_inputs()
            self._reduced = (key, {path: without(m, frozen.get(path, ())) for path, m in memories.items()})
        return self._reduced[1]

    def memories(self) -> dict[str, Memory]:
        """What is remembered, by the path of the module that multiplies."""
        basis, free = self.state["basis"], self.state["free"]
        assert isinstance(basis, dict)
        assert isinstance(free, dict)
        return {path: Memory(basis[path], bool(free[path])) for path in basis}

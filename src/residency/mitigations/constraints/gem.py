"""Gradient episodic memory: a step must not raise the loss on stored examples of earlier domains, to first order.

A-GEM (Chaudhry et al. 2019, eq. 11), one constraint from a draw over all earlier domains:

    g <- g - min(0, g·r) / ‖r‖² r                                   r = reference gradient, at the current weights

GEM (Lopez-Paz and Ranzato 2017, eq. 11), one constraint per earlier domain, in its dual:

    g <- g + Rᵀ v,   v = argmin_{v >= margin} ½ vᵀ R Rᵀ v + (R g)ᵀ v

Both act on the accumulated gradient before it is clipped. Adam rescales coordinates afterwards, so the step itself may
violate the constraint again; with plain SGD it does not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.types import Example, Stage, Tensors
from residency.domains.sampler import rememberable_examples
from residency.mitigations.base import Guarantee, Mitigation, State
from residency.mitigations.constraints.gradient_projection import project_agem, project_gem, reference_gradient
from residency.mitigations.contract import StageModule
from residency.mitigations.rehearsal.memory import into_reservoir, kept_rows, pack_examples, unpack_examples

__all__ = ["AGEM", "GEM"]


class AGEM(Mitigation):
    """Averaged gradient episodic memory: one constraint, from a draw over all earlier domains.

    Costs one forward and backward pass over `samples` examples per step. The memory is a reservoir over everything
    learned so far, as token ids; test rows can never enter it.

    Args:
        strength: Share of the conflicting part that is removed, in [0, 1]. 1 = the paper, 0 = off.
        capacity: Examples kept over all domains.
        samples: Examples per step from which the reference gradient is made.
        batch_tokens: Tokens per pass; changes memory, not the result.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"gradient"})
    gradient_order: ClassVar[int] = 1
    follows = Mitigation.follows - {"prompt"}
    keeps_examples = True
    training_only: ClassVar[frozenset[str]] = frozenset({"strength", "samples", "batch_tokens"})

    def __init__(
        self, *, strength: float = 1.0, capacity: int = 500, samples: int = 8, batch_tokens: int = 2048
    ) -> None:
        super().__init__()
        _check("AGEM", strength=strength, capacity=capacity, samples=samples, batch_tokens=batch_tokens)
        self.strength = strength
        self.capacity = capacity
        self.samples = samples
        self.batch_tokens = batch_tokens
        self.add_state("seen", torch.zeros((), dtype=torch.long))
        self.add_state("buffer", pack_examples([]))
        self.add_state("steps", torch.zeros(2, dtype=torch.long))

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Project; the gradient itself in the first domain, and where it agrees with the past."""
        memory = _unpacked(self.state["buffer"])
        if not memory or self.strength == 0:
            return gradients
        drawn = _draw(memory, self.samples, module, self.name)
        reference = reference_gradient(module, drawn, list(gradients), batch_tokens=self.batch_tokens)
        final = project_agem(gradients, reference, strength=self.strength)
        self.state["steps"] = _counted(self.state["steps"], changed=final is not gradients)
        return final

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Offer what the domain was learned from to the reservoir, in order of appearance."""
        memory, seen = _unpacked(self.state["buffer"]), self.state["seen"]
        assert isinstance(seen, Tensor)
        new = rememberable_examples(module.dataset, stage.domain)
        kept = into_reservoir(memory, new, seen=int(seen), capacity=self.capacity, seed=stage.seed)
        self.state.update(seen=torch.tensor(int(seen) + len(new)), buffer=pack_examples(kept))

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def kept_rows(self) -> Mapping[str, int]:
        """{domain: rows of it in the memory}."""
        return kept_rows(_unpacked(self.state["buffer"]))

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`projected`: share of the steps with a memory so far whose gradient was corrected."""
        return {"projected": _share(self.state["steps"])}


class GEM(Mitigation):
    """Gradient episodic memory: one constraint per earlier domain, met at once by a small quadratic programme.

    Costs one forward and backward pass over `samples` examples per earlier domain and step, and as many gradients in
    memory. The paper uses the whole memory of a domain in every step: `samples` = `capacity`.

    Args:
        strength: Share of the correction that is made, in [0, 1]. 1 = the paper, 0 = off.
        margin: Smallest weight of every earlier domain in a correction (the paper's memory strength γ).
        ridge: Of the programme, relative to the mean square of the reference gradients.
        capacity: Examples kept per domain.
        samples: Examples of each earlier domain per step.
        batch_tokens: Tokens per pass; changes memory, not the result.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"gradient"})
    gradient_order: ClassVar[int] = 1
    follows = Mitigation.follows - {"prompt"}
    keeps_examples = True
    training_only: ClassVar[frozenset[str]] = frozenset({"strength", "margin", "ridge", "samples", "batch_tokens"})

    def __init__(
        self,
        *,
        strength: float = 1.0,
        margin: float = 0.5,
        ridge: float = 1e-3,
        capacity: int = 64,
        samples: int = 8,
        batch_tokens: int = 2048,
    ) -> None:
        super().__init__()
        _check("GEM", strength=strength, capacity=capacity, samples=samples, batch_tokens=batch_tokens)
        if margin < 0 or ridge < 0:
            raise UserError(
                f"GEM with margin={margin}, ridge={ridge}",
                why="both are at least 0: the smallest weight of a constraint, and what keeps the programme regular",
                fix="use margin: 0.5 and ridge: 0.001, or 0 for the exact projection",
            )
        self.strength = strength
        self.margin = margin
        self.ridge = ridge
        self.capacity = capacity
        self.samples = samples
        self.batch_tokens = batch_tokens
        self.add_state("buffer", pack_examples([]))
        self.add_state("steps", torch.zeros(2, dtype=torch.long))

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Project; the gradient itself in the first domain, and where it agrees with every earlier one."""
        memory = _unpacked(self.state["buffer"])
        if not memory or self.strength == 0:
            return gradients
        references = []
        for domain in dict.fromkeys(e.domain for e in memory):
            drawn = _draw([e for e in memory if e.domain == domain], self.samples, module, self.name, domain)
            references.append(reference_gradient(module, drawn, list(gradients), batch_tokens=self.batch_tokens))
        final = project_gem(gradients, references, margin=self.margin, ridge=self.ridge, strength=self.strength)
        self.state["steps"] = _counted(self.state["steps"], changed=final is not gradients)
        return final

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Keep a draw of what the domain was learned from."""
        learned = rememberable_examples(module.dataset, stage.domain)
        order = permutation(len(learned), stage.seed, "gem memory", stage.index)
        memory = [*_unpacked(self.state["buffer"]), *(learned[i] for i in order[: self.capacity])]
        self.state["buffer"] = pack_examples(memory)

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def kept_rows(self) -> Mapping[str, int]:
        """{domain: rows of it in the memory}."""
        return kept_rows(_unpacked(self.state["buffer"]))

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`projected`: share of the steps with a memory so far whose gradient was corrected."""
        return {"projected": _share(self.state["steps"])}


def _check(owner: str, *, strength: float, **counts: int) -> None:
    if 0 <= strength <= 1 and min(counts.values()) >= 1:
        return
    given = ", ".join(f"{name}={value}" for name, value in {"strength": strength, **counts}.items())
    raise UserError(
        f"{owner} with {given}",
        why="strength is a share in [0, 1] (0 = off), the others count and are at least 1",
        fix="correct these values in model.mitigations",
    )


def _unpacked(buffer: State) -> list[Example]:
    assert isinstance(buffer, dict)
    return unpack_examples(buffer)


def _draw(memory: Sequence[Example], samples: int, module: StageModule, *purpose: str) -> list[Example]:
    """Distinct examples for one step."""
    stage = module.stage
    order = permutation(len(memory), stage.seed, *purpose, stage.index, module.global_step)
    return [memory[i] for i in order[:samples]]


def _counted(steps: State, *, changed: bool) -> Tensor:
    assert isinstance(steps, Tensor)
    return steps + steps.new_tensor([1, int(changed)])


def _share(steps: State) -> float:
    assert isinstance(steps, Tensor)
    return float(steps[1]) / max(1.0, float(steps[0]))

"""Replay of earlier examples, as a mixture in the data set (Chaudhry et al. 2019)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import permutation, seed_of
from residency.core.types import Batch, Example, Stage
from residency.domains.sampler import rememberable_examples
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.rehearsal.memory import (
    Mixture,
    Source,
    fair_memory,
    into_reservoir,
    kept_rows,
    mixed_in,
    pack_examples,
    unpack_examples,
)
from residency.mitigations.rehearsal.mir import interference, most_interfered
from residency.mitigations.rehearsal.model_views import example_loss, mean_hidden
from residency.mitigations.rehearsal.selection import cumulative, herding_order, kmeans_order

__all__ = ["Replay"]

Policy = Literal["reservoir", "balanced", "ring", "herding", "kmeans"]
Draw = Literal["uniform", "loss", "mir"]


class Replay(Mitigation):
    """Mix examples of earlier domains into the batches.

    Old examples take the place of new ones, so steps and batch size stay what they are without replay. The memory
    holds training examples the model has learned from, as token ids; rows of a validation or test split are refused.

    Args:
        ratio: Share of a batch that is old, in [0, 1): exact over a run, spread evenly. 0 = off. May be 1 where
            `every` > 1.
        capacity: Examples kept over all domains.
        policy: Which examples are kept. `reservoir`: each ever learned from is as likely (Vitter 1985). The others give
            every domain the same number of places (to within one): `balanced` takes a random sample, `ring` the last
            that were seen, `herding` those whose mean last hidden state is that of the domain (Rebuffi et al. 2017),
            `kmeans` one per cluster of these states (Huang et al. 2021).
        every: Only every k-th batch holds old examples, `ratio` of it; with ratio 1 it is a replay batch.
        draw: Which of them are replayed. `loss`: with probability ∝ (nats per token when the stage before was
            finished)^exponent. `mir`: of a few candidates those that the coming step would hurt most (Aljundi et al.
            2019); costs a pass with and two without gradient per batch.
        exponent: Of `loss`; 0 = all alike.
        candidates: Of `mir`: drawn for each step.
        virtual_step: Of `mir`: length of the trial step, root mean square per parameter.
    """

    shardable = True
    reads_weights = False
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"slots"})
    keeps_examples = True
    training_only: ClassVar[frozenset[str]] = frozenset({"ratio", "every", "exponent", "candidates", "virtual_step"})

    def __init__(
        self,
        *,
        ratio: float = 0.25,
        capacity: int = 500,
        policy: Policy = "reservoir",
        every: int = 1,
        draw: Draw = "uniform",
        exponent: float = 1.0,
        candidates: int = 16,
        virtual_step: float = 1e-3,
    ) -> None:
        super().__init__()
        _check(ratio=ratio, capacity=capacity, every=every)
        _check_draw(draw=draw, ratio=ratio, exponent=exponent, candidates=candidates, virtual_step=virtual_step)
        if draw != "uniform" or policy in ("herding", "kmeans"):
            # They look at the answers of rows, and a prompt has none.
            self.follows = self.follows - {"prompt"}
        self.ratio = ratio
        self.capacity = capacity
        self.policy = policy
        self.every = every
        self.draw = draw
        self.exponent = exponent
        self.candidates = candidates
        self.virtual_step = virtual_step
        self.add_state("seen", torch.zeros((), dtype=torch.long))
        self.add_state("buffer", pack_examples([]))
        if draw == "mir":
            self.reads_weights = True
        if draw == "loss":
            self.add_state("losses", torch.zeros(0))
        self._view: tuple[object, list[Example]] = (None, [])
        self._retrieved: tuple[Any, tuple[Example, ...]] = (None, ())

    def transform_dataset(self, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Replace evenly spread positions by draws from the memory."""
        memory = self.memory()
        if not memory or self.ratio == 0:
            return dataset
        sums = None
        if self.draw == "loss":
            losses = self.state["losses"]
            assert isinstance(losses, Tensor)
            sums = cumulative(losses.tolist(), exponent=self.exponent)
        source = Source(name=self.name, memory=memory, ratio=self.ratio, sums=sums)
        return mixed_in(dataset, source, stage=stage, every=self.every)

    def transform_batch(self, module: StageModule, batch: Batch) -> Batch:
        """With `mir`: put the most interfered candidates in the old examples' places. A step without old or without
        new examples stays as it is.
        """
        if self.draw != "mir":
            return batch
        whole = batch.whole
        # Asked once per step, of all that is new in it: the answer is the same for each of its micro-batches.
        if self._retrieved[0] != (asked := (module.stage.index, module.global_step, whole.examples)):
            self._retrieved = (asked, self._retrieve(module, whole.examples))
        examples = self._retrieved[1]
        if examples == whole.examples:
            return batch
        own = module.objective.collate([examples[slot] for slot in whole.slots], layout=module.layout)
        return replace(own, part_of=replace(whole, examples=examples)).to(module.device)

    def _retrieve(self, module: StageModule, examples: tuple[Example, ...]) -> tuple[Example, ...]:
        """The examples of a global batch with the old ones replaced."""
        memory, stage = self.memory(), module.stage
        old, new = self._old_and_new(module, examples)
        if not old or not new:
            return examples
        order = permutation(len(memory), stage.seed, "mir", self.name, stage.index, module.global_step)
        pool = [memory[i] for i in order[: self.candidates]]
        rise = interference(module, new, pool, size=self.virtual_step)
        chosen = list(examples)
        for slot, best in zip(old, most_interfered(rise, len(old)), strict=True):
            chosen[slot] = pool[best]
        return tuple(chosen)

    def _old_and_new(self, module: StageModule, examples: Sequence[Example]) -> tuple[list[int], list[Example]]:
        """Its own slots of a global batch, and the examples that no rehearsal has put there."""
        if isinstance(mixture := module.dataset, Mixture):
            first = module.global_step * len(examples)
            sources = [mixture.source(first + slot) for slot in range(len(examples))]
            old = [i for i, source in enumerate(sources) if source is not None and source.name == self.name]
            return old, [e for e, source in zip(examples, sources, strict=True) if source is None]
        kept = {(e.domain, e.row) for e in self.memory()}
        old = [i for i, e in enumerate(examples) if (e.domain, e.row) in kept]
        return old, [e for e in examples if (e.domain, e.row) not in kept]

    def on_domain_end(self, module: Any, stage: Stage) -> None:
        """Offer every example the domain was learned from to the memory."""
        memory, seen = self.memory(), self.state["seen"]
        assert isinstance(seen, Tensor)
        new = rememberable_examples(module.dataset, stage.domain)
        if self.policy == "reservoir":
            memory = into_reservoir(memory, new, seen=int(seen), capacity=self.capacity, seed=stage.seed)
        else:
            memory = fair_memory(memory, new, capacity=self.capacity, rank=lambda n: self._rank(module, stage, new, n))
        self.state.update(seen=seen + len(new), buffer=pack_examples(memory))
        if self.draw == "loss":
            self.state["losses"] = example_loss(module, memory)

    def _rank(self, module: StageModule, stage: Stage, new: Sequence[Example], count: int) -> list[Example]:
        """The best `count` of a domain's examples, best first."""
        if self.policy == "ring":
            last = [module.dataset[position] for position in reversed(range(len(module.dataset)))]
            return rememberable_examples(last, stage.domain)[:count]
        if self.policy == "balanced":
            return [new[i] for i in permutation(len(new), stage.seed, "balanced", stage.index)[:count]]
        # In the order of their names, so that no choice depends on the order of training.
        named = sorted(new, key=lambda e: e.row)
        features = mean_hidden(module, named)
        if self.policy == "herding":
            return [named[i] for i in herding_order(features, count)]
        seed = seed_of(stage.seed, "clusters", stage.index)
        return [named[i] for i in kmeans_order(features, count, seed=seed)]

    def kept_rows(self) -> Mapping[str, int]:
        """{domain: rows of it in the memory}."""
        return kept_rows(self.memory())

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """What the memory holds: `examples`, and `bytes` of all state."""
        return {"examples": len(self.memory()), "bytes": self.state_bytes()}

    def rehearsal(self) -> tuple[float, int] | None:
        """Its share of the slots, in every how many-th batch."""
        return (self.ratio, self.every) if self.ratio > 0 else None

    def touches_training(self, index: int) -> bool:
        """Not at ratio 0."""
        return self.ratio > 0 and super().touches_training(index)

    def memory(self) -> list[Example]:
        """The examples that are kept, slot by slot."""
        buffer = self.state["buffer"]
        assert isinstance(buffer, dict)
        if self._view[0] is not buffer:
            self._view = buffer, unpack_examples(buffer)
        return list(self._view[1])


def _check(*, ratio: float, capacity: int, every: int) -> None:
    whole = ratio == 1 and every > 1
    if not (0 <= ratio < 1 or whole) or capacity < 1 or every < 1:
        raise UserError(
            f"Replay with ratio={ratio}, capacity={capacity}, every={every}",
            why="the ratio is the share of old examples in a batch, in [0, 1), and 1 only where the batches in between "
            "are new; capacity and every are at least 1",
            fix="for 25 % replay give ratio: 0.25; for a whole replay batch every 10 steps ratio: 1 and every: 10",
        )


def _check_draw(*, draw: Draw, ratio: float, exponent: float, candidates: int, virtual_step: float) -> None:
    if not exponent >= 0 or candidates < 1 or not virtual_step > 0:
        raise UserError(
            f"Replay with exponent={exponent}, candidates={candidates}, virtual_step={virtual_step}",
            why="p ∝ loss^exponent needs an exponent >= 0; mir needs a candidate and a step to try",
            fix="give exponent: 1.0, candidates: 16, virtual_step: 0.001",
        )
    if draw == "mir" and ratio == 1:
        raise UserError(
            "Replay with draw=mir and ratio=1",
            why="mir asks what a step on a batch's new examples would hurt, and such a batch has none",
            fix="give a ratio below 1, for example ratio: 0.5",
        )

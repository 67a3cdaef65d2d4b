"""Model soups (Wortsman et al. 2022): the mean of several states, of all or of those that help."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

from lightning.pytorch import Trainer

from residency.core.errors import UserError
from residency.core.tensors import snapshot, weighted_sum
from residency.core.types import Capability, Tensors
from residency.mitigations.base import Guarantee, Into, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.merging.states import (
    check_into,
    check_last,
    kept_states,
    remember,
    stage_weights,
    state_bytes,
)
from residency.mitigations.validation import validation_nll

__all__ = ["Soup", "greedy", "uniform"]


def uniform(states: Sequence[Tensors]) -> Tensors:
    """Their mean, name by name, when read; of a single state that very object. The order does not matter.

    Args:
        states: At least one; same names and shapes.
    """
    if len(states) == 1:
        return states[0]
    return weighted_sum([(1 / len(states), state) for state in states])


def greedy(scores: Sequence[float], score_of: Callable[[tuple[int, ...]], float]) -> tuple[int, ...]:
    """Which states a greedy soup takes: the best one, then in order of merit each that does not make the mean worse.

    Args:
        scores: Loss of every single state, lower is better; of equals the later one comes first.
        score_of: Loss of the mean of the states with these indices, at least two.

    Returns:
        Indices in ascending order.
    """
    order = sorted(range(len(scores)), key=lambda i: (scores[i], -i))
    chosen: tuple[int, ...] = (order[0],)
    best = scores[order[0]]
    for i in order[1:]:
        candidate = tuple(sorted((*chosen, i)))
        if (score := score_of(candidate)) <= best:
            chosen, best = candidate, score
    return chosen


class Soup(Mitigation):
    """After a stage, take the mean of several states in the adapter's averaging space.

    Args:
        over: `stages`: the states that the stages so far have left, as trained; `steps`: states of the running stage
            alone, `every` optimizer steps apart, its last step included.
        last: How many states at most, the newest included; null = all stages so far, or all the stage has. 1 = off.
        choose: `uniform`, or `greedy`: add a state only if the mean does not get worse on the validation rows of the
            current domain (of no other).
        every: For `steps`: optimizer steps between two states.
        into: `train`: training goes on from the merged weights; `serve`: they are scored and exported, and training
            goes on unmerged.
    """

    shardable = True
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"end of stage"})
    first_domain: int = 0
    requires: frozenset[Capability] = frozenset({"averageable"})
    alternative: ClassVar[str] = "configs/mitigation/ema.yaml, or an adapter whose states can be averaged (lora, full)"

    def __init__(
        self,
        *,
        over: Literal["stages", "steps"] = "stages",
        last: int | None = None,
        choose: Literal["uniform", "greedy"] = "uniform",
        every: int = 1,
        into: Into = "train",
    ) -> None:
        super().__init__()
        check_last(last, owner="Soup")
        if every < 1 or over not in ("stages", "steps") or choose not in ("uniform", "greedy"):
            raise UserError(
                f"Soup with over={over!r}, choose={choose!r}, every={every}",
                why="over is stages or steps, choose is uniform or greedy, every is at least 1 step",
                fix="correct these values in model.mitigations",
            )
        self.over = over
        self.last = last
        self.choose = choose
        self.every = every
        self.into = check_into(into, owner="Soup")
        self.uses_validation = choose == "greedy" and last != 1
        self.add_state("kept", {})

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """Keep a state of the running stage; the last one is there when it ends."""
        step, steps = trainer.global_step, module.stage.steps
        if self.over != "steps" or self.last == 1 or step == steps or (steps - step) % self.every:
            return
        if self.last is not None and (steps - step) // self.every >= self.last:
            return
        state = module.adapter.state(module.model)
        kept = self.state["kept"]
        assert isinstance(kept, dict)
        self.state["kept"] = remember(kept, state, index=step, last=None)

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """The soup; for `stages` the state joins those that are kept, for `steps` they are done with."""
        if self.last == 1:
            return after
        if self.over == "stages":
            states = stage_weights(self, module, after, last=self.last)
        else:
            kept = self.state["kept"]
            assert isinstance(kept, dict)
            states = [*(module.adapter.weights(module.model, s) for s in kept_states(kept)), after]
            self.state["kept"] = {}
        if len(states) == 1:
            return after
        return uniform([states[i] for i in self._chosen(module, states)])

    def touches_training(self, index: int) -> bool:
        """Only where it has to keep states of the running stage."""
        return self.over == "steps" and self.last != 1

    def grows_by(self, trainable: int) -> int:
        """A state per stage, unless only the last few are mixed."""
        return state_bytes(trainable) if self.over == "stages" and self.last is None else 0

    def changes_weights(self, index: int) -> bool:
        """Not when off; of the first stage there is one state."""
        return self.last != 1 and (self.over == "steps" or index > 0)

    def _chosen(self, module: StageModule, states: Sequence[Tensors]) -> tuple[int, ...]:
        if self.choose == "uniform":
            return tuple(range(len(states)))
        adapter, model = module.adapter, module.model
        trained = snapshot(adapter.state(model))

        def score_of(indices: tuple[int, ...]) -> float:
            adapter.load_weights(model, uniform([states[i] for i in indices]))
            nll = validation_nll(module)
            # Back at once: an adapter may start its approximation from the factors that it has.
            adapter.load_state(model, trained)
            return nll

        return greedy([score_of((i,)) for i in range(len(states))], score_of)

"""The contract of a mitigation: a Lightning callback with three more lifecycle hooks and six two-way hooks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor

from residency.core.tensors import on_device, size_in_bytes
from residency.core.types import Batch, Capability, Example, Outputs, Stage, Tensors
from residency.mitigations.contract import StageModule

__all__ = ["HOOKS", "Guarantee", "Into", "Mitigation", "State", "overrides", "serves"]

Into = Literal["train", "serve"]
Guarantee = Literal[
    "coordinates", "slots", "rows", "columns", "inputs", "directions", "gradient", "last step", "end of stage"
]
"""What a mitigation promises and must not lose to another one: the meaning of remembered coordinates; its share of a
batch; output rows, input columns, input directions or directions over all parameters that no update touches; the side
of a gradient; which state of a stage is its last; what the weights after a stage are."""
State = Tensor | dict[str, Tensor]

HOOKS = (
    "on_domain_start",
    "on_domain_end",
    "prepare_dataset",
    "transform_dataset",
    "transform_batch",
    "loss_terms",
    "transform_gradients",
    "transform_update",
    "transform_weights",
    "served_weights",
)

_LIGHTNING_HOOKS = tuple(name for name in dir(Callback) if name.startswith(("on_", "setup", "teardown")))


class Mitigation(Callback):
    """Base of all mitigations. Every default is the identity, and a hook that is not overridden costs nothing.

    Two-way hooks take a value and return its replacement; they never write into the argument. Several mitigations are
    folded in the order of the config. `ContinualModule` draws when each hook is called; it is their only caller.

    State that must survive a kill is declared with `add_state` and lives in `self.state`; it is stored and moved
    from the declaration. Everything else must be derivable from the config. Every rank holds the same state: what is
    estimated over data is summed over ranks at once (`core.ranks`).
    """

    requires: frozenset[Capability] = frozenset()
    """What the adapter must provide; a missing capability is refused at construction."""

    alternative: ClassVar[str] = "a mitigation without that requirement, for example configs/mitigation/replay.yaml"
    """What to use where `requires` is not met (completes the sentence "use ...")."""

    holds: ClassVar[frozenset[Guarantee]] = frozenset()
    """What it promises and must not lose to another mitigation, see `residency.mitigations.composition`."""

    gradient_order: ClassVar[int] = 0
    """Place among all `transform_gradients`, whatever the order in the config: 0 adds, 1 projects, 2 clips."""

    update_order: ClassVar[int] = 0
    """Place among all `transform_update`: 0 adds, 1 masks rows, 2 masks columns, 3 projects, 4 only looks."""

    first_domain: int = 1
    """First stage whose TRAINING it touches or must watch: 1 for what protects earlier domains, 0 for what has to see
    the first one as well. Studies share all stages before it."""

    task_id_at_test: ClassVar[bool] = False
    """Whether scoring a row needs to know its domain, see `Adapter.task_id_at_test`."""

    training_only: ClassVar[frozenset[str]] = frozenset()
    """Arguments that matter in training alone: what follows it, `transform_weights` and `on_domain_end`, is shared."""

    uses_stream_length: ClassVar[bool] = False
    """Whether it looks at `Stage.stages`; if not, streams of different lengths share their common prefix."""

    into: Into = "train"
    """Where `transform_weights` goes; may be set per instance. `train`: into the weights that the next stage starts
    from. `serve`: into those that are scored, written with and exported, while training goes on unmerged."""

    uses_logits: bool = False
    """Whether `loss_terms` reads `outputs.logits`, which are `None` where nobody does; may be set per instance."""

    needs_continuity: bool = False
    """Whether the model at the first step of a stage must be, as a function, what the stage before left
    (`Adapter.continues`); may be set per instance."""

    uses_base: bool = False
    """Whether `transform_weights` reads `module.base_weights`: a snapshot in memory. May be set per instance."""

    follows: frozenset[str] = frozenset({"completion", "label", "pair", "unpaired", "prompt"})
    """Kinds of rows (`Objective.reads`) whose objective it can protect; may be narrowed per instance."""

    decoder_only: str = ""
    """Why it does not work on an encoder-decoder; empty if it does. May be set per instance."""

    not_on_classifiers: str = ""
    """Why it does not work on a sequence classifier; empty if it does. May be set per instance."""

    shardable: bool = False
    """Whether it works on parts of a base: reads no frozen weights, passes equally often on ranks. Not inherited."""

    reads_weights: bool = True
    """Whether it reads weights or gradients of what trains, which can be in parts as well if not. Not inherited."""

    keeps_examples: ClassVar[bool] = False
    """Whether it learns again from rows of earlier stages (or rows made in their place), by the stage's objective."""

    uses_validation: bool = False
    """Whether it reads `module.validation()`, rows that every domain must have then; may be set per instance."""

    def __init__(self) -> None:
        self.name = type(self).__name__.lower()
        self.state: dict[str, State] = {}
        self._declared: set[str] = set()

    def add_state(self, key: str, default: State) -> None:
        """Declare a piece of state.

        Args:
            key: Its name in `self.state`.
            default: A tensor, or named tensors (`{}` where names and shapes appear later).
        """
        self.state[key] = default
        self._declared.add(key)

    # -- lifecycle: once per domain, also across resumes --------------------------------------------------------

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """Before the first step of a domain: anchors, teachers, bases. May set `self.state`, never weights."""

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """After the last step and after every `transform_weights`: estimate, remember. Never changes weights.

        Not called after the last stage of a stream, where there is nothing to remember for.
        """

    def prepare_dataset(self, module: StageModule, dataset: Sequence[Example], stage: Stage) -> None:
        """Right before its own `transform_dataset`, with the weights that the stage before left: where the model itself
        has to write or choose data. May set `self.state`, never weights.

        Not called where the state of this stage is stored already. `transform_dataset` must therefore return a view
        that reads `self.state` when an example is asked for: by then it is loaded.

        Args:
            module: The module, on the device; the adapter has not begun the stage.
            dataset: As the mitigations before this one left it.
            stage: Which one.
        """

    def before_adapter(self, module: StageModule, stage: Stage) -> None:
        """With the final data set, right before the adapter begins the stage: the model still is, as a function, what
        the stage before left. May set `self.state`, never weights. Not called where that state is stored already.
        """

    # -- two-way ------------------------------------------------------------------------------------------------

    def transform_dataset(self, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Replace the stage's training set: position (step * batch size + slot) -> example, a pure function."""
        return dataset

    def transform_batch(self, module: StageModule, batch: Batch) -> Batch:
        """Replace a training batch before the forward pass."""
        return batch

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """Named scalars, already weighted, that are added to the loss; logged as `loss/<mitigation>/<term>`.

        A term whose gradient is known in closed form is returned detached, for the log and the sum, and its gradient is
        added in `transform_gradients`: once per optimizer step, however many micro-batches there are.
        """
        return {}

    def transform_gradients(self, module: StageModule, gradients: Tensors) -> Tensors:
        """Replace gradients after accumulation, all-reduce and unscaling, before clipping."""
        return gradients

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Replace the parameters after an optimizer step, decay included: what is returned is written back.

        The only place where a mask or a projection holds: an update made by Adam from perfectly projected gradients
        leaves the subspace, and decoupled decay moves "frozen" weights.
        """
        return after

    def transform_weights(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Replace the weights after a stage, in the adapter's averaging space (`requires` `averageable`).

        Args:
            module: The module.
            before: `Adapter.weights` as the stage found them.
            after: As it left them. Return this very object to change nothing, `before` to undo the stage exactly,
                `module.base_weights` (with `uses_base`) for the model before the first stage, exactly.
        """
        return after

    def served_weights(self, module: StageModule, before: Tensors, served: Tensors) -> Tensors:
        """Replace what is served after a stage, in the adapter's averaging space; training never sees it.

        Args:
            module: The module.
            before: `Adapter.weights` as the stage found them.
            served: What the mitigations before this one serve; of the first one, what training goes on from.
        """
        return self.transform_weights(module, before, served) if self.into == "serve" else served

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """What is worth a line beside a logged step, as `<mitigation>/<name>`: the norm of what a penalty acts on, how
        many gradients were projected. Called in the forward pass of logged steps, after `loss_terms`; changes nothing.
        """
        return {}

    # -- what other mitigations ask ---------------------------------------------------------------------------------

    def rehearsal(self) -> tuple[float, int] | None:
        """(share of the slots, in every how many-th batch) that it fills with old examples; `None` = it fills none."""
        return None

    def frozen_inputs(self, module: StageModule) -> Mapping[str, Tensor]:
        """Orthonormal directions (in, k) of the inputs of a matrix, by the path of its owner, that its updates have no
        part in; a bool mask (in,) where they are input features themselves.
        """
        return {}

    # -- what a study may share ---------------------------------------------------------------------------------

    def touches_training(self, index: int) -> bool:
        """Whether the training of the stage with this index can depend on it: not before `first_domain`, and not if
        all that it does follows training.
        """
        hooks = {*HOOKS, *_LIGHTNING_HOOKS} - {"transform_weights", "served_weights", "on_domain_end"}
        return index >= self.first_domain and any(overrides(self, hook) for hook in hooks)

    def changes_weights(self, index: int) -> bool:
        """Whether `transform_weights` can return anything but `after` behind the stage with this index."""
        return overrides(self, "transform_weights")

    def fingerprint(self) -> str:
        """Of what its arguments name and do not hold, such as the contents of files; part of the keys of a study."""
        return ""

    # -- state --------------------------------------------------------------------------------------------------

    @property
    def state_key(self) -> str:
        """Distinct for two instances of one class: the name in the config is part of it."""
        return f"residency.mitigation.{self.name}"

    def state_dict(self) -> dict[str, Any]:
        """The declared state."""
        return dict(self.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the declared state.

        Raises:
            KeyError: A stored key was never declared, or a declared one is missing.
        """
        if {*state_dict} != self._declared:
            raise KeyError(f"{self.name}: stored state {sorted(state_dict)}, declared {sorted(self._declared)}")
        self.state.update(state_dict)

    def grows_by(self, trainable: int) -> int:
        """Bytes by which its state grows with every stage, whoever trains so many parameters; 0 = it has a bound."""
        return 0

    def kept_rows(self) -> Mapping[str, int]:
        """{domain: rows of it} that it keeps as they were, to learn from them again."""
        return {}

    def remembers(self, trainable: int, index: int) -> int:
        """Bytes of its state in the stage with this index, told before a run; by default what has grown until then."""
        return index * self.grows_by(trainable)

    def own_tokens(self) -> int:
        """Most tokens of a pass with gradients that it makes by itself behind a stage; 0 = it makes none."""
        return 0

    def state_bytes(self) -> int:
        """Memory of the declared state, in bytes."""
        return size_in_bytes(self.state)

    def move_state(self, device: torch.device) -> None:
        """Bring the declared state to a device."""
        self.state = {key: on_device(value, device) for key, value in self.state.items()}


def overrides(mitigation: Mitigation, hook: str) -> bool:
    """Whether a mitigation does something in a hook; asked once, so that unused hooks cost nothing."""
    return getattr(type(mitigation), hook) is not getattr(Mitigation, hook)


def serves(mitigation: Mitigation) -> bool:
    """Whether it serves other weights than those that training goes on from."""
    return mitigation.into == "serve" or overrides(mitigation, "served_weights")

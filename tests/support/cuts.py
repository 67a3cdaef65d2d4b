"""The second stage of a run, its steps cut into micro-batches of any size, in either layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.tensors import snapshot
from residency.core.types import Layout, Stage, Tensors
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.module import ContinualModule
from residency.engine.stage import finish_stage, restore_stage, train_stage
from residency.mitigations import Mitigation
from residency.objectives import SFT, Objective
from residency.testing.comparisons import clone
from residency.testing.fit_without_trainer import Fits
from residency.testing.model_copies import CopiedCausalLM, copied
from residency.testing.objective_rows import ExampleData
from residency.testing.tiny_runs import domains

__all__ = ["BATCH", "STAGES", "Cuts", "assert_same"]

BATCH = 8
STAGES = [Stage(index=i, domain=d, stages=2, seed=0, steps=2, batch_size=BATCH) for i, d in enumerate("ab")]
CPU = torch.device("cpu")
SGD = partial(torch.optim.SGD, lr=0.05, weight_decay=0.1)
LORA = partial(lora, target_modules="all-linear", r=2, lora_alpha=4)


class Seen(Mitigation):
    """The gradients of every step after all other mitigations."""

    first_domain = 0

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[dict[str, Tensor]] = []

    def transform_gradients(self, module: Any, gradients: Tensors) -> Tensors:
        self.steps.append({name: gradient.clone() for name, gradient in gradients.items()})
        return gradients


class Cuts:
    """Trains the second stage of a run again and again, from one first stage.

    Args:
        backbone: Folder of the tiny model.
        folder: For data and what a stage writes.
        mitigation: Makes one; `None` = none.
        objective: Makes one.
        optimizer: Class with its options.
        adapter: Makes one.
        double: In float64, as Lightning's `64-true` has it.
        kind: Rows made in memory of this kind; empty = the files of two tiny domains.
    """

    def __init__(
        self,
        backbone: Path,
        folder: Path,
        *,
        mitigation: Callable[[], Mitigation] | None = None,
        objective: Callable[[], Objective] = SFT,
        optimizer: Any = SGD,
        adapter: Callable[[], Any] = LORA,
        double: bool = False,
        kind: str = "",
    ) -> None:
        self.parts: dict[str, Any] = {"mitigation": mitigation, "objective": objective, "adapter": adapter}
        self.loaded, self.double = CausalLM(path=str(backbone)), double
        self.model = self.loaded.load()
        self.optimizer, self.kind = optimizer, kind
        self.folder = folder
        self.readers = domains(folder / "data", {"a": "generative", "b": "label"})
        module, _ = self.module("packed")
        self.model = copied(module.model, {})  # to attach the adapter to it again does nothing
        self._fit(module, STAGES[0], BATCH)
        self.between = clone(finish_stage(module, {}, device=CPU))

    def module(self, layout: Layout) -> tuple[ContinualModule, Seen]:
        """Built, with what watches its gradients."""
        make = self.parts["mitigation"]
        seen = Seen()
        module = ContinualModule(
            backbone=CopiedCausalLM(path=self.loaded.path).copies(self.model, of=self.loaded),
            adapter=self.parts["adapter"](),
            objective=self.parts["objective"](),
            mitigations={**({"x": make()} if make else {}), "seen": seen},
            optimizer=self.optimizer,
            layout=layout,
        )
        module.build(seed=0)
        if self.double:
            module.model.double()
        return module, seen

    def _fit(self, module: ContinualModule, stage: Stage, micro: int) -> None:
        options: dict[str, Any] = {"domains": self.readers, "batch_size": BATCH, "micro_batch_size": micro}
        train_stage(
            module=module,
            data=ExampleData(**options, kind=self.kind) if self.kind else StreamData(**options),
            trainers=Fits(lambda: {}),
            stage=stage,
            folder=self.folder / "work",
            history=History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None),
            observers=[],
            checkpoint_every_n_steps=0,
        )

    def second(self, micro: int, layout: Layout = "packed") -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """The gradients of both steps and the weights after them."""
        module, seen = self.module(layout)
        restore_stage(module, clone(self.between))
        self._fit(module, STAGES[1], micro)
        return seen.steps, snapshot(module.adapter.trainable(module.model))


def assert_same(one: Mapping[str, Tensor], other: Mapping[str, Tensor], what: str) -> None:
    """Equal to 1e-5 of the norm of all tensors together."""
    size = torch.stack([t.norm() for t in one.values()]).norm()
    apart = torch.stack([(one[name] - other[name]).norm() for name in one]).norm()
    assert apart <= 1e-5 * size, f"{what} differ by {float(apart / size):.1e}"

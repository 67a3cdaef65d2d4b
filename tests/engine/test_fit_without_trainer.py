"""`fitting.Fit` against a real Trainer: the same calls in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters import Adapter
from residency.core.signals import Stopped
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.stage import finish_stage, restore_stage, train_stage
from residency.engine.trainers import Trainers
from residency.mitigations.base import HOOKS, Mitigation
from residency.testing.comparisons import differing
from residency.testing.fit_without_trainer import Fits
from residency.testing.tiny_runs import domains, make_module
from table import ADAPTERS, MITIGATIONS

# Everything at once; a structure that grows; dropout; frozen codes; steps in the backward pass.
COMBINATIONS = [
    ("full", ("ewc", "replay", "weight_mixing")),
    ("lora_dropout", ("ewc_online", "replay")),
    ("inc_lora", ("replay",)),
    ("per_domain", ("replay",)),
    ("qlora", ("weight_mixing",)),
    ("galore_layerwise", ("replay",)),
]
STAGES = [
    Stage(index=0, domain="a", stages=2, seed=0, steps=2, batch_size=4),
    Stage(index=1, domain="b", stages=2, seed=0, steps=3, batch_size=4),
]
LIGHTNING = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
Calls = list[tuple[str, int, bool]]


def spy(calls: Calls, adapter: Adapter) -> Mitigation:
    """A mitigation that changes nothing and writes down every call: hook, step, whether gradients are recorded.

    It has every hook that the adapter permits.
    """
    without = set() if "averageable" in adapter.provides else {"transform_weights", "served_weights"}
    without |= {"transform_gradients", "transform_update"} if adapter.steps_in_backward else set()

    def noting(name: str) -> Any:
        identity = getattr(Mitigation, name)

        def hook(self: Mitigation, *args: Any, **named: Any) -> Any:
            trainer = next((a for a in args if hasattr(a, "global_step") and hasattr(a, "callbacks")), None)
            calls.append((name, -1 if trainer is None else trainer.global_step, torch.is_grad_enabled()))
            return identity(self, *args, **named)

        return hook

    hooks = {*LIGHTNING, *HOOKS} - without
    kind = type("Spy", (Mitigation,), {name: noting(name) for name in hooks})
    return kind()  # type: ignore[no-any-return]


class StageRunner:
    """Trains stages of a combination with one kind of Trainers."""

    def __init__(
        self,
        backbone: Path,
        folder: Path,
        adapter: str,
        mitigations: Sequence[str],
        kind: Any,
        micro: int | None = None,
    ) -> None:
        self.folder = folder / kind.__name__
        self.data = StreamData(domains=domains(folder / "data", {"a": "generative", "b": "label"}), batch_size=4)
        self.data.micro_batch_size = micro
        self.row = ADAPTERS[adapter]
        self.kind = kind
        self.calls: Calls = []
        made = self.row.make()
        parts = {name: MITIGATIONS[name].make() for name in mitigations} | {"spy": spy(self.calls, made)}
        self.module = make_module(backbone, made, parts, **self.row.options)
        self.module.build(seed=0)

    def train(self, stage: Stage, *, every: int = 0, **options: Any) -> dict[str, Any]:
        """Train and finish one stage; what is stored."""
        base = {"accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False, "max_steps": stage.steps}
        train_stage(
            module=self.module,
            data=self.data,
            trainers=self.kind(lambda: {**base, **self.row.trainer, **options}),
            stage=stage,
            folder=self.folder / str(stage.index),
            history=History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None),
            observers=[],
            checkpoint_every_n_steps=every,
        )
        return finish_stage(self.module, {}, device=torch.device("cpu"))


class Stop(Callback):
    """Ends the second stage after its second step."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 2):
            raise Stopped("SIGTERM")


class Enough(Callback):
    """Tells the trainer, after the first step, that it may stop."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        trainer.should_stop = True


combinations = pytest.mark.parametrize(
    ("adapter", "mitigations"), COMBINATIONS, ids=lambda part: part if isinstance(part, str) else "+".join(part)
)


def test_accumulation_is_what_a_trainer_does(llama: Path, tmp_path: Path) -> None:
    parts = (llama, tmp_path, "lora_dropout", ("ewc_online", "replay"))
    real, quick = (StageRunner(*parts, kind, micro=2) for kind in (Trainers, Fits))
    for stage in STAGES:
        assert not differing(real.train(stage), quick.train(stage))
    assert real.calls == quick.calls


@combinations
def test_fit_is_what_a_trainer_does(adapter: str, mitigations: Sequence[str], llama: Path, tmp_path: Path) -> None:
    real, quick = (StageRunner(llama, tmp_path, adapter, mitigations, kind) for kind in (Trainers, Fits))
    for stage in STAGES:
        assert not differing(real.train(stage), quick.train(stage))
    assert quick.calls == real.calls


@combinations
def test_a_resumed_fit_is_what_a_trainer_does(
    adapter: str, mitigations: Sequence[str], llama: Path, tmp_path: Path
) -> None:
    calls, finals = [], []
    for kind in (Trainers, Fits):
        stopped, resumed = (StageRunner(llama, tmp_path, adapter, mitigations, kind) for _ in range(2))
        between = stopped.train(STAGES[0])
        # Copies: the stopped module goes on.
        restore_stage(resumed.module, {**between, "facts": {}})
        with pytest.raises(Stopped):
            stopped.train(STAGES[1], every=1, callbacks=[Stop()])
        finals.append(resumed.train(STAGES[1]))
        before = [call for call in stopped.calls if call[0] != "on_exception"]
        calls.append([before, resumed.calls])
    assert not differing(*finals)
    assert calls[0] == calls[1]


def test_a_fit_that_is_told_to_stop_stops(llama: Path, tmp_path: Path) -> None:
    calls = []
    for kind in (Trainers, Fits):
        bench = StageRunner(llama, tmp_path, "lora", (), kind)
        with pytest.raises(Exception, match=r"ran 1 of 2 steps"):
            bench.train(STAGES[0], callbacks=[Enough()])
        calls.append(bench.calls)
    assert calls[0] == calls[1]

"""`fitting.Fit` against a real Trainer: the same calls in the same order, the same bits."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from fitting import Fit, stored
from residency.adapters import Adapter
from residency.checkpointing import History
from residency.data import StreamData
from residency.mitigations.base import HOOKS, Mitigation
from residency.signals import Stopped
from residency.stages import finish_stage, restore_stage, train_stage, training_state
from residency.trainers import Trainers
from residency.types import Stage
from running import domains, make_module
from table import ADAPTERS, MITIGATIONS
from test_kill import assert_equal_trees

# Plain and with everything at once; a structure that grows; steps in the backward pass; dropout; frozen codes.
COMBINATIONS = [
    ("full", ("ewc", "replay", "weight_mixing")),
    ("lora_dropout", ("ewc_online", "replay")),
    ("inc_lora", ("replay",)),
    ("per_domain", ("replay",)),
    ("qlora", ("weight_mixing",)),
    ("galore_layerwise", ("replay",)),
]
LIGHTNING = [name for name in dir(Callback) if name.startswith("on_") or name in ("setup", "teardown")]
Calls = list[tuple[str, int, bool]]


def spy(calls: Calls, adapter: Adapter) -> Mitigation:
    """A mitigation that changes nothing and writes down every call: hook, step, whether gradients are recorded.

    It has every hook that the adapter permits.
    """
    without = set() if "averageable" in adapter.provides else {"transform_weights"}
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


def module_of(backbone: Path, adapter: str, mitigations: Sequence[str], calls: Calls) -> Any:
    made = ADAPTERS[adapter].make()
    parts = {name: MITIGATIONS[name].make() for name in mitigations} | {"spy": spy(calls, made)}
    module = make_module(backbone, made, parts, **ADAPTERS[adapter].options)
    module.build(seed=0)
    return module


def stages() -> list[Stage]:
    steps = {"a": 2, "b": 3}
    return [
        Stage(index=i, domain=name, stages=2, seed=0, steps=steps[name], batch_size=4) for i, name in enumerate(steps)
    ]


class _Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 2):
            raise Stopped("SIGTERM")


def really(module: Any, data: StreamData, stage: Stage, folder: Path, options: Any, *, every: int = 0) -> None:
    """Train and finish a stage as a run does."""
    options = {"accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False, **options}
    trainers = Trainers(lambda: {**options, "max_steps": stage.steps})
    history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None)
    train_stage(
        module=module,
        data=data,
        trainers=trainers,
        stage=stage,
        folder=folder,
        history=history,
        observers=[],
        checkpoint_every_n_steps=every,
    )
    finish_stage(module, {}, device=torch.device("cpu"))


def quickly(module: Any, data: StreamData, stage: Stage, options: Any, *, checkpoint: Any = None, save: int = 0) -> Any:
    """The same by way of `Fit`; the checkpoint."""
    module.begin_stage(stage, data.examples(stage, module.backbone.tokenizer))
    fit = Fit(module, clip=options.get("gradient_clip_val", 1.0), save_at=save)
    fit.run(checkpoint)
    finish_stage(module, {}, device=torch.device("cpu"))
    return fit.checkpoint


def state(module: Any) -> dict[str, Any]:
    return stored(training_state(module, module.mitigations))


@pytest.mark.parametrize(
    ("adapter", "mitigations"), COMBINATIONS, ids=lambda part: part if isinstance(part, str) else "+".join(part)
)
def test_fit_is_what_a_trainer_does(adapter: str, mitigations: Sequence[str], llama: Path, tmp_path: Path) -> None:
    data = StreamData(domains=domains(tmp_path, {"a": "generative", "b": "label"}), batch_size=4)
    options = ADAPTERS[adapter].trainer
    expected: Calls = []
    found: Calls = []
    real, quick = (module_of(llama, adapter, mitigations, calls) for calls in (expected, found))
    for stage in stages():
        really(real, data, stage, tmp_path / str(stage.index), options)
        quickly(quick, data, stage, options)
        assert_equal_trees(state(real), state(quick), f"stage {stage.index}")
    assert found == expected


@pytest.mark.parametrize(
    ("adapter", "mitigations"), COMBINATIONS[:4], ids=lambda part: part if isinstance(part, str) else "+".join(part)
)
def test_a_resumed_fit_is_what_a_trainer_does(
    adapter: str, mitigations: Sequence[str], llama: Path, tmp_path: Path
) -> None:
    data = StreamData(domains=domains(tmp_path, {"a": "generative", "b": "label"}), batch_size=4)
    first, second = stages()
    options = ADAPTERS[adapter].trainer
    calls: list[Calls] = [[], []]
    whole, stopped, resumed = (module_of(llama, adapter, mitigations, []) for _ in range(3))
    really(whole, data, first, tmp_path / "0", options)
    between = {**state(whole), "facts": {}}
    restore_stage(stopped, between)
    with pytest.raises(Stopped):
        really(stopped, data, second, tmp_path / "1", {**options, "callbacks": [_Stop()]}, every=1)
    stopped = module_of(llama, adapter, mitigations, calls[0])
    restore_stage(stopped, between)
    really(stopped, data, second, tmp_path / "1", options)
    checkpoint = quickly(whole, data, second, options, save=1)
    resumed = module_of(llama, adapter, mitigations, calls[1])
    restore_stage(resumed, between)
    quickly(resumed, data, second, options, checkpoint=checkpoint)
    assert_equal_trees(state(stopped), state(resumed), "resumed")
    assert_equal_trees(state(whole), state(resumed), "whole")
    assert calls[0] == calls[1]

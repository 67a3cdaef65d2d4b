"""What every mitigation keeps: its declarations and draws; with an adapter, that it acts, is off, goes on exactly."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.mitigations import Mitigation
from residency.testing.cases import Case, made
from residency.testing.comparisons import differing
from residency.testing.pairs import refusal
from residency.testing.rows import MitigationRow
from residency.testing.shared_runs import SHORT

__all__ = ["PROPERTIES", "a_pair_keeps_every_invariant", "a_pair_through_a_whole_stream"]

MitigationCase = Case[MitigationRow]
DRAWS_WITH = "lora_dropout"
"""The adapter on which draws are looked at: it draws as well."""


def declares_everything(case: MitigationCase) -> None:
    """What it says of itself, and that it keeps nothing beside its declared state."""
    mitigation = made(case.row.make, Mitigation, case.name)
    assert isinstance(mitigation.first_domain, int)
    assert mitigation.alternative, "`alternative`: what to use where it is refused"
    assert mitigation.touches_training(1) or mitigation.changes_weights(1), "it does nothing"
    off = made(case.row.off, Mitigation, case.name)
    touched = [index for index in range(3) if off.touches_training(index) or off.changes_weights(index)]
    assert not touched, "at strength 0 a study shares its stages with runs without it: `touches_training` must say so"
    restored = case.row.make()
    restored.load_state_dict(copy.deepcopy(mitigation.state_dict()))
    with pytest.raises(KeyError, match="declared"):
        restored.load_state_dict({"unheard_of": torch.zeros(1)})


def draws_from_the_seed_only(case: MitigationCase) -> None:
    """What the global generators were before makes no difference."""
    pairs, finals = case.runs.pairs, []
    if refusal(case.runs.row(DRAWS_WITH).make(), case.row):
        pytest.skip(f"refused with {DRAWS_WITH}")
    for seed in range(2):
        torch.manual_seed(seed)
        module = pairs.module(DRAWS_WITH, {case.name: case.row.make()})
        finals.append(pairs.train(DRAWS_WITH, module).final)
    found = differing(finals[0], finals[1])
    assert not found, f"{found[0]} depends on a global generator"


PROPERTIES = (declares_everything, draws_from_the_seed_only)


def a_pair_keeps_every_invariant(case: MitigationCase) -> None:
    """With the adapter `partner`: see `residency.testing.pairs`."""
    case.runs.row(case.partner)
    case.runs.pairs.check(case.partner, case.name)


class _Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 3):
            raise Stopped("SIGTERM")


def a_pair_through_a_whole_stream(case: MitigationCase) -> None:
    """With the adapter `partner`, through Trainer, files and scoring: stopped and continued, and without it."""
    if refusal(case.runs.row(case.partner).make(), case.row):
        pytest.skip(f"refused with {case.partner}")

    def go(folder: str, **options: Any) -> Any:
        parts = {case.name: case.row.make()}
        return case.runs.run(case.partner, case.folder / folder, parts, **SHORT, **options)[0]["scores"]

    whole = go("whole")
    with pytest.raises(Stopped):
        go("stopped", callbacks=[_Stop()], every=1)
    assert go("stopped") == whole, "stopped and continued, it has other scores"
    states = [load_tree(case.folder / name / "stages" / "2-b" / "state.safetensors") for name in ("whole", "stopped")]
    one, other = ({key: tree[key] for key in ("weights", "mitigations")} for tree in states)
    found = differing(one, other)
    assert not found, f"{found[0]} differs from the uninterrupted run"
    without = case.runs.plain(case.partner, short=True).record["scores"]
    mitigation = case.row.make()
    shared = 1 if mitigation.touches_training(0) or mitigation.changes_weights(0) else 2
    assert whole["nll"]["R"][:shared] == without["nll"]["R"][:shared], "the first stage is shared"
    if not case.row.conditional:
        assert whole["nll"]["R"] != without["nll"]["R"], "the mitigation did nothing"

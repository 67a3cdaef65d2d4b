"""Early stopping: back to the best state, judged by the current domain alone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.mitigations import EarlyStopping, Mitigation
from residency.mitigations import early_stopping as module_of_stopping
from residency.mitigations.early_stopping import Progress, judged
from residency.mitigations.validation import validation_nll
from residency.testing.tiny_runs import domains, train
from support.two_stages import ADAPTERS, LAST, equal, two_stages


def looks(*values: float, min_delta: float = 0.0) -> Progress:
    progress = Progress()
    for step, nll in enumerate(values, 1):
        progress = judged(progress, step=step, nll=nll, min_delta=min_delta)
    return progress


@pytest.mark.parametrize(
    ("values", "min_delta", "best", "waited"),
    [
        ((3.0, 2.0, 1.0), 0.0, 3, 0),
        ((3.0, 2.0, 2.5, 2.2), 0.0, 2, 2),
        ((3.0, 2.0, 2.0), 0.0, 2, 1),  # equal: the earlier state stays
        ((3.0, 2.9, 2.4), 0.5, 3, 0),  # small steps count together, against the best
        ((3.0, 2.9, 2.6), 0.5, 1, 2),
        ((math.nan, 2.0), 0.0, 2, 0),
    ],
)
def test_what_counts_as_the_best(values: tuple[float, ...], min_delta: float, best: int, waited: int) -> None:
    progress = looks(*values, min_delta=min_delta)
    assert (progress.best_step, progress.waited, progress.step) == (best, waited, len(values))
    assert math.isnan(values[best - 1]) or progress.best == values[best - 1]
    assert Progress.of(progress.tensor()) == progress


def keep() -> Mitigation:
    return EarlyStopping(every=1)


def first_one() -> Mitigation:
    return EarlyStopping(every=1, min_delta=100.0)


def impatient() -> Mitigation:
    return EarlyStopping(every=1, min_delta=100.0, patience=2)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_stage_ends_in_its_best_state(adapter: str, llama: Path) -> None:
    """Found again by looking at every step's state afterwards; looking has not changed the course of training."""
    plain, run = two_stages(llama, adapter), two_stages(llama, adapter, keep)
    assert run.losses == plain.losses
    assert all(equal(one, other) for one, other in zip(run.steps[0], plain.steps[0], strict=True))
    module = run.module  # its stage and validation rows are those of the second one
    losses = []
    for state in run.steps[1]:
        module.adapter.load_state(module.model, state)
        losses.append(validation_nll(module))
    module.adapter.load_state(module.model, run.weights[1])
    assert equal(run.weights[1], run.steps[1][losses.index(min(losses))])
    assert validation_nll(module) == min(losses)
    assert not run.tree(2)["mitigations"]["x"]["best"], "nothing is carried into the next stage"


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_it_goes_back(adapter: str, llama: Path) -> None:
    run = two_stages(llama, adapter, first_one)
    assert [len(steps) for steps in run.steps] == [4, 4]
    for k in (0, 1):
        assert equal(run.weights[k], run.steps[k][0])


def test_patience_ends_a_stage(llama: Path) -> None:
    """With the same result as going back, in fewer steps, and the record says how many."""
    whole, run = two_stages(llama, "lora", first_one), two_stages(llama, "lora", impatient)
    assert [len(steps) for steps in run.steps] == [3, 3]
    assert [run.tree(k)["facts"]["steps"] for k in (1, 2)] == [3, 3]
    assert all(equal(one, other) for one, other in zip(run.weights, whole.weights, strict=True))
    assert run.record["scores"] == whole.record["scores"]


def test_a_stage_that_was_killed_after_patience_ran_out_is_not_trained_on(llama: Path) -> None:
    whole, again = two_stages(llama, "lora", impatient), two_stages(llama, "lora", impatient, stop=(1, LAST))
    assert again.steps == [[]], "its last checkpoint knows that it is over"
    assert all(equal(one, other) for one, other in zip(again.weights, whole.weights, strict=True))
    assert again.tree(2)["facts"]["steps"] == 3
    assert again.record["scores"] == whole.record["scores"]


def test_the_last_step_is_always_looked_at(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only rows of the domain that is being learned."""
    seen: list[tuple[str, int, set[str], bool]] = []
    real = module_of_stopping.validation_nll

    def watched(module: Any) -> float:
        read = {(e.domain, e.alternatives) for e in module.validation()}
        assert all(not alternatives for _, alternatives in read)
        training = module.model.training
        nll = real(module)
        assert module.model.training == training
        seen.append((module.stage.domain, module.global_step, {d for d, _ in read}, training))
        return nll

    monkeypatch.setattr(module_of_stopping, "validation_nll", watched)
    two_stages(llama, "lora", lambda: EarlyStopping(every=3))
    assert seen == [(d, step, {d}, True) for d in "ab" for step in (3, 4)]


def test_a_domain_without_validation_rows_is_refused_before_training(llama: Path, tmp_path: Path) -> None:
    readers = domains(tmp_path / "data", {"a": "generative", "b": "label"})
    readers["b"].limits["validation"] = 0
    with pytest.raises(UserError, match=r"x \(EarlyStopping\).*validation rows in data.domains.b"):
        train(tmp_path / "run", llama, ADAPTERS["lora"](), {"x": keep()}, data={"domains": readers})
    assert not list((tmp_path / "run").glob("stages/*/state.safetensors"))


@pytest.mark.parametrize("options", [{"every": -1}, {"patience": 0}, {"min_delta": -0.1}, {"min_delta": float("nan")}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        EarlyStopping(**options)

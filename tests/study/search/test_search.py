"""A search finds by validation rows, stops only between stages, goes on after a kill, and its winner is what is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.study import load_study
from residency.study.command import sweep
from residency.study.executors.base import Task
from residency.testing.tiny_models import write_domain
from support.cli import read_json, tiny_config, write_yaml
from support.tiny_sweeps import Inline


class InlineExecutor(Inline):
    """Runs tasks in this process; calls a function, which may raise, before each."""

    def __init__(self, before: Callable[[Task], None] = lambda task: None) -> None:
        super().__init__()
        self.before = before

    def submit(self, task: Task) -> None:
        """Run it."""
        self.before(task)
        super().submit(task)


pytest.importorskip("optuna", reason="the extra residency[optuna] is not installed")

LR = "model.optimizer.init_args.lr"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A stream of two tiny domains and a preset; scored by likelihood alone."""
    folder = tmp_path_factory.mktemp("search")
    base = tiny_config(folder / "data", llama)
    base["data"]["domains"] = {name: write_domain(folder / "data", name) for name in "ab"}
    for domain in base["data"]["domains"].values():
        domain["init_args"]["scorers"] = ["nll"]
    base["trainer"]["max_steps"] = 1
    write_yaml(folder / "base.yaml", base)
    replay = {"class_path": "residency.mitigations.Replay", "init_args": {"ratio": 0.5, "capacity": 8}}
    write_yaml(folder / "replay.yaml", replay)
    return folder


def study_file(folder: Path, *, replay: bool = True, **search: Any) -> Path:
    """A study that searches a learning rate with and without replay, and its ratio."""
    axes: dict[str, Any] = {"m": {"none": {}}}
    parameters: dict[str, Any] = {LR: {"low": 1e-5, "high": 0.1, "log": True}}
    if replay:
        axes["m"]["replay"] = {"model.mitigations.old": "replay.yaml"}
        parameters["model.mitigations.old.ratio"] = {"choices": [0.25, 0.75], "only": {"m": "replay"}}
    search = {"parameters": parameters, "trials": 2, "batch": 2, "stop": {"after": 1, "keep": 0.5}, **search}
    return write_yaml(folder / "study.yaml", {"name": "s", "base": "base.yaml", "axes": axes, "search": search})


@pytest.fixture(scope="module", autouse=True)
def without_pictures() -> Iterator[None]:
    """Tables and heat maps take longer than the trials, and are tested elsewhere."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("residency.study.runner.compare", lambda *args: None)
        yield


def run(path: Path, into: Path, executor: InlineExecutor | None = None) -> InlineExecutor:
    """A sweep in this process."""
    executor = executor or InlineExecutor()
    assert sweep(path, study_dir=into, threads=1, executor=lambda logs: executor, watchers=[]) == 0
    return executor


def trials(folder: Path) -> list[dict[str, Any]]:
    """What search/trials.json lists."""
    found: list[dict[str, Any]] = read_json(folder / "search" / "trials.json")["trials"]
    return found


@pytest.fixture(scope="module")
def whole(folder: Path) -> Path:
    """The study, run without a disturbance."""
    run(study_file(folder), folder / "whole")
    return folder / "whole"


def test_every_combination_is_searched_alike_and_its_best_is_run(whole: Path) -> None:
    listed = trials(whole)
    assert [(trial["axes"]["m"], trial["trial"]) for trial in listed] == [
        (m, number) for m in ("none", "replay") for number in range(2)
    ]
    assert {trial["status"] for trial in listed} <= {"done", "stopped"}
    for m in ("none", "replay"):
        done = [t for t in listed if t["axes"]["m"] == m and t["status"] == "done"]
        best = max(done, key=lambda trial: trial["value"])
        config = read_json(whole / "plan.json")
        assert config["study"]["search"]["trials"] == 2
        record = read_json(whole / "cells" / f"{m}-s0" / "results.json")
        assert record["split"] == "test"
        written = (whole / "cells" / f"{m}-s0" / "config.yaml").read_text()
        assert f"lr: {best['parameters'][LR]!r}" in written
        assert ("model.mitigations.old.ratio" in best["parameters"]) == (m == "replay")


def test_trials_stop_between_stages_and_are_listed_with_missing_rows(whole: Path) -> None:
    stopped = [trial for trial in trials(whole) if trial["status"] == "stopped"]
    assert stopped, "of two, one goes on"
    for trial in stopped:
        (path,) = (whole / "search").glob(f"cells-*/{trial['cells'][0]}/results.json")
        record = read_json(path)
        assert (record["status"], record["split"]) == ("stopped", "validation")
        stage = record["stopped_after"]
        rows = record["scores"]["nll"]["R"]
        assert len(rows) == 3
        assert all(None not in row for row in rows[: stage + 1])
        assert all(set(row) == {None} for row in rows[stage + 1 :])
        assert trial["value"] is None
        assert [*trial["after"]] == [str(k) for k in range(1, stage + 1)]


def test_values_are_validation_averages_of_finished_streams(whole: Path) -> None:
    for trial in trials(whole):
        if trial["status"] == "done":
            (path,) = (whole / "search").glob(f"cells-*/{trial['cells'][0]}/results.json")
            record = read_json(path)
            assert record["split"] == "validation"
            assert record["seed"] == 1000
            assert trial["value"] == record["summary"]["nll"]["average"]
            last = record["scores"]["nll"]["R"][-1]
            assert trial["value"] == pytest.approx(-sum(last) / 2)


def test_a_second_sweep_runs_nothing(folder: Path, whole: Path) -> None:
    def refuse(task: Task) -> None:
        raise AssertionError(task.id)

    run(study_file(folder), whole, InlineExecutor(refuse))


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("fatal", [3, 8])
def test_a_search_goes_on_as_if_nothing_had_happened(folder: Path, whole: Path, tmp_path: Path, fatal: int) -> None:
    path = study_file(folder, replay=False)
    count = 0

    def kill(task: Task) -> None:
        nonlocal count
        count += 1
        if count == fatal:
            raise _Killed

    with pytest.raises(_Killed):
        run(path, tmp_path, InlineExecutor(kill))
    run(path, tmp_path)
    # What another combination does beside it changes nothing either.
    assert trials(tmp_path) == [trial for trial in trials(whole) if trial["axes"]["m"] == "none"]
    record, wanted = (read_json(place / "cells" / "none-s0" / "results.json") for place in (tmp_path, whole))
    assert record["scores"] == wanted["scores"]


def test_test_rows_are_never_searched_over(folder: Path, whole: Path, tmp_path: Path) -> None:
    """Other test rows, the same search."""
    for name in "ab":
        data = tmp_path / "data"
        write_domain(data, name)
        (data / f"{name}-test.jsonl").write_text('{"prompt": "zz", "completion": "zzz"}\n')
    text = (folder / "base.yaml").read_text().replace(str(folder / "data"), str(tmp_path / "data"))
    (tmp_path / "base.yaml").write_text(text)
    (tmp_path / "replay.yaml").write_text((folder / "replay.yaml").read_text())

    class Enough(BaseException):
        pass

    def until_cells(task: Task) -> None:
        if "/search/" not in " ".join(task.spec["words"]):
            raise Enough

    with pytest.raises(Enough):
        run(study_file(tmp_path, replay=False), tmp_path / "out", InlineExecutor(until_cells))
    ours, wanted = trials(tmp_path / "out"), [trial for trial in trials(whole) if trial["axes"]["m"] == "none"]
    assert [(t["value"], t["after"]) for t in ours] == [(t["value"], t["after"]) for t in wanted]


def test_more_trials_go_on_and_another_space_starts_anew(folder: Path, whole: Path) -> None:
    before = trials(whole)

    def refuse(task: Task) -> None:
        raise AssertionError(task.id)

    with pytest.raises(AssertionError):
        run(study_file(folder, trials=3), whole, InlineExecutor(refuse))
    assert load_study(study_file(folder, trials=3)).search is not None
    assert trials(whole) == before
    with pytest.raises(AssertionError):
        run(study_file(folder, seed=1), whole, InlineExecutor(refuse))
    run(study_file(folder), whole, InlineExecutor(refuse))


@pytest.mark.parametrize(
    ("search", "part"),
    [
        ({"parameters": {"model.optimizer.init_args.rl": {"low": 0.1, "high": 1.0}}}, "no key"),
        ({"parameters": {"model.adapter": {"choices": ["nope.yaml"]}}}, "nope.yaml"),
        ({"parameters": {LR: {"low": 0.1}}}, "low and high"),
        ({"scorer": "accuracy"}, "scored by nll"),
    ],
)
def test_mistakes_are_found_before_anything_runs(folder: Path, tmp_path: Path, search: Any, part: str) -> None:
    executor = InlineExecutor()
    with pytest.raises(UserError) as caught:
        sweep(study_file(folder, **search), study_dir=tmp_path / "out", executor=lambda logs: executor, watchers=[])
    assert part in str(caught.value)
    assert executor.ran == []

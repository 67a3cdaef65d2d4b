"""Cores are shared out by what a study can do at once; what was chosen stays, since threads are part of a stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.study.planning.cpu_sharing import (
    at_once,
    keep_cores,
    kept_threads,
    measured_speeds,
    share_cores,
    usable_cores,
)
from residency.study.planning.search_space import Parameter, Search
from residency.study.planning.study_file import Study

STUDY = Study(name="s", base="b", axes={"a": {"x": {}, "y": {}}, "b": {"1": {}, "2": {}, "3": {}}}, seeds=[0, 1])


def speeds(counts: Sequence[int]) -> Mapping[int, float]:
    """A machine on which four threads are as good as it gets."""
    return {count: {1: 1.0, 2: 1.8, 4: 3.0}.get(count, 3.1) for count in counts}


def unmeasured(counts: Sequence[int]) -> Mapping[int, float]:
    """A measurement that nobody asked for."""
    raise AssertionError(counts)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"cores": 2, "runs": 12}, (2, 1)),
        ({"cores": 16, "runs": 12}, (12, 1)),
        ({"cores": 8, "runs": 8, "gpus": 2}, (2, 4)),
        ({"cores": 8, "runs": 1, "workers": 2}, (2, 4)),
        ({"cores": 8, "runs": 1, "workers": 16}, (16, 1)),
        ({"cores": 8, "runs": 9, "threads": 4}, (2, 4)),
        ({"cores": 8, "runs": 9, "threads": 16}, (1, 16)),
        ({"cores": 8, "runs": 1, "threads": 1}, (1, 1)),
        ({"cores": 8, "runs": 9, "threads": 2, "gpus": 1}, (1, 2)),
        ({"cores": 8, "runs": 9, "threads": 3, "workers": 5}, (5, 3)),
    ],
)
def test_shares_that_need_no_measurement(given: dict[str, Any], expected: tuple[int, int]) -> None:
    found = share_cores(**given, speeds=unmeasured)
    assert (found.workers, found.threads) == expected


@pytest.mark.parametrize(
    ("cores", "runs", "expected"), [(2, 1, (1, 2)), (16, 1, (1, 4)), (16, 6, (6, 2)), (64, 5, (5, 4))]
)
def test_a_worker_gets_the_threads_that_pay(cores: int, runs: int, expected: tuple[int, int]) -> None:
    found = share_cores(cores=cores, runs=runs, speeds=speeds)
    assert (found.workers, found.threads) == expected
    assert found.workers * found.threads <= cores
    assert f"{runs} runs at once on {cores} cores" in found.why


def test_threads_that_bring_nothing_are_left_out() -> None:
    assert share_cores(cores=8, runs=1, speeds=lambda counts: dict.fromkeys(counts, 1.0)).threads == 1


def test_runs_at_once() -> None:
    assert at_once(STUDY) == 2 * 3 * 2
    assert at_once(replace(STUDY, orders=3)) == 36
    assert at_once(replace(STUDY, orders=[["a", "b"], ["b", "a"]])) == 24
    assert at_once(replace(STUDY, orders="latin")) == 24
    assert at_once(replace(STUDY, exclude=[{"a": "x"}])) == 6
    search = Search(parameters={"k": Parameter(choices=[1, 2])}, trials=3, batch=8, seeds=[10, 11])
    assert at_once(replace(STUDY, seeds=[0], search=search)) == 6 * 3 * 2


def test_the_measurement_leaves_the_process_as_it_was() -> None:
    before = torch.get_num_threads()
    found = measured_speeds([1, 2])
    assert torch.get_num_threads() == before
    assert all(0 < speed < 1e6 for speed in found.values())
    assert list(found) == [1, 2]
    assert usable_cores() >= 1


def test_what_was_chosen_stays(tmp_path: Path) -> None:
    assert kept_threads(tmp_path) is None
    keep_cores(tmp_path, share_cores(cores=16, runs=1, speeds=speeds))
    assert kept_threads(tmp_path) == 4

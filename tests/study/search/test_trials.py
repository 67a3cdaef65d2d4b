"""A search is a function of its seed and of scores: not of workers, kills, or the order in which trials end."""

from __future__ import annotations

import builtins
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.study.planning.search_space import Parameter, Search, Stop, applies, check_search, survivors, value_of
from residency.study.search.trials import Trial, Trials

PARAMETERS = {
    "lr": Parameter(low=1e-4, high=1e-1, log=True),
    "rank": Parameter(low=1, high=64),
    "adapter": Parameter(choices=["a.yaml", None, [1, 2], {"x": 1.5}, True]),
}
SEARCH = Search(parameters=PARAMETERS, trials=14, batch=4)


def trials(path: Path, search: Search = SEARCH, name: str = "s") -> Trials:
    """A journal."""
    pytest.importorskip("optuna", reason="the extra residency[optuna] is not installed")
    return Trials(path=path / "journal.jsonl", name=name, place=name, search=search, parameters=search.parameters)


def score(trial: Trial) -> float:
    """A score that a search can improve."""
    return -((math.log10(trial.keys["lr"]) + 2.5) ** 2) - (trial.keys["adapter"] is not None)


def run(open_journal: Callable[[], Trials], search: Search = SEARCH) -> list[Trial]:
    """The whole search; the journal is opened as often as the caller likes."""
    for first in range(0, search.trials, search.batch):
        drawn = open_journal().batch(first)
        assert [trial.number for trial in drawn] == list(range(first, min(first + search.batch, search.trials)))
        for trial in drawn:
            open_journal().tell(trial.number, "done", score(trial))
    return open_journal().all()


def test_values_are_those_that_the_file_allows(tmp_path: Path) -> None:
    found = run(lambda: trials(tmp_path))
    assert len(found) == 14
    for trial in found:
        assert 1e-4 <= trial.keys["lr"] <= 1e-1
        assert trial.keys["rank"] in range(1, 65)
        assert trial.keys["adapter"] in PARAMETERS["adapter"].choices  # type: ignore[operator]
    ranks = [trial.keys["rank"] for trial in found]
    assert all(type(rank) is int for rank in ranks)
    assert len({*ranks}) > 4


def test_the_same_seed_finds_the_same_and_another_one_does_not(tmp_path: Path) -> None:
    def keys(name: str, seed: int) -> list[Any]:
        search = Search(parameters=PARAMETERS, trials=14, seed=seed)
        (tmp_path / name).mkdir()
        return [trial.keys for trial in run(lambda: trials(tmp_path / name, search), search)]

    first = keys("one", 0)
    assert keys("two", 0) == first
    assert keys("three", 1) != first


def test_later_trials_know_earlier_scores(tmp_path: Path) -> None:
    """Otherwise it would be a random search under another name."""

    def keys(name: str, sign: int) -> list[Any]:
        (tmp_path / name).mkdir()
        journal = trials(tmp_path / name)
        for first in range(0, 14, 4):
            for trial in journal.batch(first):
                journal.tell(trial.number, "done", sign * score(trial))
        return [trial.keys for trial in journal.all()]

    up, down = keys("up", 1), keys("down", -1)
    assert up[:8] == down[:8], "the first ones are random"
    assert up[8:] != down[8:]


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("fatal", range(0, 33, 4))
@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_at_any_write_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fatal: int, torn: bool
) -> None:
    pytest.importorskip("optuna", reason="the extra residency[optuna] is not installed")
    from optuna.storages.journal import JournalFileBackend

    (tmp_path / "whole").mkdir()
    wanted = run(lambda: trials(tmp_path / "whole"))
    append, count = JournalFileBackend.append_logs, itertools.count()

    def dying(self: Any, logs: list[dict[str, Any]]) -> None:
        if next(count) == fatal:
            if torn:
                with open(self._file_path, "ab") as file:
                    file.write(json.dumps(logs[0]).encode()[:25])
            raise _Killed
        append(self, logs)

    monkeypatch.setattr(JournalFileBackend, "append_logs", dying)
    with pytest.raises(_Killed):
        run(lambda: trials(tmp_path))
    assert run(lambda: trials(tmp_path)) == wanted


def test_ends_may_be_told_twice(tmp_path: Path) -> None:
    journal = trials(tmp_path)
    journal.batch(0)
    for _ in range(2):
        journal.report(0, 1, 0.5)
        journal.report(0, 2, None)
        journal.tell(0, "done", 1.5)
        journal.report(1, 1, 0.25)
        journal.tell(1, "stopped")
        journal.tell(2, "failed")
    found = trials(tmp_path).all()
    assert [trial.status for trial in found] == ["done", "stopped", "failed", "running"]
    assert [trial.value for trial in found] == [1.5, None, None, None]
    assert [trial.after for trial in found] == [{1: 0.5}, {1: 0.25}, {}, {}]


@pytest.mark.parametrize(("metric", "wanted"), [("average", 1), ("forgetting", 0)])
def test_the_best_is_a_finished_one_in_the_direction_of_the_metric(tmp_path: Path, metric: str, wanted: int) -> None:
    journal = trials(tmp_path, Search(parameters=PARAMETERS, metric=metric))
    assert journal.best() is None
    journal.batch(0)
    for number, value in enumerate([-3.0, 2.0, 2.0]):
        journal.tell(number, "done", value)
    journal.tell(3, "stopped")
    best = journal.best()
    assert best is not None
    assert best.number == wanted


def test_searches_in_one_journal_do_not_mix(tmp_path: Path) -> None:
    one, two = trials(tmp_path, name="one"), trials(tmp_path, name="two")
    one.tell(one.batch(0)[0].number, "done", 1.0)
    assert two.all() == []
    assert two.batch(0)[0].keys != one.all()[0].keys, "each has draws of its own"


def test_without_the_extra_the_user_is_told_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.partition(".")[0] == "optuna":
            raise ImportError(name)
        return found(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(UserError, match=r"pip install 'residency\[optuna\]'"):
        Trials(path=tmp_path / "j", name="s", place="s", search=SEARCH, parameters=PARAMETERS)


# -- who goes on --------------------------------------------------------------------------------------------------

VALUES = st.dictionaries(st.integers(0, 20), st.none() | st.floats(-10, 10), max_size=12)


@given(
    values=VALUES,
    earlier=st.lists(st.floats(-10, 10), max_size=8),
    keep=st.floats(0.05, 1),
    sign=st.sampled_from([1, -1]),
)
def test_survivors(values: dict[int, float | None], earlier: list[float], keep: float, sign: int) -> None:
    found = survivors(values, earlier, keep=keep, sign=sign)
    known = {trial: sign * value for trial, value in values.items() if value is not None}
    everything = [*known.values(), *(sign * value for value in earlier)]
    assert {trial for trial, value in values.items() if value is None} <= {*found}, "who has no value yet goes on"
    if known and max(known.values()) >= max(everything):
        assert max(known, key=lambda trial: known[trial]) in found, "the best one is never stopped"
    for on, off in itertools.product(known.keys() & {*found}, known.keys() - {*found}):
        assert known[on] > known[off], "nobody goes on while a better one is stopped"
    allowed = math.ceil(keep * len(everything))
    assert sum(known[trial] > min(known[t] for t in known if t in found) for trial in known if trial in found) < max(
        1, allowed
    )
    assert survivors(dict(reversed(values.items())), earlier[::-1], keep=keep, sign=sign)[::-1] == found
    assert set(survivors(values, earlier, keep=1.0, sign=sign)) == {*values}


def test_half_of_four_go_on() -> None:
    values: dict[int, float | None] = {0: 1.0, 1: 4.0, 2: 3.0, 3: 2.0}
    assert survivors(values, [], keep=0.5, sign=1) == (1, 2)
    assert survivors(values, [], keep=0.5, sign=-1) == (0, 3)
    assert survivors(values, [9.0, 8.0, 7.0, 6.0], keep=0.5, sign=1) == (), "earlier ones were better"


def test_how_good_a_trial_is_counts_the_domains_learnt_so_far() -> None:
    rows = [[5.0, 5.0, 5.0], [1.0, 9.0, 9.0], [2.0, 3.0, 9.0], [4.0, 4.0, 1.0]]
    average, forgetting = Search(parameters=PARAMETERS), Search(parameters=PARAMETERS, metric="forgetting")
    assert value_of(average, rows[:1], higher_is_better=False) is None
    assert value_of(average, rows[:2], higher_is_better=False) == -1.0
    assert value_of(average, rows[:3], higher_is_better=False) == -2.5
    assert value_of(average, rows, higher_is_better=False) == -3.0
    assert value_of(forgetting, rows[:2], higher_is_better=False) is None, "one domain has forgotten nothing"
    assert value_of(forgetting, rows[:3], higher_is_better=False) == 1.0
    assert value_of(average, [[1.0], [None]], higher_is_better=True) is None


@settings(max_examples=30)
@given(names=st.lists(st.sampled_from("abc"), min_size=1, max_size=3), value=st.sampled_from("abc"))
def test_a_parameter_exists_where_it_says(names: list[str], value: str) -> None:
    assert applies(Parameter(choices=[1]), {"x": value})
    assert applies(Parameter(choices=[1], only={"x": names}), {"x": value}) == (value in names)
    assert applies(Parameter(choices=[1], only={"x": names[0]}), {"x": value}) == (value == names[0])


RANGE = Parameter(low=0.1, high=1.0)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"parameters": {}}, "no parameters"),
        ({"parameters": {"lr": Parameter()}}, "search.parameters.lr: low: None"),
        ({"parameters": {"lr": Parameter(low=1.0)}}, "low and high"),
        ({"parameters": {"lr": Parameter(low=1.0, high=2.0, choices=[1])}}, "a range or choices"),
        ({"parameters": {"lr": Parameter(low=2.0, high=1.0)}}, "below high"),
        ({"parameters": {"lr": Parameter(low=0.1, high=math.inf)}}, "below high"),
        ({"parameters": {"lr": Parameter(low=0.0, high=1.0, log=True)}}, "logarithm"),
        ({"parameters": {"lr": Parameter(choices=[1], log=True)}}, "logarithm"),
        ({"parameters": {"lr": Parameter(choices=[])}}, "at least one"),
        ({"parameters": {"lr": Parameter(choices=[1, 1])}}, "counts once"),
        ({"parameters": {"lr": Parameter(choices=[1], only={"m": "nope"})}}, "m has none, ewc"),
        ({"parameters": {"lr": Parameter(choices=[1], only={"x": "none"})}}, "the axes are m"),
        ({"trials": 0}, "at least 1"),
        ({"batch": 0}, "at least 1"),
        ({"metric": "avrage"}, "did you mean 'average'"),
        ({"seeds": []}, "different ones"),
        ({"seeds": [3, 3]}, "different ones"),
        ({"seeds": [0, 5]}, "both have [0]"),
        ({"stop": Stop(after=0)}, "count from 1"),
        ({"stop": Stop(keep=0.0)}, "above 0"),
        ({"stop": Stop(keep=1.5)}, "at most 1"),
    ],
)
def test_mistakes(options: dict[str, Any], part: str) -> None:
    search = Search(**{"parameters": {"lr": RANGE}, **options})
    with pytest.raises(UserError) as caught:
        check_search(search, axes={"m": {"none": {}, "ewc": {}}}, seeds=[0, 1], where="study.yaml")
    assert part in str(caught.value)
    assert str(caught.value).startswith("study.yaml")


def test_what_is_right_passes() -> None:
    parameters = {
        "lr": RANGE,
        "x": Parameter(choices=[1, 2], only={"m": ["ewc"]}),
        "n": Parameter(low=1, high=9, log=True),
    }
    check_search(Search(parameters=parameters), axes={"m": {"ewc": {}}}, seeds=[0], where="study.yaml")

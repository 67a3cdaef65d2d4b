"""What a study searches over: typed, checked, and independent of who searches."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any, Literal

from residency.core.errors import UserError
from residency.metrics.discovery import matrix_metrics

__all__ = [
    "Direction",
    "Parameter",
    "Search",
    "Stop",
    "applies",
    "check_search",
    "make_search",
    "survivors",
    "value_of",
]

Direction = Literal["maximize", "minimize"]


def directions() -> Mapping[str, Direction]:
    """Metric -> what is better: what a trial may be judged by, of one scorer's matrix."""
    found = (metric for metric in matrix_metrics().values() if metric.about.needs is None)
    return {metric.name: "minimize" if metric.about.kind == "loss" else "maximize" for metric in found}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """Values of one key: a range, or choices.

    Args:
        low: Smallest value. If `low` and `high` are both integers, so are the values.
        high: Largest value.
        log: Whether the logarithm is spread evenly, for example for learning rates.
        choices: Values, or preset files relative to the study file, instead of a range.
        only: Where the parameter exists, as {axis: value, or list of values}; everywhere by default.
    """

    low: int | float | None = None
    high: int | float | None = None
    log: bool = False
    choices: list[Any] | None = None
    only: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Stop:
    """Trials that are behind are not trained to the end; they only ever stop between two stages.

    Args:
        after: The first stage after which trials may be stopped.
        keep: The share of all trials that have come so far which goes on (asynchronous successive halving, Li et al.
            2020, with 1/keep as reduction factor and every stage as a rung).
    """

    after: int = 1
    keep: float = 0.5


@dataclass(frozen=True, kw_only=True)
class Search:
    """Adaptive search, for every combination of the axes on its own and with the same number of trials.

    Trials are judged by validation rows of finished streams. What is found is then run as the cells of the study, with
    its own seeds and orders, and scored on test rows, which the search never sees.

    Args:
        parameters: {dotted key of a config: its values}.
        trials: For every combination.
        batch: Trials that are drawn together. The next ones know their scores; more at once is faster and learns less.
            What is found depends on it, and not on the number of workers.
        metric: Of the score matrix, see `residency.metrics.definitions`.
            Scores where less is better enter negated, so that more is better for all but the forgettings.
        direction: `maximize` or `minimize`; by default what is better for the metric.
        scorer: Which score; that of the study by default.
        sampler: `tpe` (tree-structured Parzen estimators) or `random`.
        seed: Of the sampler.
        seeds: Of the runs of one trial, whose mean counts; other ones than the study reports.
        stop: Early stopping; none by default.
    """

    parameters: dict[str, Parameter]
    trials: int = 20
    batch: int = 4
    metric: str = "average"
    direction: Direction | None = None
    scorer: str | None = None
    sampler: Literal["tpe", "random"] = "tpe"
    seed: int = 0
    seeds: list[int] = field(default_factory=lambda: [1000])
    stop: Stop | None = None

    @property
    def towards(self) -> Direction:
        """What is better."""
        return self.direction or directions()[self.metric]

    @property
    def sign(self) -> int:
        """+1 if more is better, else -1."""
        return 1 if self.towards == "maximize" else -1


def make_search(parsed: Any, written: Mapping[str, Any], *, absolute: Callable[[Any], Any]) -> Search:
    """A search section as objects.

    Args:
        parsed: As the parser gives it.
        written: As it stands in the file: choices that look like a class must stay what they are.
        absolute: Makes the path of a preset file absolute; leaves other values as they are.
    """
    parameters = {}
    for key, part in parsed.parameters.items():
        parameter = Parameter(**vars(part))
        if parameter.choices is not None:
            choices = [absolute(choice) for choice in written["parameters"][key]["choices"]]
            parameter = replace(parameter, choices=choices)
        # A parser that is given a choice of number types may make a float of an integer.
        whole: dict[str, Any] = {
            name: n for name in ("low", "high") if type(n := written["parameters"][key].get(name)) is int
        }
        parameter = replace(parameter, **whole)
        parameters[str(key)] = parameter
    stop = None if parsed.stop is None else Stop(**vars(parsed.stop))
    return Search(**{**vars(parsed), "parameters": parameters, "stop": stop})


def applies(parameter: Parameter, axes: Mapping[str, str]) -> bool:
    """Whether a parameter exists in a combination {axis: value}."""
    return all(axes.get(axis) in _names(values) for axis, values in parameter.only.items())


def _names(values: Any) -> list[str]:
    return [str(value) for value in (values if isinstance(values, list) else [values])]


def value_of(search: Search, rows: Sequence[Sequence[float | None]], *, higher_is_better: bool) -> float | None:
    """How good a trial is, as far as it has come.

    Args:
        search: Its metric.
        rows: (k+1, T) validation scores, row 0 before training; k of T stages are done.
        higher_is_better: Of the scores.

    Returns:
        The metric over the k domains learnt so far; `None` where it is not defined or not finite.
    """
    from residency.metrics.matrix import summary

    k = len(rows) - 1
    if k < 1:
        return None
    square = [[math.nan if value is None else value for value in row[:k]] for row in rows]
    found = summary(square, higher_is_better=higher_is_better)[search.metric]
    return float(found) if math.isfinite(found) else None


def survivors(
    values: Mapping[int, float | None], earlier: Sequence[float], *, keep: float, sign: int
) -> tuple[int, ...]:
    """The trials that go on after a stage.

    Args:
        values: {trial: value after the stage}. `None` = it has none there, and goes on.
        earlier: Values that trials of earlier batches had after that stage.
        keep: Share that goes on.
        sign: +1 if more is better, else -1.

    Returns:
        Trials whose value is among the best ceil(keep · n) of all n known values; equal values go on together, so that
        the order of trials decides nothing.
    """
    known = sorted((sign * v for v in (*(v for v in values.values() if v is not None), *earlier)), reverse=True)
    if not known:
        return tuple(values)
    worst = known[math.ceil(keep * len(known) - 1e-9) - 1]
    return tuple(trial for trial, value in values.items() if value is None or sign * value >= worst)


# -- what can be wrong ------------------------------------------------------------------------------------------------


def check_search(search: Search, *, axes: Mapping[str, Mapping[str, Any]], seeds: Sequence[int], where: str) -> None:
    """Everything that can be wrong in a search section without parsing a config.

    Args:
        search: The section.
        axes: Of the study.
        seeds: Of the study's own runs.
        where: The file, for messages.

    Raises:
        UserError: See the message.
    """
    if not search.parameters:
        _refuse(where, "search has no parameters", "there is nothing to search", "add one, for example\n" + _EXAMPLE)
    for key, parameter in search.parameters.items():
        _check_parameter(parameter, axes, f"{where}: search.parameters.{key}")
    if search.metric not in (metrics := directions()):
        near = get_close_matches(search.metric, metrics, 1)
        fix = f"did you mean {near[0]!r}?" if near else "choose one of them"
        _refuse(where, f"search.metric is {search.metric!r}", f"trials are judged by {', '.join(metrics)}", fix)
    if search.trials < 1 or search.batch < 1:
        got = f"search.trials is {search.trials}, search.batch is {search.batch}"
        _refuse(where, got, "both count trials", "give at least 1")
    if not search.seeds or len({*search.seeds}) < len(search.seeds):
        _refuse(
            where, f"search.seeds is {search.seeds}", "every run of a trial has its own seed", "give different ones"
        )
    if both := sorted({*search.seeds} & {*seeds}):
        why = "runs that chose the parameters would flatter them when they are reported"
        _refuse(where, f"seeds and search.seeds both have {both}", why, "give other seeds to one of them")
    if search.stop is not None and (search.stop.after < 1 or not 0 < search.stop.keep <= 1):
        got = f"search.stop has after: {search.stop.after}, keep: {search.stop.keep}"
        _refuse(where, got, "stages count from 1, and a share is above 0 and at most 1", "correct them")


def _check_parameter(parameter: Parameter, axes: Mapping[str, Mapping[str, Any]], where: str) -> None:
    low, high, choices = parameter.low, parameter.high, parameter.choices
    got = f"low: {low}, high: {high}, choices: {choices}"
    if (choices is None) == (low is None and high is None) or (low is None) != (high is None):
        _refuse(where, got, "values are a range or choices", "give low and high, or choices")
    if choices is not None and (not choices or len({json.dumps(choice) for choice in choices}) < len(choices)):
        _refuse(where, got, "every choice counts once", "give different choices, at least one")
    if low is not None and high is not None and not (math.isfinite(low) and math.isfinite(high) and low < high):
        _refuse(where, got, "low is below high", "correct the range")
    if parameter.log and (low is None or low <= 0):
        _refuse(where, f"log: true with {got}", "only numbers above 0 have a logarithm", "leave log out, or raise low")
    for axis, values in parameter.only.items():
        known = list(axes.get(axis, {}))
        if unknown := [name for name in _names(values) if name not in known]:
            why = f"the axes are {', '.join(axes) or 'none'}; {axis} has {', '.join(known) or 'no values'}"
            _refuse(where, f"only has {axis}: {unknown[0]}", why, "name an axis and one of its values")


def _refuse(where: str, got: str, why: str, fix: str) -> None:
    raise UserError(f"{where}: {got}", why=why, fix=fix)


_EXAMPLE = "    parameters: {model.optimizer.init_args.lr: {low: 0.0001, high: 0.01, log: true}}"

"""The trials of one search, in a journal: drawn by Optuna, and nothing but a function of seed and earlier scores.

A trial's parameters are drawn from (seed of the search, number of the trial, what the journal holds of trials before
it). Batches are drawn whole and judged in the order of their numbers, so neither the number of workers nor a kill at
any instant changes what is found.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.core.tensor_files import replace_file
from residency.study.planning.search_space import Parameter, Search

__all__ = ["Status", "Trial", "Trials", "import_optuna"]

Status = Literal["running", "done", "stopped", "failed"]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One trial.

    Args:
        number: From 0.
        keys: {dotted key: value}, as overrides of a config.
        status: `stopped` = after a stage, because it was behind.
        value: How good it was; `None` unless it is done.
        after: {stage: how good it was then}.
    """

    number: int
    keys: Mapping[str, Any]
    status: Status
    value: float | None
    after: Mapping[int, float]


def import_optuna() -> ModuleType:
    """Optuna, quiet.

    Raises:
        UserError: It is not installed.
    """
    try:
        import optuna
    except ImportError as error:
        raise UserError(
            "the study has a search section, and Optuna is not installed",
            why="it is an extra, because a factorial study does not need it",
            fix="install it with `pip install 'residency[optuna]'`, or remove the section",
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    return optuna


class Trials:
    """A journal of trials.

    Args:
        path: Journal file; several searches may share it. Whoever writes holds the study.
        name: Of this search; one with other parameters, metric or config needs another name.
        place: What is searched; with the seed it decides what is drawn, wherever the files lie.
        search: Parameters, sampler, seed.
        parameters: Those of the search that exist here.
    """

    def __init__(
        self, *, path: Path, name: str, place: str, search: Search, parameters: Mapping[str, Parameter]
    ) -> None:
        self.name = name
        self.place = place
        self.search = search
        self.parameters = dict(parameters)
        self._optuna = import_optuna()
        _mend(path)
        journal = self._optuna.storages.journal
        self._distributions = {key: self._distribution(parameter) for key, parameter in self.parameters.items()}
        self._study = self._optuna.create_study(
            study_name=name,
            storage=journal.JournalStorage(journal.JournalFileBackend(str(path))),
            direction=search.towards,
            load_if_exists=True,
        )
        if not self._study.user_attrs:
            # So that the journal explains itself.
            self._study.set_user_attr("search", json.loads(json.dumps(asdict(search))))

    def _distribution(self, parameter: Parameter) -> Any:
        kinds = self._optuna.distributions
        if parameter.choices is not None:
            # Lists and dicts are no choices for Optuna; their JSON is.
            return kinds.CategoricalDistribution([json.dumps(choice) for choice in parameter.choices])
        low, high = parameter.low, parameter.high
        whole = isinstance(low, int) and isinstance(high, int)
        kind = kinds.IntDistribution if whole else kinds.FloatDistribution
        return kind(low, high, log=parameter.log)

    # -- reading --------------------------------------------------------------------------------------------------

    def all(self) -> list[Trial]:
        """Every trial so far, by number."""
        return [self._trial(frozen) for frozen in self._study.get_trials()]

    def _trial(self, frozen: Any) -> Trial:
        states = self._optuna.trial.TrialState
        status: dict[Any, Status] = {states.COMPLETE: "done", states.PRUNED: "stopped", states.FAIL: "failed"}
        keys = {
            key: json.loads(frozen.params[key]) if parameter.choices is not None else frozen.params[key]
            for key, parameter in self.parameters.items()
        }
        return Trial(
            number=frozen.number,
            keys=keys,
            status=status.get(frozen.state, "running"),
            value=frozen.value if frozen.state == states.COMPLETE else None,
            after=dict(frozen.intermediate_values),
        )

    def best(self) -> Trial | None:
        """The best finished trial; of equal ones the first. `None` if there is none."""
        done = [trial for trial in self.all() if trial.value is not None]
        return max(done, key=lambda trial: (self.search.sign * (trial.value or 0.0), -trial.number), default=None)

    # -- drawing --------------------------------------------------------------------------------------------------

    def batch(self, first: int) -> list[Trial]:
        """The trials from `first` to the end of its batch, drawn if they are not there yet."""
        last = min(first + self.search.batch, self.search.trials)
        for number in range(len(self._study.get_trials()), last):
            self._draw(number)
        return self.all()[first:last]

    def _draw(self, number: int) -> None:
        """Add one trial in one step: a kill leaves all of it or nothing."""
        optuna = self._optuna
        # Drawn on a copy in memory, because Optuna writes a trial parameter by parameter.
        copy = optuna.create_study(direction=self.search.towards, sampler=self._sampler(number))
        copy.add_trials(self._study.get_trials())
        params = copy.ask(self._distributions).params
        running = optuna.trial.TrialState.RUNNING
        trial = optuna.trial.create_trial(state=running, params=params, distributions=self._distributions)
        self._study.add_trial(trial)

    def _sampler(self, number: int) -> Any:
        seed = seed_of(self.search.seed, "search", self.place, number) % 2**32
        if self.search.sampler == "random":
            return self._optuna.samplers.RandomSampler(seed=seed)
        # Random trials first, as usual, but no more than two batches; not a share of the trials, which may be raised.
        return self._optuna.samplers.TPESampler(seed=seed, n_startup_trials=min(10, 2 * self.search.batch))

    # -- telling --------------------------------------------------------------------------------------------------

    def report(self, number: int, stage: int, value: float | None) -> None:
        """How good a trial is after a stage; telling it again changes nothing."""
        frozen = self._study.get_trials()[number]
        if value is not None and stage not in frozen.intermediate_values and not frozen.state.is_finished():
            self._optuna.trial.Trial(self._study, frozen._trial_id).report(value, stage)

    def tell(self, number: int, status: Status, value: float | None = None) -> None:
        """How a trial ended; telling it again changes nothing."""
        states = self._optuna.trial.TrialState
        state = {"done": states.COMPLETE, "stopped": states.PRUNED, "failed": states.FAIL}[status]
        if not self._study.get_trials()[number].state.is_finished():
            self._study.tell(number, values=value if status == "done" else None, state=state)


def _mend(path: Path) -> None:
    """Drop a last line that a kill cut off; Optuna would append to it and never read the journal again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = path.read_bytes() if path.is_file() else b""
    if text and not text.endswith(b"\n"):
        whole = text[: text.rfind(b"\n") + 1]
        replace_file(path, lambda temporary: _write(temporary, whole))


def _write(path: Path, content: bytes) -> None:
    path.write_bytes(content)

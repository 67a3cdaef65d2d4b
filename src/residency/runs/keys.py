"""Keys of everything a run makes: equal keys, equal bits (design, section 5).

    state before ─┬─ trained ──┬─ weights ── finished        trained   what happens from the first to the last step
    mitigations  ─┘            │     │                       weights   after `transform_weights`
                               │  evaluations                finished  weights and the mitigations' states
                               └─ states

A key is the SHA-256 of all that can influence the result and of nothing else, so that stages are shared as widely as
their contents are equal: training knows only the mitigations that touch it, weights only those that change them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from residency.core.environment import numerics
from residency.core.types import Stage
from residency.engine.stage_overrides import stage_config
from residency.inspection.base import Observer, watches_training
from residency.mitigations.base import Mitigation, overrides, serves
from residency.runs.code_identity import class_code, core_code, observer_code
from residency.runs.kept_config import ONE_RANK

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule
    from residency.engine.scoring.settings import EvaluationSettings

__all__ = ["RunKeys", "StageKeys", "digest"]

# Of the Trainer's options, those that only watch. `logger` may be an object with a folder of its own.
_WATCHING = {"logger", "enable_progress_bar", "enable_model_summary", "default_root_dir", "profiler", "max_steps"}
_WATCHING |= {"max_epochs", "barebones", "enable_checkpointing"}


def digest(*parts: Any) -> str:
    """SHA-256 (hex) of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageKeys:
    """The keys of one stage.

    Args:
        trained: Weights as the last step left them.
        weights: Weights after `transform_weights`; `trained` itself if nobody changes them.
        served: What is scored; `weights` itself if nobody serves anything else.
        finished: Weights and the states of all mitigations; `trained` itself if there is no mitigation. Of the last
            stage `weights`: there is nothing to remember for.
        watched: Mitigations whose state is part of what was trained, by name.
    """

    trained: str
    weights: str
    served: str
    finished: str
    watched: tuple[str, ...]


class RunKeys:
    """The keys of a run.

    Args:
        module: Its parts; not built.
        data: Its domains.
        stages: Its stages.
        config: The resolved config, as `ResidencyCLI.resolved`: what the parts were made from.
        observers: Who looks inside, by name. What they see while a stage is trained is kept with it, so that a stage at
            which nobody has looked is not taken for one at which somebody has.
    """

    def __init__(
        self,
        *,
        module: ContinualModule,
        data: StreamData,
        stages: Sequence[Stage],
        config: Mapping[str, Any],
        observers: Mapping[str, Observer] | None = None,
    ) -> None:
        self.module = module
        self._observers = {name: one for name, one in (observers or {}).items() if watches_training(one)}
        self.data = data
        self.config = config
        model = config["model"]
        self._adapter = [model["adapter"], class_code(type(module.adapter))]
        met = module.backbone.for_stream(data)
        backbone = [dict(met.fingerprint()), class_code(type(met))]
        self._environment = [numerics(), core_code(), backbone]
        self.model = digest("model", self._environment, self._adapter, model.get("layout"))
        self.stages: list[StageKeys] = []
        self._add_stages(stages)

    def _add_stages(self, stages: Sequence[Stage]) -> None:
        # The adapter's first values are drawn from the seed; they are part of the first stage.
        weights, offset = "base", 0
        states: dict[str, str] = dict.fromkeys(self.module.mitigations, "none")
        for stage in stages:
            trained, watched = self._trained(stage, weights, states, offset)
            before, weights = weights, self._weights(stage, trained, weights, states)
            served = self._served(stage, weights, before, states)
            states = {name: self._state(m, trained, weights, states[name]) for name, m in self._named()}
            last = stage.index + 1 == stage.stages
            # After the last stage nobody remembers anything: its weights are all that counts.
            finished = weights if last else digest("finished", weights, states) if states else trained
            finished = finished if served == weights else digest("finished", finished, served)
            keys = StageKeys(trained=trained, weights=weights, served=served, finished=finished, watched=watched)
            self.stages.append(keys)
            offset += stage.steps

    def _named(self) -> list[tuple[str, Mitigation]]:
        return list(self.module.mitigations.items())

    def _trained(
        self, stage: Stage, before: str, states: Mapping[str, str], offset: int
    ) -> tuple[str, tuple[str, ...]]:
        settings = stage_config(self.config, stage.domain)
        objective = self.module.stage_settings.objective(stage.domain) or self.module.objective
        watched = {name: m for name, m in self._named() if m.touches_training(stage.index)}
        place = asdict(stage)
        if not (self.module.adapter.uses_stream_length or any(m.uses_stream_length for m in watched.values())):
            del place["stages"]
        parts = {
            "environment": self._environment,
            "adapter": self._adapter,
            "objective": [settings["objective"], class_code(type(objective))],
            "optimizer": [settings["optimizer"], settings["scheduler"], self.config["model"].get("layout")],
            "trainer": self._trainer(),
            "batches": [settings["batch_size"], self.config["data"].get("micro_batch_size")],
            "domain": self.data.domains[stage.domain].fingerprint(),
            "stage": [place, offset],
            "before": before,
            "mitigations": [[*self._mitigation(name, m), states[name]] for name, m in watched.items()],
        }
        if self._observers:
            parts["observers"] = [
                [name, self.config["inspection"][name], observer_code(type(one))]
                for name, one in self._observers.items()
            ]
        return digest("trained", parts), tuple(watched)

    def _trainer(self) -> dict[str, Any]:
        """How many processes train changes the last bits of what is learnt, not what it is."""
        options = self.config.get("trainer") or {}
        return {k: ONE_RANK.get(k, v) for k, v in options.items() if k not in _WATCHING}

    def _mitigation(self, name: str, mitigation: Mitigation, *, without: frozenset[str] = frozenset()) -> list[Any]:
        written = self.config["model"]["mitigations"][name]
        arguments = {k: v for k, v in (written.get("init_args") or {}).items() if k not in without}
        return [name, written["class_path"], arguments, mitigation.fingerprint(), class_code(type(mitigation))]

    def _weights(self, stage: Stage, trained: str, before: str, states: Mapping[str, str]) -> str:
        changing = [
            [*self._mitigation(n, m), states[n]]
            for n, m in self._named()
            if m.into == "train" and m.changes_weights(stage.index)
        ]
        return digest("weights", trained, before, changing) if changing else trained

    def _served(self, stage: Stage, weights: str, before: str, states: Mapping[str, str]) -> str:
        serving = [
            [*self._mitigation(n, m), states[n]]
            for n, m in self._named()
            if serves(m) and (m.into == "train" or m.changes_weights(stage.index))
        ]
        return digest("served", weights, before, serving) if serving else weights

    def _state(self, mitigation: Mitigation, trained: str, weights: str, before: str) -> str:
        if not mitigation.state and not any(overrides(mitigation, h) for h in ("on_domain_end", "on_domain_start")):
            return "none"
        written = self._mitigation(mitigation.name, mitigation, without=mitigation.training_only)
        return digest("state", trained, weights, written, before)

    def scores(self, k: int, column: str, *, split: str, settings: EvaluationSettings, layout: str) -> str:
        """Key of the scores of one column.

        Args:
            k: Row of the score matrix: 0 = before training, 1 ... T.
            column: Domain or probe.
            split: Which rows are scored.
            settings: How.
            layout: Of the batches, as the model uses it.
        """
        domain = self.data.columns[column]
        # With the adapter off, the model before training is the same whatever the adapter is.
        shared = "reference" in self.module.adapter.provides and not self.module.backbone.draws_from_seed
        base = "base" if shared else [self.model, self.config["seed_everything"]]
        parts: dict[str, Any] = {
            "environment": self._environment,
            "weights": self.stages[k - 1].served if k else base,
            "column": [column, domain.fingerprint(), split],
            "scorers": [
                [name, class_code(type(scorer)), scorer.options(), scorer.versions()]
                for name, scorer in domain.scorers.items()
            ],
            "settings": asdict(settings),
            "layout": layout,
        }
        if self.data.shots:
            parts["shots"] = self.data.shots  # of the training rows, which the fingerprint holds
        if self.data.classes != "own":
            parts["labels"] = self.data.labels(column, k)
        return digest("scores", parts)

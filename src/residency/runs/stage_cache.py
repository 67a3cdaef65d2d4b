"""The states, scores and histories of one run, taken from the store where they are and made where they are not."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from residency.core.environment import peak_memory_bytes
from residency.core.tensor_files import append_line, load_tree, load_whole_tree, read_lines, save_tree, write_lines
from residency.engine.scoring.row_scores import Evaluation
from residency.engine.stage import training_state
from residency.runs.keys import RunKeys
from residency.runs.score_files import read_scores, write_scores
from residency.runs.settings import StreamSettings
from residency.runs.stage_runner import StageRunner
from residency.runs.store.store import Entry, Store

__all__ = ["StageCache"]

_COSTS = ("seconds", "tokens", "flops")


class StageCache:
    """What a run is made of, by stage.

    Every method that makes something leaves it in the store, so that whoever asks next, here or elsewhere, finds it;
    a damaged entry is made anew, down to the first stage if need be.

    Args:
        runner: Makes what is missing.
        keys: The keys.
        store: Where everything lies.
    """

    def __init__(self, *, runner: StageRunner, keys: RunKeys, store: Store) -> None:
        self.runner = runner
        self.keys = keys
        self.store = store

    def with_seed(self, *, settings: StreamSettings, config: Mapping[str, Any]) -> StageCache:
        """The stages of a run that differs from this one in its seed, name and axes; nothing is checked again.

        Args:
            settings: Of that run.
            config: The resolved config of that run.
        """
        runner, stages = self.runner, [replace(stage, seed=settings.seed) for stage in self.runner.stages]
        other = StageRunner(
            module=runner.module,
            data=runner.data,
            trainers=runner.trainers,
            settings=settings,
            stages=stages,
            views=runner.views,
        )
        other.inspection = runner.inspection
        observers = runner.inspection.observers
        keys = RunKeys(module=runner.module, data=runner.data, stages=stages, config=config, observers=observers)
        return StageCache(runner=other, keys=keys, store=self.store)

    # -- facts --------------------------------------------------------------------------------------------------

    def model(self) -> Mapping[str, Any]:
        """Size and layout of the backbone with its adapter."""
        key = self.keys.model
        entry = self.store.find("models", key)
        if entry is None:
            entry = self.store.put("models", key, lambda folder: None, meta=self.runner.model_facts())
        return entry.meta

    def history(self, k: int) -> list[dict[str, Any]]:
        """The lines of the k-th stage."""
        return read_lines(self.trained(k).path / "history.jsonl")

    # -- states -------------------------------------------------------------------------------------------------

    def trained(self, k: int) -> Entry:
        """The k-th stage as its last step left it."""
        key = self.keys.stages[k - 1].trained
        entry = self.store.find("trained", key)
        while entry is None:
            self.runner.restore(k - 1, self._load)
            with self.store.lease("trained", key) as held:
                # Somebody may have made it between the look and the lease.
                entry = self.store.find("trained", key) or (self._train(k) if held else None)
        return entry

    def finished(self, k: int) -> Entry:
        """The state after the k-th stage; its meta holds the facts."""
        keys = self.keys.stages[k - 1]
        if keys.finished == keys.trained:
            return self.trained(k)
        entry = self.store.find("finished", keys.finished)
        while entry is None:
            trained = self.trained(k)
            with self.store.lease("finished", keys.finished) as held:
                entry = self.store.find("finished", keys.finished) or (self._finish(k, trained) if held else None)
        return entry

    def _load(self, k: int) -> Mapping[str, Any]:
        return load_tree(self.finished(k).path / "state.safetensors")

    def _train(self, k: int) -> Entry:
        keys, runner = self.keys.stages[k - 1], self.runner
        work = self.store.work(keys.trained)
        log = work / "history.jsonl"
        work.mkdir(parents=True, exist_ok=True)
        _trim(log, work / "checkpoint.safetensors", self.store.on_message)
        info = runner.info(self.model(), resumed=k - 1)
        facts = runner.train(k, work=work, write=lambda line: append_line(log, line), info=info)
        held = {name: runner.module.mitigations[name].state_bytes() for name in keys.watched}
        alone: dict[str, Any] = {"mitigation_state_bytes": held, "weights": {}}
        tree = {**training_state(runner.module, keys.watched), "facts": {**facts, **alone}}

        def write(folder: Path) -> None:
            save_tree(folder / "state.safetensors", tree)
            shutil.copyfile(log, folder / "history.jsonl")

        meta = {"facts": tree["facts"], "cell": runner.settings.cell, "model": self.keys.model}
        entry = self.store.put("trained", keys.trained, write, meta=meta)
        self.store.forget_work(keys.trained)
        if keys.finished == keys.trained:
            # Nothing follows the training but what the adapter and the module do for themselves.
            runner.finish(k, facts)
        return entry

    def _finish(self, k: int, trained: Entry) -> Entry:
        keys, runner = self.keys.stages[k - 1], self.runner
        if runner.trained != k:
            runner.restore(k - 1, self._load)
            runner.take_trained(k, load_tree(trained.path / "state.safetensors"))
        tree = runner.finish(k, trained.meta["facts"])

        def write(folder: Path) -> None:
            save_tree(folder / "state.safetensors", tree)

        meta = {"facts": tree["facts"], "cell": runner.settings.cell, "trained": keys.trained}
        return self.store.put("finished", keys.finished, write, meta=meta)

    # -- scores -------------------------------------------------------------------------------------------------

    def scores(self, k: int) -> tuple[Evaluation, dict[str, Any]]:
        """The scores of the state after stage k (0 = before training) on every column, and what they cost."""
        keys = self.score_keys(k)
        entries = {column: self.store.find("evaluations", key) for column, key in keys.items()}
        missing = [column for column, entry in entries.items() if entry is None]
        if missing:
            self.runner.restore(k, self._load)
        for column in missing:
            found, cost = self.runner.evaluate([column])
            entries[column] = self.store.put(
                "evaluations",
                keys[column],
                partial(_write_scores, found),
                meta={**cost, "peak_memory_bytes": peak_memory_bytes(), "column": column},
            )
        scores = [s for entry in entries.values() if entry for s in read_scores(entry.path / "scores.parquet")]
        metas = [entry.meta for entry in entries.values() if entry]
        facts = {f"evaluation_{part}": sum(m[f"evaluation_{part}"] for m in metas) for part in _COSTS}
        facts["peak_memory_bytes"] = max(meta["peak_memory_bytes"] for meta in metas)
        return scores, facts | ({} if missing else {"shared": True})

    def score_keys(self, k: int) -> dict[str, str]:
        """Column -> key of its scores after stage k; a column without scorers has none."""
        settings, columns = self.runner.settings, self.runner.data.columns
        options: dict[str, Any] = {"split": settings.split, "settings": settings.evaluation}
        options["layout"] = self.model()["layout"]
        return {name: self.keys.scores(k, name, **options) for name, domain in columns.items() if domain.scorers}


def _write_scores(scores: Evaluation, folder: Path) -> None:
    write_scores(folder / "scores.parquet", scores)


def _trim(log: Path, checkpoint: Path, on_message: Callable[[str], None]) -> None:
    """Forget the lines after the checkpoint: their steps are run again. Without a whole one all are."""
    tree = load_whole_tree(checkpoint, on_message=on_message)
    step = int(tree["global_step"]) if tree is not None else 0
    kept = [line for line in read_lines(log) if isinstance(line.get("step"), int) and line["step"] <= step]
    write_lines(log, kept)

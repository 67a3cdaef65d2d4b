"""The folder of one run: the truth on disk that everything else is a view of (design, section 7)."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from residency.core.digests import Damaged, check_files, digest_file, digest_files, seal, unseal
from residency.core.errors import UserError
from residency.core.markers import owns
from residency.core.tensor_files import (
    load_tree,
    read_json,
    read_lines,
    replace_file,
    save_tree,
    write_json,
    write_lines,
)
from residency.core.text import safe_name
from residency.engine.scoring.row_scores import Evaluation, count_rows, means
from residency.runs.kept_config import RUN, config_digest, differences_today, kept_config
from residency.runs.run_history import HISTORY, RunHistory
from residency.runs.run_lock import claim_run, lock_run
from residency.runs.score_files import write_scores
from residency.runs.whole_run import KEYS

__all__ = ["RunFolder"]

SCHEMA = 1
# Temporary names that `replace_file` and `link_or_copy` give, and nobody else.
_TEMPORARY = re.compile(r"\..+\.(\d+-)?[0-9a-f]{8}\.tmp")
_STATE, _SCORES, _RECORD = "state.safetensors", "scores.parquet", "stage.json"
_CHECKPOINT = "checkpoint.safetensors"


class RunFolder:
    """Paths, atomic writes and the order of completion of one run.

    A stage is trained when `state.safetensors` is there, complete when `stage.json` is; a run is complete when
    `results.json` is. Each is written last, whole, or not at all, and holds the digests of what it completes:

        stage.json      of state.safetensors, scores.parquet and history.jsonl (the stage's own lines) beside it
        results.json    of config.yaml, history.jsonl and every stage.json

    They are compared when the folder is used again. What is damaged counts as missing, and is told.

    Args:
        path: The folder; made when first written to.
        overwrite: Use the folder even if something else lies in it.
        on_message: Called with a sentence about what was damaged.
    """

    def __init__(
        self, path: Path, *, overwrite: bool = False, on_message: Callable[[str], None] = lambda text: None
    ) -> None:
        self.path = path
        self.overwrite = overwrite
        self.on_message = on_message
        self.log = RunHistory(path)

    def claim(self) -> None:
        """Make the folder, or see that it is one of a run.

        Raises:
            UserError: Something else lies there, or it cannot be made.
        """
        claim_run(self.path, overwrite=self.overwrite)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Only one process writes a run.

        Raises:
            UserError: Another living process does, or the folder is not a run's.
        """
        with lock_run(self.path, overwrite=self.overwrite):
            # Nobody else writes here now, so these are what a killed process left half written.
            for folder in (self.path, *self._stages()):
                for stale in folder.iterdir() if folder.is_dir() else ():
                    if _TEMPORARY.fullmatch(stale.name) and stale.is_file():
                        stale.unlink(missing_ok=True)
            yield

    def stage(self, k: int, domain: str) -> Path:
        """Folder of the k-th stage (0 = before training); the name is safe whatever the domain is called."""
        return self.path / "stages" / f"{k}-{safe_name(domain)}"

    def _stages(self) -> list[Path]:
        home = self.path / "stages"
        return sorted(home.iterdir()) if home.is_dir() else []

    # -- config ---------------------------------------------------------------------------------------------------

    def keep_config(self, config: Mapping[str, Any]) -> None:
        """Write the resolved config, or compare with the one that is there once a stage is.

        Raises:
            UserError: The folder belongs to a run with another config.
        """
        self.claim()
        path = self.path / "config.yaml"
        if self.begun():
            if self._compare_config(config):
                return
            self._check_trained_with(config)
        text = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
        replace_file(path, lambda temporary: _write(temporary, text))

    def _compare_config(self, config: Mapping[str, Any]) -> bool:
        """Whether the config that is there says the same; a damaged one says nothing."""
        path = self.path / "config.yaml"
        old = kept_config(path) if path.is_file() else {}
        if not old:
            self.on_message(f"{path} is missing or damaged; it is written again")
            return False
        if different := differences_today(path, old, config):
            raise UserError(
                f"{self.path} holds a run with another config; different: {', '.join(different[:6])}",
                why="its stages were trained with those values and cannot be mixed with new ones",
                fix="choose another --run_dir (or --name), or go on with "
                f"`residency fit --config {path} --run_dir {self.path}`",
            )
        return True

    def _check_trained_with(self, config: Mapping[str, Any]) -> None:
        """Compare a config with what the stages say that they were trained with."""
        for folder in self._stages():
            found = self._record(folder) or {}
            if found.get("config", config_digest(config)) != config_digest(config):
                raise UserError(
                    f"{self.path} has lost its config.yaml, and {folder.name} was trained with another config",
                    why="its stages cannot be mixed with new ones",
                    fix="choose another --run_dir, or give the config that began the run",
                )

    def begun(self) -> bool:
        """Whether anything depends on the config: a mistake found before the first score leaves nothing behind."""
        return any(file.suffix != ".tmp" for folder in self._stages() if folder.is_dir() for file in folder.iterdir())

    # -- stages ---------------------------------------------------------------------------------------------------

    def save_state(self, folder: Path, state: Mapping[str, Any]) -> None:
        """Write what the stage left behind: weights, mitigations' state, costs."""
        save_tree(folder / _STATE, state)

    def load_state(self, folder: Path) -> dict[str, Any]:
        """Read it back."""
        return load_tree(folder / _STATE)

    def complete_stage(
        self, folder: Path, scores: Evaluation, facts: Mapping[str, Any], *, config: Mapping[str, Any] | None = None
    ) -> None:
        """Write the scores of every example and the stage's history, then the record that marks the stage complete.

        Args:
            folder: Of the stage.
            scores: Of every row of every column.
            facts: What else the record holds.
            config: The resolved config; the record keeps its digest.
        """
        write_scores(folder / _SCORES, scores)
        write_lines(folder / HISTORY, [line for line in self.history() if line["stage"] == facts["stage"]])
        record = {**facts, "means": means(scores), **count_rows(scores)}
        record |= {} if config is None else {"config": config_digest(config)}
        files = digest_files(folder, (_STATE, _SCORES, HISTORY))
        write_json(folder / _RECORD, seal({**record, "files": files}))
        (folder / _CHECKPOINT).unlink(missing_ok=True)

    def completed(self, folder: Path, *, mend: bool = True) -> dict[str, Any] | None:
        """The record of a complete stage whose files are what was written; else `None`.

        Args:
            folder: Of the stage.
            mend: Take a lost history from that of the run, and delete a state that is damaged, so that the stage is
                trained anew; `False` = only look.

        Raises:
            UserError: A file cannot be read; nothing is known about it then, and nothing is done.
        """
        record = self._record(folder)
        if record is None:
            return None
        files = record.get("files", {})
        try:
            check_files(folder, {name: file for name, file in files.items() if name != HISTORY})
            if HISTORY in files:
                self._check_history(folder, int(record["stage"]), files[HISTORY], mend=mend)
        except Damaged as damage:
            if mend:
                self.on_message(f"{folder}: {damage}; it is made again")
                if _STATE in str(damage) or HISTORY in str(damage):
                    (folder / _STATE).unlink(missing_ok=True)
            return None
        if mend:  # a kill may have come between the record and this; what is complete may lie where nobody may write
            with suppress(OSError):
                (folder / _CHECKPOINT).unlink(missing_ok=True)
        return record

    def _record(self, folder: Path) -> dict[str, Any] | None:
        path = folder / _RECORD
        if not path.is_file():
            return None
        try:
            return unseal(json.loads(path.read_bytes()), name=_RECORD, required=False, keys=("stage", "means"))
        except (ValueError, RecursionError) as damage:
            self.on_message(f"{path} is damaged and is made again ({' '.join(str(damage).split())})")
            return None

    def _check_history(self, folder: Path, stage: int, file: Mapping[str, Any], *, mend: bool) -> None:
        """The stage's own lines; lost ones are taken from the run's history, if those are the same."""
        try:
            check_files(folder, {HISTORY: file})
        except Damaged:
            if not mend:
                raise
            lines = [line for line in read_lines(self.log.path) if line.get("stage") == stage]
            write_lines(folder / HISTORY, lines)
            if digest_file(folder / HISTORY) != file:
                raise
            self.on_message(f"{folder / HISTORY} was damaged and has been taken from {self.log.path}")

    # -- history --------------------------------------------------------------------------------------------------

    def history(self) -> list[dict[str, Any]]:
        """All logged steps; a last line that a kill cut off is dropped."""
        return self.log.lines()

    # -- results --------------------------------------------------------------------------------------------------

    def results(self) -> dict[str, Any] | None:
        """The finished record, or `None`; one that does not fit its checksum counts as missing.

        Raises:
            UserError: It cannot be read.
        """
        path = self.path / "results.json"
        if not path.is_file():
            return None
        try:
            content = path.read_bytes()
        except OSError:
            read_json(path)
            raise
        try:
            return unseal(json.loads(content), name=path.name, required=False, keys=KEYS)
        except (ValueError, RecursionError) as damage:
            self.on_message(f"{path} is damaged and is made again ({' '.join(str(damage).split())})")
            return None

    def complete_record(self, config: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The record of a complete run whose every file is what was written; else `None`. Nothing is written.

        Args:
            config: What the run was to be made with; `None` is not compared.

        Raises:
            UserError: The run was made with another config, or a file cannot be read.
        """
        record = self.results() if owns(self.path, RUN) else None
        if record is None:
            return None
        if config is not None:
            self._compare_config(config)
        files = record.get("files", {})
        try:
            check_files(self.path, files)
            stages = [(self.path / name).parent for name in files if name.endswith(_RECORD)]
            return record if all(self.completed(stage, mend=False) for stage in stages) else None
        except Damaged as damage:
            self.on_message(f"{self.path}: {damage}; it is made again")
            return None

    def complete(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Write the record that marks the run complete; it, with the digests of what it completes."""
        names = ["config.yaml", HISTORY, *(f"stages/{folder.name}/{_RECORD}" for folder in self._stages())]
        content = {"schema": SCHEMA, **record, "files": digest_files(self.path, names)}
        write_json(self.path / "results.json", seal(content))
        return content


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

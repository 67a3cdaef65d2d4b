"""Weights & Biases as a view of the record.

The truth is on disk; a failure of W&B is a warning, never the end of a run. Offline unless WANDB_MODE says otherwise.
One W&B run per run, whatever number of processes and attempts makes it: they share an id (`wandb_journal`), online
they resume it, and offline every process leaves a fragment of it, which `residency sync` uploads in their order.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.runs.views.flat_config import Scalar
from residency.runs.views.wandb_final import Tables, final_summary, final_tables, log_artifacts
from residency.runs.views.wandb_journal import Journal
from residency.runs.views.wandb_settings import WandbSettings, mode
from residency.runs.views.wandb_values import html, keys_of, numbers, safe, safe_path

__all__ = ["Scores", "WandbView"]

Scores = Mapping[str, Mapping[str, float | None]]

_PLACES = ("stage", "domain", "step", "stream_step", "time")


class WandbView:
    """One W&B run. Keys: `train/...` over `stream/step`, `eval/<domain>/<scorer>` over `stream/domain`, `final/...`.

    Args:
        settings: Project, group, tags.
        run_dir: Folder of the run; W&B writes below it unless WANDB_DIR is set.
        name: Display name.
        flat_config: What `flat_config` makes of the resolved config.
        domains: Names in learning order.
        probes: Names of what is only evaluated.
        directions: {scorer: whether higher is better}: which value of `eval/...` the summary calls the best.
    """

    def __init__(
        self,
        *,
        settings: WandbSettings,
        run_dir: Path,
        name: str,
        flat_config: Mapping[str, Scalar],
        domains: Sequence[str],
        probes: Sequence[str] = (),
        directions: Mapping[str, bool] | None = None,
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.name = name
        self.flat_config = dict(flat_config)
        self.keys = keys_of([*domains, *probes])
        self.directions = dict(directions or {})
        self.journal = Journal(run_dir, (settings.study or "", name))
        self._run: Any = None
        self._failed = False
        self._defined: set[str] = set()

    @property
    def live(self) -> bool:
        """Whether it is being written to."""
        return self._run is not None

    def start(self, *, wait: float = 60.0) -> bool:
        """Create the W&B run, or go on with it, unless W&B is switched off or another process has it.

        Args:
            wait: Seconds to wait for another process that writes to it.

        Raises:
            UserError: This process has a live W&B run that is not ours and would swallow the scores of this one.
        """
        if self._run is None and not self._failed and self.settings.active:
            self._guarded(lambda: self._init(wait))
        return self.live

    def _init(self, wait: float) -> None:
        import wandb

        if wandb.run is not None:
            raise UserError(
                f"this process already has a live W&B run ({wandb.run.name or wandb.run.id})",
                why="W&B keeps one run per process, so two trainings would be mixed into one",
                fix="call wandb.finish() first, start a process per run, or pass --wandb.enabled=false",
            )
        if not self.journal.open(wait=wait):
            return
        try:
            self._run = self._begin()
        finally:
            if self._run is None:
                self.journal.close()
        self.journal.begun(Path(self._run.settings.sync_dir) if mode() == "offline" else None)
        # Suffix globs only: W&B refuses "*/nll".
        for axis, shown in (("stream/step", "train/*"), ("stream/domain", "eval/*")):
            self._run.define_metric(axis)
            self._run.define_metric(shown, step_metric=axis)

    def _begin(self) -> Any:
        import wandb

        if mode() == "online":
            # Without a key W&B asks on the terminal, and nobody may be there to answer.
            wandb.setup(settings=wandb.Settings(login_timeout=15.0))
        folder = Path(os.environ.get("WANDB_DIR") or self.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        place = self.settings.place(self.name)
        return wandb.init(
            project=place.project,
            group=place.group,
            job_type=self.settings.job_type,
            name=self.name,
            tags=list(place.tags),
            config=self.flat_config,
            dir=folder,
            mode=mode(),
            id=self.journal.id,
            resume="allow",
            # Console, code and git state may hold what must not leave the machine.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False, silent=True),
        )

    def replay(self, lines: Sequence[Mapping[str, Any]], rows: Sequence[Scores]) -> None:
        """Show what W&B was not told yet: the lines of `history.jsonl`, and score rows 0, 1, ... so far."""
        for row, scores in enumerate(rows):
            self.log_row(row, scores)
            for line in lines:
                if line.get("stage") == row + 1:
                    self.log_step(line)

    def log_step(self, line: Mapping[str, Any]) -> None:
        """Log one line of the history, at the time at which it was written; one that is known already is left out."""
        place = line.get("stage", 0), line.get("step", line.get("stream_step", 0))
        if not self._wants(lambda: self.journal.step(*place)):
            return
        axes = {"stream/step": line.get("stream_step"), "stream/domain_index": line.get("stage")}
        told = {"_timestamp": line["time"]} if "time" in line else {}
        rest = {f"train/{safe_path(k)}": v for k, v in line.items() if k not in _PLACES}
        self._log(axes | told | rest)

    def log_row(self, row: int, scores: Scores) -> None:
        """Log row `row` of the score matrices (0 = before training), unless it is known already."""
        if not self._wants(lambda: self.journal.first(f"row {row}")):
            return
        cells = {
            f"eval/{self.keys[domain]}/{safe(scorer)}": (scorer, value)
            for scorer, means in scores.items()
            for domain, value in means.items()
            if domain in self.keys
        }
        for key, (scorer, _) in cells.items():
            if scorer in self.directions and key not in self._defined:
                self._defined.add(key)
                best = "max" if self.directions[scorer] else "min"
                self._guarded(lambda key=key, best=best: self._define(key, best))  # type: ignore[misc]
        self._log({"stream/domain": row} | {key: value for key, (_, value) in cells.items()})

    def _define(self, key: str, best: str) -> None:
        # W&B 0.31 has no `goal`; the summary's best and last value of a metric say the same.
        self._run.define_metric(key, step_metric="stream/domain", summary=f"{best},last")

    def finish(self, record: Mapping[str, Any] | None, *, exit_code: int, heat_map: Path | None = None) -> None:
        """Log what is final and end the W&B run, or this process's part of it, whatever happens.

        Args:
            record: The finished record, `None` if the run did not get that far.
            exit_code: 0 = done; anything else marks the W&B run as failed.
            heat_map: A PNG to show beside the table of scores.
        """
        try:
            if record is not None and self.live and not self._failed:
                self._guarded(lambda: self._log_final(record, heat_map))
        finally:
            run, self._run = self._run, None
            if run is not None:
                self._guarded(lambda: _end(run, exit_code))
                self.journal.close()

    def conclude(self, facts: Mapping[str, Scalar], tables: Tables, *, pages: Mapping[str, Path] | None = None) -> None:
        """Log what a report says and end its W&B run.

        Args:
            facts: Entries of the summary.
            tables: Key -> (columns, rows).
            pages: Key -> a self-contained HTML page, or a PNG.
        """

        def log() -> None:
            self._run.summary.update({safe_path(key): value for key, value in facts.items()})
            self._log_tables(tables)
            for key, page in (pages or {}).items():
                self._run.log({key: html(page)})

        if self.live and not self._failed:
            self._guarded(log)
        self.finish(None, exit_code=0)

    def _log_final(self, record: Mapping[str, Any], heat_map: Path | None) -> None:
        self._run.summary.update(numbers(final_summary(record)))
        if "finished" in self.journal.done:
            return
        self._log_tables(final_tables(record))
        if heat_map is not None:
            self._run.log({"heat_map": html(heat_map)})
        log_artifacts(self._run, record, self.run_dir, self.settings)
        self.journal.first("finished")

    def _log_tables(self, tables: Tables) -> None:
        import wandb

        for key, (columns, rows) in tables.items():
            # Mixed, because a column may hold numbers and gaps.
            self._run.log({key: wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True)})

    def _wants(self, new: Callable[[], bool]) -> bool:
        return self.live and not self._failed and new()

    def _log(self, values: Mapping[str, Any]) -> None:
        self._guarded(lambda: self._run.log(numbers(values)))

    def _guarded(self, action: Callable[[], object]) -> None:
        """Do something with W&B; its failure is told once and ends the view, not the training."""
        try:
            action()
        except UserError:
            raise
        except Exception as error:
            first, self._failed = not self._failed, True
            if first:
                warnings.warn(f"W&B failed and is left out from here on: {error!r}", RuntimeWarning, stacklevel=4)


def _end(run: Any, exit_code: int) -> None:
    import wandb

    run.finish(exit_code=exit_code)
    if mode() == "offline":
        # `finish` returns before an offline log is wholly on disk; the end of W&B's service waits for it.
        wandb.teardown()

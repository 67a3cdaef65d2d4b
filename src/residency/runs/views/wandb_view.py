"""Weights & Biases as a view of the record.

The truth is on disk; a failure of W&B is a warning, never the end of a run. Offline unless WANDB_MODE says otherwise.
One W&B run per attempt: who goes on with a run replays what is on disk into a new W&B run of the same group.
"""

from __future__ import annotations

import base64
import math
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.runs.views.flat_config import Scalar

__all__ = ["Scores", "WandbSettings", "WandbView"]

Scores = Mapping[str, Mapping[str, float | None]]


@dataclass(kw_only=True)
class WandbSettings:
    """Where a run appears on Weights & Biases.

    Args:
        project: W&B project, normally one per study.
        group: Runs that belong together, such as the seeds of one cell; the run's name by default.
        job_type: Role of the run in its group: train, reference, report.
        tags: Free labels.
        enabled: Whether W&B is used at all. WANDB_MODE (online, offline, disabled) decides how; default offline.
    """

    project: str = "residency"
    group: str | None = None
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    enabled: bool = True


class WandbView:
    """One W&B run. Keys: `train/...` over `stream/step`, `eval/<domain>/<scorer>` over `stream/domain`, `final/...`.

    Args:
        settings: Project, group, tags.
        run_dir: Folder of the run; W&B writes below it unless WANDB_DIR is set.
        name: Display name.
        flat_config: What `flat_config` makes of the resolved config.
        domains: Names in learning order.
        probes: Names of what is only evaluated.
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
    ) -> None:
        self.settings = settings
        self.run_dir = run_dir
        self.name = name
        self.flat_config = dict(flat_config)
        self.keys = _keys([*domains, *probes])
        self._run: Any = None
        self._failed = False

    def start(self) -> None:
        """Create the W&B run, unless W&B is switched off.

        Raises:
            UserError: This process has a live W&B run that is not ours and would swallow the scores of this one.
        """
        if self.settings.enabled and _mode() != "disabled":
            self._guarded(self._init)

    def _init(self) -> None:
        import wandb

        if wandb.run is not None:
            raise UserError(
                f"this process already has a live W&B run ({wandb.run.name or wandb.run.id})",
                why="W&B keeps one run per process, so two trainings would be mixed into one",
                fix="call wandb.finish() first, start a process per run, or pass --wandb.enabled=false",
            )
        if _mode() == "online":
            # Without a key W&B asks on the terminal, and nobody may be there to answer.
            wandb.setup(settings=wandb.Settings(login_timeout=15.0))
        folder = Path(os.environ.get("WANDB_DIR") or self.run_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=self.settings.project,
            group=self.settings.group or self.name,
            job_type=self.settings.job_type,
            name=self.name,
            tags=list(self.settings.tags),
            config=self.flat_config,
            dir=folder,
            mode=_mode(),  # type: ignore[arg-type]
            # Console, code and git state may hold what must not leave the machine.
            settings=wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False, silent=True),
        )
        # Suffix globs only: W&B refuses "*/nll".
        for axis, shown in (("stream/step", "train/*"), ("stream/domain", "eval/*")):
            self._run.define_metric(axis)
            self._run.define_metric(shown, step_metric=axis)

    def replay(self, lines: Sequence[Mapping[str, Any]], rows: Sequence[Scores]) -> None:
        """Show what an earlier attempt has done: the lines of `history.jsonl`, and score rows 0, 1, ... so far."""
        for row, scores in enumerate(rows):
            self.log_row(row, scores)
            for line in lines:
                if line.get("stage") == row + 1:
                    self.log_step(line)

    def log_step(self, line: Mapping[str, Any]) -> None:
        """Log one line of the history."""
        axes = {"stream/step": line.get("stream_step"), "stream/domain_index": line.get("stage")}
        rest = {k: v for k, v in line.items() if k not in ("stage", "domain", "step", "stream_step")}
        self._log(axes | {"/".join(("train", *map(_safe, k.split("/")))): v for k, v in rest.items()})

    def log_row(self, row: int, scores: Scores) -> None:
        """Log row `row` of the score matrices (0 = before training)."""
        cells = [(self.keys.get(d), _safe(s), v) for s, means in scores.items() for d, v in means.items()]
        self._log({"stream/domain": row} | {f"eval/{key}/{scorer}": v for key, scorer, v in cells if key})

    def finish(self, record: Mapping[str, Any] | None, *, exit_code: int, heat_map: Path | None = None) -> None:
        """Log what is final and end the W&B run, whatever happens.

        Args:
            record: The finished record, `None` if the run did not get that far.
            exit_code: 0 = done; anything else marks the W&B run as failed.
            heat_map: A PNG to show beside the table of scores.
        """
        try:
            if record is not None and self._run is not None and not self._failed:
                self._guarded(lambda: self._log_final(record, heat_map))
        finally:
            run, self._run = self._run, None
            self._guarded(lambda: run and run.finish(exit_code=exit_code))

    def conclude(
        self,
        facts: Mapping[str, Scalar],
        tables: Mapping[str, tuple[Sequence[str], Sequence[Sequence[Any]]]],
        *,
        page: Path | None = None,
    ) -> None:
        """Log what a report says and end its W&B run.

        Args:
            facts: Entries of the summary.
            tables: Key -> (columns, rows).
            page: A self-contained HTML page.
        """

        def log() -> None:
            import wandb

            self._run.summary.update({"/".join(map(_safe, key.split("/"))): value for key, value in facts.items()})
            for key, (columns, rows) in tables.items():
                # Mixed, because a column may hold numbers and gaps.
                self._run.log({key: wandb.Table(columns=list(columns), data=list(rows), allow_mixed_types=True)})
            if page is not None:
                self._run.log({"report/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})

        if self._run is not None and not self._failed:
            self._guarded(log)
        self.finish(None, exit_code=0)

    def _log_final(self, record: Mapping[str, Any], heat_map: Path | None) -> None:
        import wandb

        for scorer, metrics in (record.get("summary") or {}).items():
            final = {f"final/{_safe(scorer)}/{_safe(name)}": value for name, value in metrics.items()}
            self._run.summary.update(_numbers(final))
        columns = ["row", "after", "domain", "scorer", "score"]
        self._run.log({"R": wandb.Table(columns=columns, data=list(_cells(record)))})
        if heat_map is not None:
            # wandb.Image needs Pillow, which nothing else here does.
            png = base64.b64encode(heat_map.read_bytes()).decode()
            html = f'<img alt="score matrix" style="max-width:100%" src="data:image/png;base64,{png}">'
            self._run.log({"heat_map": wandb.Html(html, inject=False)})

    def _log(self, values: Mapping[str, Any]) -> None:
        if self._run is not None and not self._failed:
            self._guarded(lambda: self._run.log(_numbers(values)))

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


def _mode() -> str:
    # An agent that has started this process waits for a run on its server.
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_SWEEP_ID") else "offline")


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number: null and NaN are missing, text and booleans are no metrics."""
    return {k: v for k, v in values.items() if type(v) in (int, float) and not math.isnan(v)}


def _safe(name: object) -> str:
    """A name W&B accepts in a key: letters, digits, underscores."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", str(name))[:60].strip("_") or "unnamed"


def _keys(names: Iterable[str]) -> dict[str, str]:
    """Each name's key; names that look the same to W&B are numbered."""
    keys: dict[str, str] = {}
    for name in names:
        key = _safe(name)
        candidates = (key if number == 1 else f"{key}_{number}" for number in count(1))
        keys[name] = next(candidate for candidate in candidates if candidate not in keys.values())
    return keys


def _cells(record: Mapping[str, Any]) -> Iterator[list[Any]]:
    """The score matrices as rows of a table; a missing score stays empty."""
    columns = [*record["domains"], *(record.get("probes") or [])]
    after = ["base", *record["domains"]]
    for scorer, entry in (record.get("scores") or {}).items():
        for row, values in enumerate(entry["R"]):
            for name, value in zip(columns, values, strict=False):
                yield [row, after[row], name, scorer, value]

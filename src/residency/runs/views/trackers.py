"""W&B as one of a run's views, and of the processes that make a study's stages."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from residency.core.errors import EXIT_SIGNAL
from residency.core.signals import Stopped
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.runs.results import score_infos
from residency.runs.views.base import RunInfo, View
from residency.runs.views.flat_config import flat_config
from residency.runs.views.wandb_journal import Journal
from residency.runs.views.wandb_settings import WandbSettings
from residency.runs.views.wandb_view import WandbView

__all__ = ["Tracker"]


class Tracker(View):
    """Mirrors a run to Weights & Biases (offline unless WANDB_MODE says otherwise), while it is made.

    In a process that makes one stage of a study's cell nobody calls `start`: it opens when training begins, unless
    another process writes to the same W&B run just then; the last process, which puts the run together, tells what is
    left, with the times at which it happened.

    Args:
        settings: Project, group, tags.
        folder: The run's folder.
        config: The resolved config.
        module: Whose scores are told.
        data: Domains and probes.
    """

    keeps = True

    def __init__(
        self,
        *,
        settings: WandbSettings,
        folder: Path,
        config: Mapping[str, Any],
        module: ContinualModule,
        data: StreamData,
    ) -> None:
        self.settings = settings
        self.folder = folder
        self.config = config
        self.module = module
        self.stream = data
        self._view: WandbView | None = None

    def is_there(self) -> bool:
        """Whether W&B was told of the whole run, or should not be."""
        return not self.settings.active or Journal(self.folder, ()).finished()

    @property
    def _wandb(self) -> WandbView:
        if self._view is None:
            infos = score_infos(self.module, self.stream)
            name, axes = str(self.config.get("name") or self.folder.name), self.config.get("axes") or {}
            self._view = WandbView(
                settings=self.settings,
                run_dir=self.folder,
                name=name,
                flat_config=flat_config(self.config) | {f"axes.{k}": str(v) for k, v in axes.items()},
                domains=self.stream.order,
                probes=[*self.stream.probes],
                directions={score: info.higher_is_better for score, info in infos.items()},
            )
        return self._view

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        """The W&B run begins or goes on, with what it was not told yet."""
        self._wandb.start()
        self._wandb.replay(history, rows)

    def callbacks(self, info: RunInfo, stage: Stage) -> list[Callback]:
        """No callback; a stage's own process begins to write."""
        self._wandb.start(wait=0.0)
        return []

    def step(self, line: Mapping[str, Any]) -> None:
        """One line of the history."""
        self._wandb.start(wait=0.0)
        self._wandb.log_step(line)

    def row(self, k: int, means: Mapping[str, Mapping[str, float]]) -> None:
        """One row of the score matrices."""
        self._wandb.start(wait=0.0)
        self._wandb.log_row(k, means)

    def release(self, *, exit_code: int = 0) -> None:
        """This process has told what it knows; the next one may write."""
        if self._view is not None:
            self._view.finish(None, exit_code=exit_code)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Summary, tables, heat map, artifacts; the W&B run ends."""
        picture = self.folder / "nll.png"
        self._wandb.finish(record, exit_code=0, heat_map=picture if picture.is_file() else None)

    def fail(self, error: BaseException) -> None:
        """The W&B run is marked as failed, or as stopped."""
        self.release(exit_code=EXIT_SIGNAL if isinstance(error, Stopped) else 1)

"""W&B as one of a run's views."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residency.runs.views.base import RunInfo, View
from residency.runs.views.flat_config import flat_config
from residency.runs.views.wandb_view import WandbSettings, WandbView

__all__ = ["Tracker"]


class Tracker(View):
    """Mirrors a run to Weights & Biases (offline unless WANDB_MODE says otherwise).

    Args:
        settings: Project, group, tags.
        folder: The run's folder.
        config: The resolved config.
    """

    keeps = True

    def __init__(self, *, settings: WandbSettings, folder: Path, config: Mapping[str, Any]) -> None:
        self.settings = settings
        self.folder = folder
        self.config = config
        self._wandb: WandbView | None = None

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        """A new W&B run, with what an earlier attempt has done."""
        self._wandb = WandbView(
            settings=self.settings,
            run_dir=self.folder,
            name=info.cell,
            flat_config=flat_config(self.config) | {f"axes.{k}": str(v) for k, v in info.axes.items()},
            domains=info.domains,
            probes=info.probes,
        )
        self._wandb.start()
        self._wandb.replay(history, rows)

    def step(self, line: Mapping[str, Any]) -> None:
        """One line of the history."""
        if self._wandb is not None:
            self._wandb.log_step(line)

    def row(self, k: int, means: Mapping[str, Mapping[str, float]]) -> None:
        """One row of the score matrices."""
        if self._wandb is not None:
            self._wandb.log_row(k, means)

    def finish(self, record: Mapping[str, Any]) -> None:
        """Summary, table, heat map; the W&B run ends."""
        if self._wandb is not None:
            picture = self.folder / "nll.png"
            self._wandb.finish(record, exit_code=0, heat_map=picture if picture.is_file() else None)

    def fail(self, error: BaseException) -> None:
        """The W&B run is marked as failed."""
        if self._wandb is not None:
            self._wandb.finish(None, exit_code=1)

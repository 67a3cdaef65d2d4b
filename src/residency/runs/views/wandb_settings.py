"""Where a run appears on Weights & Biases."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Literal

__all__ = ["Mode", "Place", "WandbSettings", "mode"]

Mode = Literal["online", "offline", "disabled", "shared"]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Names under which W&B files a run.

    Args:
        project: The project.
        group: Runs that belong together.
        tags: Labels.
    """

    project: str
    group: str
    tags: tuple[str, ...]


@dataclass(kw_only=True)
class WandbSettings:
    """Where a run appears on Weights & Biases.

    Args:
        project: W&B project; the study's name, and `residency` for a run of no study, by default.
        group: Runs that belong together, such as the seeds of one cell; the run's name by default. Runs of a study
            have the study's name before it, so that two studies never share a group.
        job_type: Role of the run in its group: train, reference, report.
        tags: Free labels; the study's name is added.
        study: Name of the study (set by `sweep`).
        artifact_mb: Weights up to this size are kept as artifacts, megabytes per stage; 0 = no artifacts.
        enabled: Whether W&B is used at all. WANDB_MODE (online, offline, disabled) decides how; default offline.
    """

    project: str | None = None
    group: str | None = None
    job_type: str = "train"
    tags: list[str] = field(default_factory=list)
    study: str | None = None
    artifact_mb: float = 100.0
    enabled: bool = True

    def place(self, name: str) -> Place:
        """Project, group and tags of the run `name`."""
        group = self.group or name
        return Place(
            project=self.project or self.study or "residency",
            group=group if self.study in (None, group) else f"{self.study}: {group}",
            tags=tuple(dict.fromkeys([*([self.study] if self.study else []), *self.tags])),
        )

    @property
    def active(self) -> bool:
        """Whether anything is written at all."""
        return self.enabled and mode() != "disabled"


def mode() -> Mode:
    """WANDB_MODE; offline by default, but an agent that has started this process waits for a run on its server."""
    return os.environ.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_SWEEP_ID") else "offline")  # type: ignore[return-value]

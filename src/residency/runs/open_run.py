"""A run's folder as parts in memory: what every verb of a saved stage begins with."""

from __future__ import annotations

from pathlib import Path

from residency.core.errors import UserError
from residency.runs.cli import ResidencyCLI

__all__ = ["open_run"]


def open_run(folder: Path) -> ResidencyCLI:
    """The config of a run, parsed, with its objects; no model is loaded.

    Args:
        folder: Of the run, finished or not.

    Raises:
        UserError: There is no run.
    """
    if not (folder / "config.yaml").is_file():
        raise UserError(
            f"{folder} is no run",
            why=f"there is no {folder / 'config.yaml'}",
            fix="give the folder of a run; `residency ls` lists them",
        )
    return ResidencyCLI(["predict", "--config", str(folder / "config.yaml"), "--run_dir", str(folder)], run=False)

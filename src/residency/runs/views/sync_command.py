"""`residency sync`: offline W&B runs of runs and studies go to the server, later, with W&B's own command."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from residency.core.errors import EXIT_DONE, EXIT_SOME_FAILED, UserError
from residency.core.text import for_terminal

__all__ = ["offline_runs", "sync_command"]

_DONE = ".wandb.synced"  # what W&B leaves beside a log that it has uploaded


def sync_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency sync`.

    Returns:
        Exit code.
    """
    parser = argparse.ArgumentParser(
        prog="residency sync",
        description="Upload the offline W&B runs of runs and studies (also those of their reports) with `wandb sync`. "
        "Runs that were uploaded before are left out.",
    )
    parser.add_argument("folders", nargs="+", type=Path, help="folders of runs or studies")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    parser.add_argument("--project", help="another W&B project than the one the runs name")
    parser.add_argument("--entity", help="W&B user or team")
    options = parser.parse_args(words)
    found = offline_runs(options.folders)
    for run in found:
        print(for_terminal(run))
    if options.dry_run or not found:
        print(f"{len(found)} offline runs to upload")
        return EXIT_DONE
    more = [word for name in ("project", "entity") if (v := getattr(options, name)) for word in (f"--{name}", v)]
    code = subprocess.call([sys.executable, "-m", "wandb", "sync", "--yes", *more, *map(str, found)])
    if code:
        print(f"residency sync: W&B ended with exit code {code}; the same command goes on with what is left")
    return EXIT_SOME_FAILED if code else EXIT_DONE


def offline_runs(folders: Sequence[Path]) -> list[Path]:
    """Offline W&B runs below these folders that were not uploaded yet, the oldest first.

    Args:
        folders: Of runs or studies. With WANDB_DIR set, W&B has written there instead, and it is looked at too.

    Raises:
        UserError: A folder does not exist.
    """
    elsewhere = os.environ.get("WANDB_DIR")
    found: dict[Path, None] = {}
    for folder in [*folders, *([Path(elsewhere)] if elsewhere else [])]:
        if not folder.is_dir():
            raise UserError(
                f"there is no folder {folder}",
                why="offline W&B runs are looked for inside the folders of runs and studies",
                fix="give the folder of a run (runs/<name>) or of a study (studies/<name>)",
            )
        found |= dict.fromkeys(path for path in folder.rglob("wandb/offline-run-*") if path.is_dir())
    waiting = [run for run in found if list(run.glob("*.wandb")) and not list(run.glob(f"*{_DONE}"))]
    # The name begins with the time of the start: attempts at one run go up in their order.
    return sorted(waiting, key=lambda run: run.name)

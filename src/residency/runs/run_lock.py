"""A run folder is residency's own, and one process at a time writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from residency.core.errors import UserError
from residency.core.markers import check_place, claim
from residency.runs.kept_config import RUN

__all__ = ["claim_run", "lock_run"]


def claim_run(path: Path, *, overwrite: bool) -> None:
    """Make the folder of a run, or see that it is one.

    Raises:
        UserError: Something else lies there, or it cannot be made.
    """
    with _makeable(path):
        claim(path, RUN, overwrite=overwrite)


@contextmanager
def lock_run(path: Path, *, overwrite: bool) -> Iterator[None]:
    """Hold the lock of a run folder, and claim the folder under it.

    Args:
        path: The folder; made if it is missing, because the lock lies in it.
        overwrite: Use the folder even if something else lies in it.

    Raises:
        UserError: Another living process holds the lock (nothing else is written then), or the folder is not a run's.
    """
    with _makeable(path):
        check_place(path, RUN, overwrite=overwrite)
        path.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path / ".lock", timeout=0):
            claim_run(path, overwrite=overwrite)
            yield
    except Timeout as error:
        raise UserError(
            f"{path} is in use by another process",
            why="two processes would overwrite each other's stages",
            fix="wait for it, stop it, or choose another --run_dir",
        ) from error


@contextmanager
def _makeable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be made: {error.strerror}",
            why="the files of a run need a folder",
            fix="choose another --run_dir",
        ) from error

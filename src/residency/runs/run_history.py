"""The steps that a run has logged: one file for all of it, and the lines of every complete stage beside its state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from residency.core.tensor_files import read_lines, write_lines

__all__ = ["HISTORY", "RunHistory"]

HISTORY = "history.jsonl"


class RunHistory:
    """`history.jsonl` of a run: one line per logged step, in the order of the stages.

    Args:
        folder: Of the run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / HISTORY

    def lines(self) -> list[dict[str, Any]]:
        """All lines; a last one that a kill cut off is dropped, and all that follows one that is no step."""
        return list(takewhile(_is_step, read_lines(self.path)))

    def start(self, complete: Sequence[Path], *, stage: int, step: int) -> list[dict[str, Any]]:
        """Put the history together from what the complete stages hold, and what the running one has logged.

        Args:
            complete: Folders of complete stages.
            stage: The one that is made next.
            step: Its last step that will not be run again.

        Returns:
            All lines, by stage.
        """
        old = self.lines()
        kept = [line for folder in complete for line in self.of_stage(folder, old)]
        kept += [line for line in old if line.get("stage") == stage and line.get("step", 0) <= step]
        return self._write(kept, old)

    def of_stage(self, folder: Path, old: Sequence[dict[str, Any]] | None = None) -> list[dict[str, Any]]:
        """The lines of one complete stage; folders of earlier versions have them in the run's history alone."""
        if (folder / HISTORY).is_file():
            return read_lines(folder / HISTORY)
        stage = int(folder.name.partition("-")[0])
        return [line for line in (self.lines() if old is None else old) if line.get("stage") == stage]

    def put(self, stage: int, lines: Sequence[dict[str, Any]]) -> None:
        """Replace the lines of one stage, all or none."""
        old = self.lines()
        self._write([*(line for line in old if line.get("stage") != stage), *lines], old)

    def order(self) -> None:
        """Bring the lines into the order of the stages: one in the middle may have been made last."""
        old = self.lines()
        self._write(old, old)

    def _write(self, lines: Sequence[dict[str, Any]], old: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        ordered = sorted(lines, key=lambda line: int(line["stage"]))
        if ordered != list(old):
            write_lines(self.path, ordered)
        return ordered


def _is_step(line: Mapping[str, Any]) -> bool:
    return isinstance(line.get("stage"), int) and isinstance(line.get("step"), int)

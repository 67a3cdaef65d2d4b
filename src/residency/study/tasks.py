"""The one entry point of a worker: a task's spec in, an exit code out, everything else through the store."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["main", "run_task"]


def run_task(spec: Mapping[str, Any]) -> int:
    """Carry a task out in this process.

    Args:
        spec: `Task.spec`: {"words": command line of `residency fit`, ...}.

    Returns:
        0 done · 2 the user can mend it · 71 out of memory · 75 stopped by a signal · 1 anything else. What is to be
        told to the user lies in the file `spec["status"]`: {"phase", "step", "steps", "message"}.
    """
    from residency.__main__ import main as command

    return command(["fit", *spec["words"]])


def main(words: list[str]) -> int:
    """`python -m residency.study.tasks SPEC.json`: a task with a command line of its own, as DDP needs it."""
    return run_task(json.loads(Path(words[0]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

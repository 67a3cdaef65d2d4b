"""One arm of a side-by-side measurement: any training program, held after every optimizer step until told to go on.

    python gate.py PROGRAM [ARGUMENTS ...]

The program runs unchanged. A hook that torch calls after each `Optimizer.step` reports the seconds since the last "go"
and waits for the next one; `lockstep.py` holds the other ends of the two pipes. So programs that share nothing but
torch take turns step by step, and a slow moment of the machine falls on all of them.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


class Gate:
    """Reports and waits after every optimizer step."""

    def __init__(self) -> None:
        self.into = os.fdopen(int(os.environ["GATE_IN"]), "r")
        self.out = os.fdopen(int(os.environ["GATE_OUT"]), "w")
        self.clock = time.perf_counter()

    def __call__(self, *args: Any) -> None:
        """After a step."""
        self.tell(seconds=time.perf_counter() - self.clock)
        self.into.readline()
        self.clock = time.perf_counter()

    def tell(self, **facts: Any) -> None:
        """One line to whoever holds the pipe."""
        self.out.write(json.dumps(facts) + "\n")
        self.out.flush()


def main() -> None:
    """Run the program with the gate in place."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    program = Path(sys.argv[1])
    gate = Gate()
    register_optimizer_step_post_hook(gate)
    sys.argv = sys.argv[1:]
    sys.path[0] = str(program.parent)
    runpy.run_path(str(program), run_name="__main__")


if __name__ == "__main__":
    main()

"""How long each door takes to open: processor seconds of a command, and as a multiple of `python -c "import torch"`.

    python experiments/benchmarks/doors.py [--plan CELLS] [--limits]

Best of three. `--plan` plans a study of so many cells in addition; `--limits` ends with exit code 1 where a limit is
crossed. Limits are processor seconds on two cores.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
from itertools import islice
from pathlib import Path

import yaml

LIMITS = {
    "--help": 0.3,
    "fit --help": 2.0,
    "fit --config quickstart --print_config": 4.0,
    "sweep --help": 0.5,
    "store --help": 0.5,
    "report --help": 0.5,
    "sync --help": 0.5,
    "gate --help": 0.5,
}
PLAN_SECONDS = 20.0


def seconds(words: list[str], *, times: int = 3) -> float:
    """The least processor time of some runs of a command; its output goes nowhere."""
    best = float("inf")
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        best = min(best, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return best


def write_study(folder: Path, cells: int) -> Path:
    """A study of at least so many cells: four mitigations, many strengths, two adapters, three orders, five seeds."""
    kinds = (("ewc", "strength"), ("mas", "strength"), ("l2_sp", "alpha"), ("si", "strength"))
    values = {
        f"{name}_{place}": {f"model.mitigations.{name}": name, f"model.mitigations.{name}.{key}": 10.0 ** (place / 2)}
        for place in range(-(-cells // (2 * 4 * 3 * 5)))
        for name, key in kinds
    }
    values = dict(islice(values.items(), -(-cells // (2 * 3 * 5))))
    study = {
        "name": "doors",
        "base": "quickstart",
        "axes": {"adapter": {name: {"model.adapter": name} for name in ("lora", "dora")}, "mitigation": values},
        "orders": "latin",
        "seeds": list(range(5)),
    }
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False))
    return path


def main() -> int:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plan", type=int, metavar="CELLS")
    parser.add_argument("--limits", action="store_true")
    options = parser.parse_args()
    torch = seconds([sys.executable, "-c", "import torch"])
    print(f"{'import torch':<44} {torch:>7.2f} s")
    crossed = False
    for words, limit in LIMITS.items():
        used = seconds([sys.executable, "-m", "residency", *words.split()])
        crossed |= used > limit
        print(f"{words:<44} {used:>7.2f} s {used / torch:>6.2f} x torch   limit {limit} s{' CROSSED' * (used > limit)}")
    if options.plan:
        with tempfile.TemporaryDirectory() as folder:
            study = write_study(Path(folder), options.plan)
            words = [sys.executable, "-m", "residency", "sweep", str(study), "--dry-run", "--threads", "1"]
            used = seconds([*words, "--study_dir", f"{folder}/out"], times=1)
        crossed |= used > PLAN_SECONDS
        print(f"{f'plan of {options.plan} cells':<44} {used:>7.2f} s   limit {PLAN_SECONDS} s")
    return int(crossed and options.limits)


if __name__ == "__main__":
    sys.exit(main())

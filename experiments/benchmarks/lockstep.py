"""Training programs side by side, one optimizer step each in turn: which is faster, by what factor?

    python experiments/benchmarks/lockstep.py [--steps 8] [--arms fit bare loop fit+ewc fit+replay]
    python experiments/benchmarks/lockstep.py --peers FOLDER --packages FOLDER [--trl PYTHON] --arms fit loop trl

Every arm is a process of its own that is held after each optimizer step (`gate.py`); the arms take turns in an order
that is reversed every round, so that a slow moment of the machine falls on all. The first step of every domain is left
out: it holds whatever a program sets up between domains. The ratio of two arms is the ratio of their summed steps; the
spread is the range over the domains. `fit+NAME` is `fit` with the preset configs/mitigation/NAME.yaml; its first
domain, in which most mitigations have nothing to do, is left out of all arms where there is such an arm.

The peers are the scripts of a folder that has `common.py`, `reference_stream.py`, `trl_stream.py`, `lightning_plain.py`
and `lightning_fast.py`: all train on the same rows from the same initial values. TRL needs an environment of its own,
whose interpreter is given with --trl. Without a folder of peers the rows are the packaged domains' own
(`packaged_rows.py`), and `loop` is `plain_loop.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

HERE = Path(__file__).resolve().parent
ARMS = {
    "fit": ("residency, as `fit` trains", HERE / "ours.py", ()),
    "bare": ("the same step in a plain loop", HERE / "ours.py", ("--bare",)),
    "loop": ("raw PyTorch and PEFT", "reference_stream.py", ()),
    "lightning": ("a small LightningModule", "lightning_plain.py", ("--eval-last",)),
    "fast": ("the peers' tuned step", "lightning_fast.py", ("--eval-last",)),
    "trl": ("TRL SFTTrainer", "trl_stream.py", ("--eval-last",)),
}


class Arm:
    """A gated process."""

    def __init__(self, name: str, command: Sequence[str], log: Path) -> None:
        self.name = name
        read_go, write_go = os.pipe()
        read_told, write_told = os.pipe()
        environment = {**os.environ, "GATE_IN": str(read_go), "GATE_OUT": str(write_told), "GOMP_SPINCOUNT": "10000"}
        self.log = log
        with log.open("w") as out:
            self.process = subprocess.Popen(
                command, pass_fds=(read_go, write_told), env=environment, stdout=out, stderr=subprocess.STDOUT
            )
        os.close(read_go)
        os.close(write_told)
        self._go: TextIO = os.fdopen(write_go, "w")
        self._told: TextIO = os.fdopen(read_told, "r")

    def go(self) -> None:
        """Let it run to the end of its next step."""
        self._go.write("go\n")
        self._go.flush()

    def wait(self) -> float:
        """Seconds of the step it has just done.

        Raises:
            RuntimeError: The process ended instead.
        """
        line = self._told.readline()
        if not line:
            raise RuntimeError(f"arm {self.name} ended early:\n{self.log.read_text()[-2000:]}")
        return float(json.loads(line)["seconds"])

    def finish(self) -> dict[str, Any]:
        """Let it run out; the JSON line it printed last."""
        self.go()
        if self.process.wait():
            raise RuntimeError(f"arm {self.name} failed:\n{self.log.read_text()[-2000:]}")
        lines = [line for line in self.log.read_text().splitlines() if line.startswith("{")]
        found: dict[str, Any] = json.loads(lines[-1])
        return found


def command(name: str, options: argparse.Namespace, folder: Path) -> list[str]:
    """How to start an arm."""
    kind, _, mitigation = name.partition("+")
    _, script, extra = ARMS[kind]
    python = options.trl if name == "trl" else sys.executable
    if isinstance(script, str):
        script = HERE / "plain_loop.py" if options.peers is None else options.peers / script
    words = [str(python), str(HERE / "gate.py"), str(script), str(options.model), str(options.packages), *extra]
    words += ["--steps", str(options.steps)]
    if name != "loop" or options.peers is None:
        words += ["--cache", str(folder / "rows.json")]
    if script.parent == HERE and options.peers is not None:
        words += ["--peers", str(options.peers)]
    words += ["--no-eval"] if options.no_eval else []
    return words + (["--mitigation", mitigation] if mitigation else [])


def described(name: str) -> str:
    """What an arm is."""
    kind, _, mitigation = name.partition("+")
    return ARMS[kind][0] + (f", with {mitigation}" if mitigation else "")


def measure(
    names: Sequence[str], options: argparse.Namespace, folder: Path
) -> tuple[dict[str, list[float]], dict[str, dict[str, Any]]]:
    """Seconds of every step of every arm, and what each printed at its end."""
    arms = []
    seconds: dict[str, list[float]] = {}
    for name in names:
        arm = Arm(name, command(name, options, folder), folder / f"{name}.log")
        arms.append(arm)
        seconds[name] = [arm.wait()]
        print(f"{name}: started, first step after {seconds[name][0]:.1f} s", flush=True)
    for step in range(1, 3 * options.steps):
        for arm in arms if step % 2 else arms[::-1]:
            arm.go()
            seconds[arm.name].append(arm.wait())
    return seconds, {arm.name: arm.finish() for arm in arms}


def summary(seconds: Mapping[str, Sequence[float]], steps: int, over: str) -> dict[str, dict[str, float]]:
    """Per arm: seconds of the counted steps, and how many times as fast as `over` it is, with the range over domains.

    Args:
        seconds: Arm -> seconds of each of 3 x `steps` steps.
        steps: Per domain; the first one of each does not count.
        over: The arm that is 1.00.
    """
    domains = range(1 if any("+" in name for name in seconds) else 0, 3)
    parts = {n: [sum(s[d * steps + 1 : (d + 1) * steps]) for d in domains] for n, s in seconds.items()}
    found = {}
    for name, own in parts.items():
        ratios = [base / mine for base, mine in zip(parts[over], own, strict=True)]
        total = sum(parts[over]) / sum(own)
        found[name] = {"seconds": sum(own), "speed": total, "least": min(ratios), "most": max(ratios)}
    return found


def main() -> None:
    """Measure, print a table and a JSON line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, help="folder of the peers' scripts")
    parser.add_argument("--packages", type=Path, default=Path(), help="for the peers: the domains' packages")
    parser.add_argument("--model", type=Path, help="folder of the model; the packaged one by default")
    parser.add_argument("--trl", type=Path, help="python of an environment that has trl")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps per domain")
    parser.add_argument("--arms", nargs="+", default=["fit", "bare", "loop"])
    parser.add_argument("--file", type=Path, help="figures to compare with (bench-smoke)")
    parser.add_argument("--no-eval", action="store_true", help="steps only, no last row of scores")
    parser.add_argument("--over", default="loop", help="the arm that is 1.00")
    options = parser.parse_args()
    if options.model is None:
        from residency.core.assets.cache import packaged_model

        options.model = packaged_model()
    with tempfile.TemporaryDirectory() as folder:
        seconds, ends = measure(options.arms, options, Path(folder))
    table = summary(seconds, options.steps, options.over if options.over in options.arms else options.arms[0])
    report(table, ends)
    print(json.dumps({"steps": options.steps, "arms": table, "step_seconds": seconds}))
    if options.file is not None:
        print(moved(table, json.loads(options.file.read_text(encoding="utf-8"))["speed"]))


def report(table: Mapping[str, Mapping[str, float]], ends: Mapping[str, Mapping[str, Any]]) -> None:
    """A table in Markdown."""
    print("| arm | seconds | speed | over the domains | peak MiB | last NLL |\n|---|---|---|---|---|---|")
    for name, row in table.items():
        last = ends[name].get("R") or [[]]
        nll = ", ".join(f"{value:.4f}" for value in last[-1])
        print(
            f"| {name}: {described(name)} | {row['seconds']:.1f} | {row['speed']:.2f} | "
            f"{row['least']:.2f} to {row['most']:.2f} | {ends[name].get('rss_mib', '')} | {nll} |"
        )


def moved(table: Mapping[str, Mapping[str, float]], filed: Mapping[str, float], *, tolerance: float = 0.1) -> str:
    """Which ratios differ from those on file by more than a tenth, and which do not."""
    lines = []
    for name, row in table.items():
        if name in filed:
            change = row["speed"] / filed[name] - 1
            word = "MOVED" if abs(change) > tolerance else "as on file"
            lines.append(f"{name}: {row['speed']:.2f}, on file {filed[name]:.2f} ({change:+.0%}): {word}")
    return "\n".join(lines) or "no arm of this run is on file"


if __name__ == "__main__":
    main()

"""What does a task of a study cost before its first step and after its last? Processor time, by part.

    python experiments/benchmarks/fixed_cost.py [--cells 100] [--against TREE] [--rounds 2]

Cells of two one-step stages on a model of 2 layers and 32 dimensions, one worker, one thread: what a task takes is
its fixed cost. `TREE` is a working tree of another commit (`git worktree add TREE COMMIT`): both run the same study in
turn. A sweep's processor time is that of all its processes; planning is that of the same sweep with `--dry-run`.
Repeating the finished study is measured too. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
STAGES = 2
PARTS = {
    "config": ["residency.runs.cli:parse"],
    "rows": ["residency.study.worker:take_rows"],
    "keys": ["residency.runs.keys:RunKeys.__init__"],
    "model": ["residency.runs.stage_runner:StageRunner.build"],
    "check of kernels": ["residency.backbones.causal_lm:CausalLM._examined"],
    "check of parts": ["residency.runs.stream:open_runner"],
    "training": ["residency.runs.stage_runner:StageRunner._train", "residency.runs.stage_runner:StageRunner._finish"],
    "scoring": ["residency.runs.stage_runner:StageRunner._evaluate"],
    "store": [f"residency.runs.store.store:Store.{name}" for name in ("find", "put", "lease", "forget_work")],
    "record": ["residency.runs.stream:_make_run"],
}
"""{part: functions}: time within a part that is inside of another one is the inner one's."""
Seconds = dict[str, float]


class Clock:
    """Processor time by part, without what the parts inside of it take."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._open: list[str] = ["rest"]
        self._last = time.process_time()

    def _turn(self) -> None:
        now = time.process_time()
        self.seconds[self._open[-1]] += now - self._last
        self._last = now

    def timed(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, with its time counted."""

        @functools.wraps(call)
        def within(*args: Any, **kwargs: Any) -> Any:
            self._turn()
            self._open.append(part)
            try:
                return call(*args, **kwargs)
            finally:
                self._turn()
                self._open.pop()

        return within

    def install(self) -> None:
        """Count every function of `PARTS` from now on."""
        for part, places in PARTS.items():
            for place in places:
                module, _, path = place.partition(":")
                *owners, name = path.split(".")
                owner = functools.reduce(getattr, owners, importlib.import_module(module))
                setattr(owner, name, self.timed(part, getattr(owner, name)))

    def total(self) -> Seconds:
        """So far."""
        self._turn()
        return dict(self.seconds)


def serve(log: Path) -> int:
    """The server of workers, whose tasks add what they took to `log`, one JSON object per line."""
    from residency.study import worker
    from residency.study.executors import forkserver

    run = worker.run_task

    def counted(spec: Mapping[str, Any]) -> int:
        clock = Clock()
        before = time.process_time()
        clock.install()
        code = run(spec)
        kind = "record" if spec.get("until") is None else "stage" if spec["until"] else "base"
        line = json.dumps({"kind": kind, "before": before, "seconds": clock.total()})
        with log.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
        return code

    worker.run_task = counted
    return forkserver.main()


def by_part(study: Path, folder: Path) -> dict[str, Any]:
    """{kind of task: {part: mean seconds}} of one sweep in this process, whose server is `serve`."""
    from residency.study.command import sweep
    from residency.study.executors import local

    log = folder / "parts.jsonl"

    class Served(subprocess.Popen[bytes]):
        def __init__(self, command: Sequence[str], **options: Any) -> None:
            super().__init__([command[0], __file__, "--serve", str(log)], **options)

    local.subprocess.Popen = Served  # type: ignore[misc]
    with open(os.devnull, "w", encoding="utf-8") as null:
        kept, sys.stdout = sys.stdout, null
        try:
            code = sweep(study, study_dir=folder / "parts", workers=1, threads=1)
        finally:
            sys.stdout = kept
    assert code == 0
    lines = [json.loads(text) for text in log.read_text(encoding="utf-8").splitlines()]
    found: dict[str, Any] = {}
    for kind in ("base", "stage", "record"):
        own = [line["seconds"] for line in lines if line["kind"] == kind]
        parts = sorted({part for line in own for part in line})
        means = {part: sum(line.get(part, 0.0) for line in own) / len(own) for part in parts}
        found[kind] = {"tasks": len(own), "all": round(sum(means.values()), 3)} | {
            part: round(seconds, 3) for part, seconds in sorted(means.items(), key=lambda item: -item[1])
        }
    return found


def write_study(folder: Path, cells: int) -> Path:
    """Cells that share nothing but row 0: each has a learning rate of its own."""
    from residency.testing.tiny_models import write_backbone, write_domain

    names = "ab"[:STAGES]
    base = {
        "name": "fixed",
        "model": {
            "backbone": {
                "class_path": "residency.backbones.CausalLM",
                "init_args": {"path": str(write_backbone(folder / "model"))},
            },
            "adapter": {
                "class_path": "residency.adapters.Peft",
                "init_args": {
                    "config": {"class_path": "peft.LoraConfig", "init_args": {"r": 4, "target_modules": "all-linear"}}
                },
            },
            "objective": {"class_path": "residency.objectives.SFT"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {
            "domains": {name: _nll_only(write_domain(folder / "data", name)) for name in names},
            "batch_size": 4,
        },
        "trainer": {"max_steps": 1, "accelerator": "cpu"},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base, sort_keys=False), encoding="utf-8")
    axis = {f"lr{k}": {"model.optimizer.init_args.lr": round(1e-3 * (1 + k), 6)} for k in range(cells)}
    study = {"name": "fixed", "base": "base.yaml", "axes": {"lr": axis}, "seeds": [0], "orders": "given"}
    path = folder / "study.yaml"
    path.write_text(yaml.safe_dump(study, sort_keys=False), encoding="utf-8")
    return path


def _nll_only(domain: dict[str, Any]) -> dict[str, Any]:
    return {**domain, "init_args": {**domain["init_args"], "scorers": ["nll"]}}


def spent(tree: Path, words: Sequence[object]) -> float:
    """Processor time of a command and of all processes that it starts."""
    environment = {**os.environ, "PYTHONPATH": str(tree / "src"), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "residency", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
        )
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def sweeps(tree: Path, study: Path, folder: Path, tasks: int) -> Seconds:
    """One plan, one sweep and one repetition of it by a tree's code."""
    options = ["--study_dir", folder, "--workers", 1, "--threads", 1]
    plan = spent(tree, ["sweep", study, *options, "--dry-run"])
    sweep = spent(tree, ["sweep", study, *options])
    again = spent(tree, ["sweep", study, *options])
    return {"plan": plan, "sweep": sweep, "per task": (sweep - plan) / tasks, "again": again}


def main() -> None:
    """Read the arguments, measure, print."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--cells", type=int, default=100)
    reader.add_argument("--against", type=Path, help="working tree of another commit")
    reader.add_argument("--rounds", type=int, default=1)
    reader.add_argument("--parts", action="store_true", help="only the parts of a task, without whole sweeps")
    reader.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    given = reader.parse_args()
    if given.serve:
        sys.exit(serve(given.serve))
    os.environ["WANDB_MODE"] = "disabled"
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        study = write_study(folder, given.cells)
        tasks = given.cells * (STAGES + 1) + 1
        trees = {"here": REPOSITORY} | ({"against": given.against.resolve()} if given.against else {})
        rounds: dict[str, list[Seconds]] = {name: [] for name in trees}
        for turn in range(0 if given.parts else given.rounds):
            for name, tree in list(trees.items())[:: 1 if turn % 2 else -1]:
                rounds[name].append(sweeps(tree, study, folder / f"{name}-{turn}", tasks))
        medians = {
            name: {part: round(statistics.median(line[part] for line in lines), 3) for part in lines[0]}
            for name, lines in rounds.items()
            if lines
        }
        result: dict[str, Any] = {"cells": given.cells, "tasks": tasks, "processor seconds": medians}
        if len(medians) == 2:
            ratio = medians["here"]["per task"] / medians["against"]["per task"]
            result["per task, here over against"] = round(ratio, 3)
        print(json.dumps(result | {"parts": by_part(study, folder)}, indent=2))


if __name__ == "__main__":
    main()

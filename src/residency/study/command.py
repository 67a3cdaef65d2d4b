"""`residency sweep`: plan, run what is missing, compare."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from residency.errors import EXIT_DONE, EXIT_SIGNAL, EXIT_SOME_FAILED, EXIT_USER, UserError
from residency.record import RunFolder
from residency.signals import Stopped
from residency.storage import write_json
from residency.study.plan import Cell, Study, load_study, plan_cells

__all__ = ["sweep", "sweep_command"]


def sweep_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency sweep`.
    """
    parser = argparse.ArgumentParser(
        prog="residency sweep",
        description="Run every combination of a study's axes, one after another, then compare them. Cells that are "
        "complete are not run again; a stopped study goes on with the same command.",
    )
    parser.add_argument("study", type=Path, help="study file, for example configs/studies/quickstart.yaml")
    parser.add_argument("--study_dir", type=Path, help="folder of the study; default studies/<name>")
    parser.add_argument("--dry-run", action="store_true", help="only check everything and list the cells")
    options = parser.parse_args(words)
    return sweep(options.study, study_dir=options.study_dir, dry_run=options.dry_run)


def sweep(path: Path, *, study_dir: Path | None = None, dry_run: bool = False, console: Console | None = None) -> int:
    """Run a study.

    Args:
        path: Study file.
        study_dir: Its folder; studies/<name> by default.
        dry_run: Stop after the plan.
        console: Where to print.

    Returns:
        Exit code.

    Raises:
        UserError: The study, a preset or a resolved cell is wrong; nothing has run then.
    """
    console = console or Console()
    study = load_study(path)
    folder = study_dir or Path("studies") / study.name
    cells = plan_cells(study, path)
    done = {cell.id: RunFolder(folder / "cells" / cell.id).results() for cell in cells}
    missing = [cell for cell in cells if done[cell.id] is None]
    console.print(
        f"[bold]{escape(study.name)}[/bold]: {len(cells)} cells, {len(missing)} to run, "
        f"{len(cells) - len(missing)} complete in {escape(str(folder))}"
    )
    for cell in cells:
        console.print(f"  {escape(cell.id)}  {'complete' if done[cell.id] else 'to run'}")
    _prepare(study, path, folder, cells)
    if dry_run:
        return EXIT_DONE
    failed = {cell.id: code for cell in missing if (code := _run(cell, folder))}
    records = [RunFolder(folder / "cells" / cell.id).results() or _failed(cell, failed) for cell in cells]
    _compare(study, folder, records, console)
    if failed:
        console.print(f"{len(failed)} of {len(cells)} cells failed: {escape(', '.join(failed))}")
        return EXIT_USER if len(failed) == len(cells) and {*failed.values()} == {EXIT_USER} else EXIT_SOME_FAILED
    return EXIT_DONE


def _prepare(study: Study, path: Path, folder: Path, cells: Sequence[Cell]) -> None:
    """Resolve the config of every cell, before the first one runs; compare those that have one."""
    from residency.cli import parse

    for cell in cells:
        run = RunFolder(folder / "cells" / cell.id)
        config = parse(["fit", "--config", str(path.parent / study.base), *cell.words]).resolved
        run.keep_config(config)
    plan = {"study": asdict(study), "cells": [{"id": c.id, "axes": dict(c.axes), "seed": c.seed} for c in cells]}
    write_json(folder / "plan.json", plan)


def _run(cell: Cell, folder: Path) -> int:
    """One cell in a process of its own: nothing is left over from the one before."""
    run = folder / "cells" / cell.id
    words = ["fit", "--config", str(run / "config.yaml"), "--run_dir", str(run), "--store", str(folder / "store")]
    child = subprocess.Popen([sys.executable, "-m", "residency", *words], env={**os.environ, "WANDB_RUN_GROUP": ""})
    try:
        code = child.wait()
    except BaseException:
        # Ctrl-C reaches the child by itself; SIGTERM does not.
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code == EXIT_SIGNAL:
        raise Stopped(f"{cell.id} was stopped")
    return code


def _failed(cell: Cell, failed: Mapping[str, int]) -> dict[str, Any]:
    status = f"failed (exit code {failed[cell.id]})" if cell.id in failed else "missing"
    return {"cell": cell.id, "status": status, "axes": dict(cell.axes), "seed": cell.seed, "scores": {}, "summary": {}}


def _compare(study: Study, folder: Path, records: Sequence[Mapping[str, Any]], console: Console) -> None:
    from residency.report.heatmap import comparison, save
    from residency.report.tables import comparison_table, score_table, verdict

    finished = [record for record in records if record["status"] == "done"]
    for record in finished:
        console.print(score_table(record, study.scorer))
    if not finished:
        return
    baseline = study.baseline or next(iter(next(iter(study.axes.values()), {"none": {}})))
    console.print(comparison_table(records, study.scorer, baseline=baseline))
    console.print(verdict(records, study.scorer, baseline=baseline))
    for picture in save(comparison(finished, study.scorer), folder / "report" / study.scorer):
        console.print(f"  heat maps: {escape(str(picture))}")
    console.print(f"  records: {escape(str(folder / 'cells'))}/<cell>/results.json")


def _check_study_dir(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file", why="a study needs a folder", fix="choose another --study_dir")

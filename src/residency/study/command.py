"""`residency sweep`: plan, run what is missing, compare."""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from residency.errors import EXIT_DONE, EXIT_SIGNAL, EXIT_SOME_FAILED, EXIT_USER, UserError
from residency.record import RunFolder
from residency.signals import Stopped
from residency.storage import replace_file, write_json
from residency.study.cells import Cell, plan_cells
from residency.study.plan import Study, load_study

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
    cells = plan_cells(study)
    runs = {cell.id: RunFolder(folder / "cells" / cell.id) for cell in cells}
    missing = [cell for cell in cells if runs[cell.id].results() is None]
    console.print(
        f"[bold]{escape(study.name)}[/bold]: {len(cells)} cells, {len(missing)} to run, "
        f"{len(cells) - len(missing)} complete in {escape(str(folder))}"
    )
    for cell in cells:
        console.print(f"  {escape(cell.id)}  {'to run' if cell in missing else 'complete'}")
    configs = _resolve(study, cells, missing)
    if dry_run:
        return EXIT_DONE
    for cell in cells:
        runs[cell.id].keep_config(configs[cell.id])
    _keep_study(study, folder, cells)
    failed = {cell.id: code for cell in missing if (code := _run(cell, runs[cell.id], folder / "store"))}
    records = [runs[cell.id].results() or _failed(cell, failed[cell.id]) for cell in cells]
    _compare(study, folder, records, console)
    if failed:
        console.print(f"{len(failed)} of {len(cells)} cells failed: {escape(', '.join(failed))}")
        return EXIT_USER if len(failed) == len(cells) and {*failed.values()} == {EXIT_USER} else EXIT_SOME_FAILED
    return EXIT_DONE


def _resolve(study: Study, cells: Sequence[Cell], missing: Sequence[Cell]) -> dict[str, dict[str, Any]]:
    """The full config of every cell, before the first one runs; data are read where a cell will need them."""
    from residency.cli import parse
    from residency.stream import check_stream

    configs, read = {}, set()
    for cell in cells:
        try:
            cli = parse(["fit", *cell.words])
            configs[cell.id] = cli.resolved
            data = json.dumps(cli.resolved["data"], sort_keys=True)
            if cell in missing and data not in read:
                read.add(data)
                check_stream(cli.datamodule)
                _check_scorer(study, {s for domain in cli.datamodule.columns.values() for s in domain.scorers})
        except UserError as error:
            raise UserError(f"cell {cell.id}: {error.got}", why=error.why, fix=error.fix) from error
    return configs


def _check_scorer(study: Study, known: set[str]) -> None:
    if study.scorer not in known:
        raise UserError(
            f"scorer of the study is {study.scorer}",
            why=f"the domains are scored by {', '.join(sorted(known))}",
            fix="compare by one of these, or add the scorer to a domain's scorers",
        )


def _keep_study(study: Study, folder: Path, cells: Sequence[Cell]) -> None:
    text = yaml.safe_dump(asdict(study), sort_keys=False, allow_unicode=True)
    replace_file(folder / "study.yaml", lambda temporary: _write(temporary, text))
    plan = [{"id": cell.id, "axes": dict(cell.axes), "seed": cell.seed} for cell in cells]
    write_json(folder / "plan.json", {"study": asdict(study), "count": len(plan), "cells": plan})


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _run(cell: Cell, run: RunFolder, store: Path) -> int:
    """One cell in a process of its own: nothing is left over from the one before."""
    words = ["fit", "--config", str(run.path / "config.yaml"), "--run_dir", str(run.path), "--store", str(store)]
    if (yaml.safe_load((run.path / "config.yaml").read_text(encoding="utf-8")).get("wandb") or {}).get("group") is None:
        # Seeds of one combination belong together on W&B.
        words += ["--wandb.group", cell.id.removesuffix(f"-s{cell.seed}")]
    child = subprocess.Popen([sys.executable, "-m", "residency", *words])
    try:
        code = child.wait()
    except BaseException:
        # Ctrl-C reaches the child by itself; SIGTERM does not.
        child.send_signal(signal.SIGTERM)
        child.wait()
        raise
    if code == EXIT_SIGNAL:
        raise Stopped(f"a signal to cell {cell.id}")
    return code


def _failed(cell: Cell, code: int) -> dict[str, Any]:
    status = f"failed (exit code {code})"
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

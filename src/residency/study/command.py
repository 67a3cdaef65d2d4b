"""`residency sweep`: plan, make what is missing, compare."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from residency.errors import EXIT_DONE, EXIT_SOME_FAILED, EXIT_USER, UserError
from residency.study.plan import Study, load_study

if TYPE_CHECKING:
    from residency.study.estimate import Estimate
    from residency.study.events import StudyGrid, Watcher
    from residency.study.executors.base import Executor
    from residency.study.prepare import Prepared
    from residency.study.schedule import Failure

__all__ = ["sweep", "sweep_command"]


def sweep_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency sweep`.
    """
    parser = argparse.ArgumentParser(
        prog="residency sweep",
        description="Run every combination of a study's axes, then compare them. Stages that cells have in common are "
        "trained once; what is in the store is not trained again; a stopped study goes on with the same command.",
    )
    parser.add_argument("study", type=Path, help="study file, for example configs/studies/quickstart.yaml")
    parser.add_argument("--study_dir", type=Path, help="folder of the study; default studies/<name>")
    parser.add_argument("--store", type=Path, help="folder of the stages; studies may share it; default STUDY/store")
    parser.add_argument("--dry-run", action="store_true", help="only check everything and show the plan")
    parser.add_argument("--workers", type=int, help="stages at once; default one per GPU, or one per core")
    parser.add_argument("--threads", type=int, help="threads of each; default the cores shared out")
    options = parser.parse_args(words)
    for name in ("workers", "threads"):
        given = getattr(options, name)
        if given is not None and given < 1:
            raise UserError(
                f"--{name}={given}",
                why="at least one is needed to run anything",
                fix=f"give a positive number, or leave --{name} out",
            )
    return sweep(
        options.study,
        study_dir=options.study_dir,
        store=options.store,
        dry_run=options.dry_run,
        workers=options.workers,
        threads=options.threads,
    )


def sweep(
    path: Path,
    *,
    study_dir: Path | None = None,
    store: Path | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    threads: int | None = None,
    console: Console | None = None,
    executor: Callable[[Path], Executor] | None = None,
    watchers: Sequence[Watcher] | None = None,
) -> int:
    """Run a study.

    Args:
        path: Study file.
        study_dir: Its folder; studies/<name> by default.
        store: Folder of the stages; what the study says, or `store` in its folder, by default.
        dry_run: Stop after the plan.
        workers: Stages at once; by default one per GPU, or one per core.
        threads: Threads of each; by default the cores shared out. Another number may change the last bits of a result.
        console: Where to print.
        executor: Makes the executor, given a folder for logs; this machine's by default.
        watchers: What shows the running study; plain lines by default.

    Returns:
        Exit code.

    Raises:
        UserError: The study, a preset or a resolved cell is wrong; nothing has run then.
    """
    console = console or Console()
    study = load_study(path)
    folder = (study_dir or Path("studies") / study.name).resolve()
    place = (store or (Path(study.store) if study.store else folder / "store")).resolve()
    if dry_run:
        _show(_prepared(study, folder, place, threads, workers), console, workers=_workers(workers, threads)[0])
        return EXIT_DONE
    with _only_sweep(folder):
        return _sweep(study, folder, place, console, (workers, threads), executor, watchers)


def _sweep(
    study: Study,
    folder: Path,
    store: Path,
    console: Console,
    share: tuple[int | None, int | None],
    make: Callable[[Path], Executor] | None,
    watchers: Sequence[Watcher] | None,
) -> int:
    from residency.study.lines import PlainLines
    from residency.study.schedule import run_tree

    workers, threads = _workers(*share)
    prepared = _prepared(study, folder, store, threads, workers)
    found = _show(prepared, console, workers=workers)
    prepared.keep()
    failures: dict[str, Failure] = {}
    if prepared.missing:
        running = make(folder / "logs") if make else _local(folder / "logs", workers, threads, prepared)
        shown = [PlainLines(console)] if watchers is None else list(watchers)
        try:
            grid = _grid(prepared, found, running.slots)
            for watcher in shown:
                watcher.start(grid)
            failures = run_tree(
                prepared.tree, executor=running, store=prepared.store, watchers=shown, seconds=found.tasks
            )
        finally:
            for watcher in shown:
                watcher.finish()
            running.close()
    return _report(prepared, failures, console)


def _prepared(study: Study, folder: Path, store: Path, threads: int | None, workers: int | None) -> Prepared:
    import torch

    from residency.study.prepare import prepare

    # Keys hold the number of threads with which the workers compute, not that of this process.
    torch.set_num_threads(_workers(workers, threads)[1])
    return prepare(study, folder=folder, store=store)


@contextmanager
def _only_sweep(folder: Path) -> Iterator[None]:
    """One sweep per study; any number of them per store."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = not any(folder.iterdir())
        with FileLock(folder / ".lock", timeout=0):
            try:
                yield
            except UserError:
                # A mistake that is found before anything runs leaves nothing behind.
                if fresh and not (folder / "plan.json").exists():
                    with suppress(OSError):
                        (folder / ".lock").unlink(missing_ok=True)
                        folder.rmdir()
                raise
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another sweep",
            why="two sweeps would put the same cells together",
            fix="wait for it, stop it, or choose another --study_dir (with the same --store nothing is trained twice)",
        ) from error


def _workers(workers: int | None, threads: int | None) -> tuple[int, int]:
    """(tasks at once, threads of each)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is None:
        workers = _gpus() or max(1, cores // (threads or 1))
    return workers, threads or max(1, cores // workers)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _local(logs: Path, workers: int, threads: int, prepared: Prepared) -> Executor:
    from residency.study.executors.local import LocalExecutor

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(n) for n in range(_gpus())]
    return LocalExecutor(workers=workers, threads=threads, logs=logs, devices=devices)


def _show(prepared: Prepared, console: Console, *, workers: int) -> Estimate:
    from residency.study.estimate import describe, estimate

    cells, missing = prepared.cells, {resolved.cell.id for resolved in prepared.missing}
    console.print(
        f"[bold]{escape(prepared.study.name)}[/bold]: {len(cells)} cells, {len(missing)} to run, "
        f"{len(cells) - len(missing)} complete in {escape(str(prepared.folder))}"
    )
    for cell in cells:
        console.print(f"  {escape(cell.id)}  {'to run' if cell.id in missing else 'complete'}", highlight=False)
    found = estimate(prepared.tree, prepared.missing, prepared.store, slots=workers)
    for line in describe(prepared.counts, found):
        console.print(f"  {escape(line)}", highlight=False)
    return found


def _grid(prepared: Prepared, found: Estimate, slots: int) -> StudyGrid:
    from residency.study.events import GridCell, StudyGrid

    known = {row.id: row for row in prepared.tree.grid}
    rows = []
    for entry in prepared.entries:
        names = tuple(entry["domains"])
        nothing = (None,) * (len(names) + 2)
        complete = GridCell(id=entry["id"], domains=names, tasks=nothing, shared=(False,) * len(nothing))
        rows.append(known.get(entry["id"], complete))
    return StudyGrid(
        name=prepared.study.name,
        folder=str(prepared.folder),
        scorer=prepared.study.scorer,
        cells=tuple(rows),
        titles={task: node.title for task, node in prepared.tree.nodes.items()},
        seconds=found.tasks,
        slots=slots,
    )


def _report(prepared: Prepared, failures: Mapping[str, Failure], console: Console) -> int:
    from residency.study.compare import compare, failed_record

    records: list[dict[str, Any]] = [
        prepared.run(cell).results() or failed_record(cell, failures[cell.id])
        for cell in prepared.cells
        if cell.reference is None
    ]
    compare(prepared.study, prepared.folder, records, console)
    if not failures:
        return EXIT_DONE
    console.print(f"{len(failures)} of {len(prepared.cells)} cells failed: {escape(', '.join(failures))}")
    told = dict.fromkeys(f"{failure.title}: {failure.message}" for failure in failures.values())
    for message in told:
        console.print(f"  {escape(message)}", highlight=False)
    mendable = {failure.code for failure in failures.values()} == {EXIT_USER}
    return EXIT_USER if len(failures) == len(prepared.cells) and mendable else EXIT_SOME_FAILED

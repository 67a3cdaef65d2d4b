"""A study, carried out: plan, make what is missing, compare."""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from filelock import FileLock, Timeout
from rich.console import Console
from rich.markup import escape

from residency.core.errors import EXIT_DONE, UserError
from residency.core.markers import FolderKind, check_place, claim
from residency.core.presets import named_file
from residency.core.tensor_files import read_json
from residency.core.text import for_terminal
from residency.core.yaml_files import read_yaml
from residency.runs.estimate_words import Asked
from residency.runs.store.store import STORE
from residency.study.planning.cpu_sharing import (
    Cores,
    at_once,
    forget_cores,
    keep_cores,
    kept_threads,
    share_cores,
    usable_cores,
)
from residency.study.planning.study_file import Study, load_study
from residency.study.repeat import keep_finished, show_again

if TYPE_CHECKING:
    from residency.study.executors.base import Executor
    from residency.study.runner import StudyRunner
    from residency.study.views.events import Watcher

__all__ = ["STUDY", "sweep"]


def _made_before_markers(path: Path) -> bool:
    """Whether a folder holds a plan of `residency sweep`."""
    try:
        plan = read_json(path / "plan.json")
    except UserError:
        return False
    return isinstance(plan, dict) and {"study", "cells", "counts"} <= plan.keys()


STUDY = FolderKind(name="study", option="--study_dir", proof=_made_before_markers)


def sweep(
    path: Path,
    *,
    study_dir: Path | None = None,
    store: Path | None = None,
    dry_run: bool = False,
    question: Asked | None = None,
    workers: int | None = None,
    threads: int | None = None,
    where: Literal["local", "ray"] | None = None,
    emit_wandb: Path | None = None,
    console: Console | None = None,
    executor: Callable[[Path], Executor] | None = None,
    watchers: Sequence[Watcher] | None = None,
    overwrite: bool = False,
) -> int:
    """Run a study.

    Args:
        path: Study file, or the name of a preset.
        study_dir: Its folder; studies/<name> by default.
        store: Folder of the stages; what the study says, or `store` in its folder, by default.
        dry_run: Stop after the plan.
        question: With `dry_run`: what is asked besides memory; `measure` tries a few steps of every kind of model.
        workers: Stages at once; by default one per GPU, or one per core where there are as many runs.
        threads: Threads of each; by default what the study began with, else one where there are as many runs as cores,
            else what is measured to be best. Another number may change the last bits of a result.
        where: `local` or `ray`; by default what the study says.
        emit_wandb: Only write a W&B sweep file there.
        console: Where to print.
        executor: Makes the executor, given a folder for logs, instead of `where`.
        watchers: What shows the running study; a live screen, or plain lines where there is no terminal, by default.
        overwrite: Use a folder of the study, or a sweep file, in whose place something else lies.

    Returns:
        Exit code.

    Raises:
        UserError: The study, a preset or a resolved cell is wrong; nothing has run then.
    """
    console = console or Console()
    source = named_file(str(path), kinds=("study",), what="the study")
    if executor is None and not (dry_run or emit_wandb) and _show_again(source, study_dir, store, threads, console):
        return EXIT_DONE
    study = load_study(source)
    folder = (study_dir or Path("studies") / study.name).resolve()
    place = (store or (Path(study.store) if study.store else folder / "store")).resolve()
    kind = where or study.executor
    if emit_wandb is not None:
        return _emit(study, source, emit_wandb, place, console, overwrite=overwrite)
    check_place(place, STORE)
    cores = _cores(study, folder, kind, workers, threads)
    console.print(f"stages at once: {cores.workers}, threads of each: {cores.threads} ({cores.why})", highlight=False)
    with _threads(cores.threads):

        def runner() -> StudyRunner:
            # Imported late: `--emit-wandb` and mistakes in the study cost no import of torch.
            from residency.study.runner import StudyRunner

            return StudyRunner(study, folder=folder, store=place, console=console, workers=cores.workers)

        if dry_run:
            runner().check(question or Asked())
            return EXIT_DONE
        make = executor or (lambda logs: (_ray if kind == "ray" else _local)(logs, cores.workers, cores.threads))
        # A new study has something to run: its workers import what they need while this process does.
        early = executor is None and kind == "local" and not (folder / "plan.json").exists()
        with _only_sweep(folder, overwrite=overwrite), _started(make, folder / "logs", early=early) as start:
            keep_cores(folder, cores)
            made = runner()
            code = made.sweep(start, watchers if watchers is not None else [_view(path, study_dir, console)])
            if made.finished is not None:
                keep_finished(source, folder, **made.finished, store=str(place), threads=cores.threads)
            return code


def _show_again(path: Path, study_dir: Path | None, store: Path | None, threads: int | None, console: Console) -> bool:
    """Show a study that is finished and unchanged, before anything large is imported."""
    content = read_yaml(path, what="the study")
    name = content.get("name") if isinstance(content, dict) else None
    if study_dir is None and not isinstance(name, str):
        return False
    folder = (study_dir or Path("studies") / str(name)).resolve()
    options = {"store": None if store is None else str(store.resolve()), "threads": threads}
    return show_again(path, folder, options, console)


@contextmanager
def _started(make: Callable[[Path], Executor], logs: Path, *, early: bool) -> Iterator[Callable[[], Executor]]:
    """What gives the executor: one that has been started already, or one that starts when it is asked for."""
    if not early:
        yield lambda: make(logs)
        return
    executor = make(logs)
    try:
        yield lambda: executor
    finally:
        executor.close()


def _emit(study: Study, source: Path, path: Path, store: Path, console: Console, *, overwrite: bool) -> int:
    from residency.study.planning.prepare import cells_of
    from residency.study.planning.resolve import Resolver
    from residency.study.wandb_sweep import write_wandb_sweep

    write_wandb_sweep(study, cells_of(study, Resolver(study, store)), source=source, path=path, overwrite=overwrite)
    written = escape(for_terminal(path))
    console.print(f"W&B sweep: {written}; start it with `wandb sweep {written}`", highlight=False)
    return EXIT_DONE


def _view(path: Path, study_dir: Path | None, console: Console) -> Watcher:
    from residency.study.views.live import StudyView

    words = ["residency", "sweep", str(path), *([] if study_dir is None else ["--study_dir", str(study_dir)])]
    return StudyView(command=shlex.join(words), console=console)


@contextmanager
def _threads(threads: int) -> Iterator[None]:
    """Keys hold the number of threads with which the workers compute; this process keeps its own."""
    import torch

    usual = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(usual)


@contextmanager
def _only_sweep(folder: Path, *, overwrite: bool) -> Iterator[None]:
    """One sweep per study; any number of them per store."""
    try:
        fresh = claim(folder, STUDY, overwrite=overwrite)
        with FileLock(folder / ".lock", timeout=0):
            try:
                yield
            except UserError:
                # A mistake that is found before anything runs leaves nothing behind.
                if fresh and not (folder / "plan.json").exists():
                    with suppress(OSError):
                        for name in (".lock", STUDY.marker):
                            (folder / name).unlink(missing_ok=True)
                        forget_cores(folder)
                        shutil.rmtree(folder / "logs", ignore_errors=True)
                        folder.rmdir()
                raise
    except Timeout as error:
        raise UserError(
            f"{folder} is in use by another sweep",
            why="two sweeps would put the same cells together",
            fix="wait for it, stop it, or choose another --study_dir (with the same --store nothing is trained twice)",
        ) from error


def _cores(study: Study, folder: Path, kind: str, workers: int | None, threads: int | None) -> Cores:
    threads = threads or kept_threads(folder)
    cores, runs = usable_cores(), at_once(study)
    if kind == "ray" and threads is None and workers is None:
        # The nodes of a cluster are not this machine.
        return Cores(workers=cores, threads=1, why="a core for each")
    return share_cores(cores=cores, runs=runs, gpus=_gpus(), workers=workers, threads=threads)


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _local(logs: Path, workers: int, threads: int) -> Executor:
    from residency.study.executors.local import LocalExecutor

    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(n) for n in range(_gpus())]
    return LocalExecutor(workers=workers, threads=threads, logs=logs, devices=devices)


def _ray(logs: Path, workers: int, threads: int) -> Executor:
    from residency.study.executors.ray import RayExecutor

    # Of a private instance; the nodes of a cluster have told what they have.
    return RayExecutor(threads=threads, logs=logs, cpus=workers * threads)

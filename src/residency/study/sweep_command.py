"""`residency sweep`: its options; imports no torch before it knows them."""

from __future__ import annotations

import argparse
from pathlib import Path

from residency.core.errors import UserError
from residency.runs.estimate_words import add_price_options, asked

__all__ = ["sweep_command"]


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
    parser.add_argument("study", type=Path, help="study file, or the name of a preset: quickstart")
    parser.add_argument("--study_dir", type=Path, help="folder of the study; default studies/<name>")
    parser.add_argument("--store", type=Path, help="folder of the stages; studies may share it; default STUDY/store")
    parser.add_argument("--dry-run", action="store_true", help="only check everything and show the plan")
    add_price_options(parser)
    parser.add_argument("--workers", type=int, help="stages at once; default one per GPU, or per core, or per run")
    parser.add_argument("--threads", type=int, help="threads of each; default what a short measurement finds best")
    parser.add_argument(
        "--executor", choices=("local", "ray"), help="where stages run; default what the study says, else this machine"
    )
    parser.add_argument("--emit-wandb", type=Path, metavar="FILE", help="only write a W&B sweep file of the study")
    parser.add_argument("--overwrite", action="store_true", help="use a folder, or a FILE, that holds something else")
    options = parser.parse_args(words)
    for name in ("workers", "threads"):
        if (given := getattr(options, name)) is not None and given < 1:
            raise UserError(
                f"--{name}={given}",
                why="at least one is needed to run anything",
                fix=f"give a positive number, or leave --{name} out",
            )
    from residency.study.command import sweep

    return sweep(
        options.study,
        study_dir=options.study_dir,
        store=options.store,
        dry_run=options.dry_run or options.measure,
        question=asked(options),
        workers=options.workers,
        threads=options.threads,
        where=options.executor,
        emit_wandb=options.emit_wandb,
        overwrite=options.overwrite,
    )

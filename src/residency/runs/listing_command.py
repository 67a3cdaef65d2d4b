"""`residency ls | show | compare | rm`: runs on the terminal, without torch."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from residency.core.errors import EXIT_DONE
from residency.core.text import for_terminal, printable
from residency.runs.listing import RunSummary, find_runs, read_run, remove_run

__all__ = ["compare_command", "comparison", "describe", "ls_command", "rm_command", "show_command"]

_METRICS = ("average", "learning", "bwt", "forgetting")


def ls_command(words: list[str]) -> int:
    """List the runs below folders.

    Args:
        words: What follows `residency ls`.
    """
    parser = argparse.ArgumentParser(prog="residency ls", description="List runs, also unfinished ones, newest last.")
    parser.add_argument("folders", nargs="*", type=Path, help="where to look; default runs and studies")
    options = parser.parse_args(words)
    folders = options.folders or [Path("runs"), Path("studies")]
    runs = find_runs(folders)
    for run in runs:
        stages = f"{run.stages}/{len(run.domains)}"
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(run.modified))
        what = "+".join([run.adapter, *run.mitigations])
        size = f"{run.size / 2**20:>8.1f} MiB"
        print(f"{stages:>5} {run.status:<10} {when}  {size}  {printable(what)[:30]:<30} {for_terminal(run.path)}")
    print(for_terminal(f"{len(runs)} runs in {', '.join(map(str, folders))}"))
    return EXIT_DONE


def show_command(words: list[str]) -> int:
    """Show one run as far as it is.

    Args:
        words: What follows `residency show`.
    """
    parser = argparse.ArgumentParser(prog="residency show", description="Show a run as far as it is.")
    parser.add_argument("run", type=Path, help="its folder, for example runs/quickstart")
    print(for_terminal(describe(read_run(parser.parse_args(words).run))))
    return EXIT_DONE


def compare_command(words: list[str]) -> int:
    """Put runs beside each other.

    Args:
        words: What follows `residency compare`.
    """
    parser = argparse.ArgumentParser(prog="residency compare", description="Put the summaries of runs side by side.")
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs, or folders above them")
    parser.add_argument("--scorer", default="nll", help="which score; default nll")
    options = parser.parse_args(words)
    print(for_terminal(comparison(find_runs(options.runs), options.scorer)))
    return EXIT_DONE


def rm_command(words: list[str]) -> int:
    """Delete runs.

    Args:
        words: What follows `residency rm`.
    """
    parser = argparse.ArgumentParser(
        prog="residency rm", description="Delete the folders of runs. A folder that is no run, or in use, is refused."
    )
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--dry-run", action="store_true", help="only say what would go")
    options = parser.parse_args(words)
    runs = [read_run(path) for path in options.runs]  # all are runs, or none is deleted
    for run in runs:
        freed = run.size if options.dry_run else remove_run(run.path)
        print(f"{freed / 2**20:>8.1f} MiB {'would be ' if options.dry_run else ''}freed: {for_terminal(run.path)}")
    return EXIT_DONE


def describe(run: RunSummary) -> str:
    """A run on one screen: what it is, and the matrix of its first scorer as far as it is."""
    lines = [
        f"{run.path}: {run.status}, {run.stages} of {len(run.domains)} stages, seed {run.seed}",
        f"adapter {run.adapter}; mitigations {', '.join(run.mitigations) or 'none'}; {run.size / 2**20:.1f} MiB",
    ]
    scorer = next(iter(run.scores), None)
    if scorer is not None:
        names = [printable(name)[:12] for name in run.domains]
        lines += [f"{printable(scorer)}: rows = after which stage, columns = scored on which domain"]
        lines += [f"{'':<14}" + "".join(f"{name:>13}" for name in names)]
        for after, row in zip(["base", *names], run.scores[scorer]["R"], strict=False):
            shown = row[: len(names)]
            lines += [f"{after:<14}" + "".join(f"{'-' if value is None else f'{value:.4f}':>13}" for value in shown)]
    figures = [
        f"{metric} {value:.4f}" for metric in _METRICS if (value := run.figure(scorer or "", metric)) is not None
    ]
    return "\n".join([*lines, *([", ".join(figures)] if figures else [])])


def comparison(runs: Sequence[RunSummary], scorer: str) -> str:
    """One line per run, at most 80 columns: what it is and its summary; `-` where it is not finished."""
    lines = [f"{'run':<32}" + "".join(f"{metric:>12}" for metric in _METRICS)]
    for run in runs:
        figures = [run.figure(scorer, metric) for metric in _METRICS]
        shown = "".join(f"{'-' if value is None else f'{value:.4f}':>12}" for value in figures)
        lines.append(f"{printable(run.path.name)[:31]:<32}{shown}")
    return "\n".join([*lines, f"{printable(scorer)}; forgetting > 0 and bwt < 0 is bad; - = not finished"])

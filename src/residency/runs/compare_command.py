"""`residency ab RUN [OTHER]`: two models on the same rows: paired test, flip rates, rows that regressed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from residency.core.errors import EXIT_DONE, UserError
from residency.core.text import printable
from residency.metrics.flips import PairedChange, paired_change
from residency.runs.folder import RunFolder
from residency.runs.score_files import read_scores

__all__ = ["ab_command", "compare_stages"]

Rows = Mapping[tuple[str, str], Mapping[str, tuple[float, int]]]


def ab_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency ab`.
    """
    parser = argparse.ArgumentParser(prog="residency ab", description=__doc__)
    flag = parser.add_argument
    flag("run", type=Path, help="folder of a finished run")
    flag("other", type=Path, nargs="?", help="another one, on the same rows; default the same run")
    flag(
        "--before", type=int, default=None, metavar="K", help="stage of RUN; default 0, the base (with OTHER: the last)"
    )
    flag("--after", type=int, default=None, metavar="K", help="stage of OTHER or RUN; default the last")
    flag("--scorer", help="only this one")
    flag("--rows", type=int, default=5, metavar="N", help="name N regressed rows per column")
    flag("--json", metavar="FILE", help="write everything as JSON; - for the standard output")
    options = parser.parse_args(words)
    found = compare_stages(
        options.run, options.other, before=options.before, after=options.after, scorer=options.scorer
    )
    _print(Console(stderr=options.json == "-"), found, rows=options.rows)
    text = json.dumps(found, ensure_ascii=False, indent=1)
    if options.json == "-":
        print(text)
    elif options.json:
        Path(options.json).write_text(text + "\n", encoding="utf-8")
    return EXIT_DONE


def compare_stages(
    run: Path,
    other: Path | None = None,
    *,
    before: int | None = None,
    after: int | None = None,
    scorer: str | None = None,
) -> list[dict[str, Any]]:
    """[{column, scorer, n, before, after, change, low, high, p, test, worse, better, regressed (ids)}].

    Args:
        run: Folder of a finished run.
        other: Folder of another one on the same rows; `None` = the same.
        before: Stage of `run`; by default 0, or the last where there is another run.
        after: Stage of the other; by default the last.
        scorer: Only this score.

    Raises:
        UserError: No finished run, no such stage, or no row in common.
    """
    first, second = _record(run), _record(other or run)
    start = (len(first["domains"]) if other else 0) if before is None else before
    end = len(second["domains"]) if after is None else after
    old, new = _scores(run, first, start), _scores(other or run, second, end)
    found = []
    for key in [k for k in new if k in old]:
        column, name = key
        shared = [row for row in old[key] if row in new[key]]
        if not shared or (scorer is not None and name != scorer) or name not in second["scores"]:
            continue
        pairs = [(old[key][row], new[key][row]) for row in shared]
        change = paired_change(
            [a[0] for a, _ in pairs],
            [b[0] for _, b in pairs],
            weights=[a[1] for a, _ in pairs],
            higher_is_better=second["scores"][name]["higher_is_better"],
        )
        found.append({"column": column, "scorer": name, **_plain(change, shared)})
    if not found:
        raise UserError(
            f"{run} and {other or run} have no {scorer or 'score'} of the same rows",
            why="a paired comparison needs the same rows under both models",
            fix="compare runs on the same data, or leave --scorer out",
        )
    return found


def _plain(change: PairedChange, rows: list[str]) -> dict[str, Any]:
    values = {name: getattr(change, name) for name in PairedChange.__slots__ if name != "regressed"}  # type: ignore[attr-defined]
    return {
        **{k: None if v != v else v for k, v in values.items()},
        "regressed": [rows[i] for i in change.regressed],
    }


def _record(run: Path) -> dict[str, Any]:
    record = RunFolder(run).results()
    if record is None:
        raise UserError(
            f"{run} has no results.json",
            why="only a finished run can be compared",
            fix="give the folder of a run; the same `residency fit` command finishes one that was stopped",
        )
    return record


def _scores(run: Path, record: Mapping[str, Any], stage: int) -> Rows:
    """{(column, scorer): {row: (value, weight)}} after a stage."""
    names = ["base", *record["domains"]]
    path = RunFolder(run).stage(stage, names[stage]) / "scores.parquet" if 0 <= stage < len(names) else None
    if path is None or not path.is_file():
        raise UserError(
            f"stage {stage} of {run}",
            why=f"there are scores of stages 0 to {len(names) - 1}",
            fix="give one of these to --before and --after",
        )
    found: dict[tuple[str, str], dict[str, tuple[float, int]]] = {}
    for score in read_scores(path):
        found.setdefault((score.column, score.scorer), {})[score.row] = (score.value, score.weight)
    return found


def _print(console: Console, found: list[dict[str, Any]], *, rows: int) -> None:
    table = Table(title="the same rows before and after", title_justify="left")
    for title in ("column", "score", "rows", "before", "after", "change (95 %)", "p", "worse", "better"):
        table.add_column(title, justify="left" if title in ("column", "score") else "right")
    for one in found:
        interval = "" if one["low"] is None else f" ({one['low']:+.3f} to {one['high']:+.3f})"
        table.add_row(
            printable(one["column"]),
            printable(one["scorer"]),
            str(one["n"]),
            f"{one['before']:.3f}",
            f"{one['after']:.3f}",
            f"{one['change']:+.3f}{interval}",
            f"{one['p']:.3g}",
            f"{one['worse']:.1%}",
            f"{one['better']:.1%}",
        )
    console.print(table)
    for one in found:
        if one["regressed"] and rows:
            names = ", ".join(printable(row) for row in one["regressed"][:rows])
            console.print(f"{printable(one['column'])} {printable(one['scorer'])}: worse are {names}", soft_wrap=True)

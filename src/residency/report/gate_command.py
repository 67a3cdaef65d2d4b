"""`residency gate`: limits in, an exit code out."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from residency.core.errors import EXIT_CROSSED, EXIT_DONE, UserError
from residency.core.text import for_terminal, printable

if TYPE_CHECKING:
    from residency.report.evidence.samples import RowScores
    from residency.report.gate import Judged
    from residency.report.records.records import Entry

__all__ = ["gate", "gate_command"]

_EPILOG = """\
examples:
  residency gate runs/candidate --max forgetting=0.1 --min json_valid=0.95
  residency gate runs/candidate --max forgetting=0.02 --against runs/released
  residency gate studies/nightly --max accuracy/forgetting=0.05 --against none --json gate.json

A limit is METRIC=NUMBER (of the study's scorer), SCORER=NUMBER (its average after the last stage) or
SCORER/METRIC=NUMBER, in the unit and direction that tables print: forgetting above 0 is bad, a loss is a loss. With
--against the limit is on the paired difference to the baseline, on the same test rows and seeds.

A limit is crossed when the value is beyond it by more than its 95 % interval. Exit code: 0 all limits hold, 4 one is
crossed or was not measured, 2 the command is wrong.
"""


def gate_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency gate`.

    Returns:
        Exit code.
    """
    options = _parser().parse_args(words)
    judged, rows = _judged(options.folder, options.max, options.min, options.scorer, options.against)
    for one in judged:
        print(one.line())
    if (damaged := rows.told()) is not None:
        print(f"mind     {for_terminal(damaged)}")
    content = _content(judged, rows)
    if options.json is not None:
        options.json.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return EXIT_DONE if content["passed"] else EXIT_CROSSED


def gate(
    folder: str | Path,
    *,
    max: Sequence[str] = (),
    min: Sequence[str] = (),
    scorer: str | None = None,
    against: str | None = None,
) -> dict[str, Any]:
    """Judge a run or a study by limits, as `residency gate FOLDER` does.

    Args:
        folder: Of a run or a study.
        max: Upper limits, such as `forgetting=0.1`.
        min: Lower limits, such as `accuracy=0.9`.
        scorer: What metrics without a scorer are about; the study's by default.
        against: Folder of a run, or name of a method: limits are on the paired difference to it.

    Returns:
        {"passed", "limits": [{"limit", "kind", "scorer", "metric", "bound", "method", "against", "value", "noise",
        "basis", "state"}], "damaged": {cell: [stage]} whose rows could not be read}, as `--json` writes it.

    Raises:
        UserError: A limit names nothing that was measured.
    """
    return _content(*_judged(Path(folder), max, min, scorer, against))


def _content(judged: Sequence[Judged], rows: RowScores) -> dict[str, Any]:
    bad = any(one.state in ("crossed", "not measured") for one in judged)
    return {"passed": not bad, "limits": [one.as_json() for one in judged], "damaged": rows.damaged}


def _judged(
    folder: Path, most: Sequence[str], least: Sequence[str], scorer: str | None, against: str | None
) -> tuple[list[Judged], RowScores]:
    # Behind the parser: the help answers at once.
    from residency.report.evidence.samples import RowScores
    from residency.report.gate import judge, parse_limit

    found = _read(folder, scorer)
    names, metrics = found.scorers, found.metrics
    limits = [parse_limit(text, "max", scorers=names, metrics=metrics) for text in most]
    limits += [parse_limit(text, "min", scorers=names, metrics=metrics) for text in least]
    if not limits:
        raise UserError(
            f"residency gate {folder} without a limit",
            why="there is nothing to judge",
            fix="add --max forgetting=0.1, or --min accuracy=0.9",
        )
    methods = dict(found.methods)
    name, baseline = _baseline(against, methods, scorer)
    rows = RowScores()
    judged = [
        judge(limit, method=method, runs=runs, scorer=found.scorer, baseline=baseline, against=name, rows=rows)
        for limit in limits
        for method, runs in methods.items()
        if method != name
    ]
    return judged, rows


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residency gate",
        description="Say whether a run, or every method of a study, keeps to limits; for scripts and CI.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="folder of a run or of a study")
    parser.add_argument("--max", action="append", default=[], metavar="NAME=NUMBER", help="at most; may be repeated")
    parser.add_argument("--min", action="append", default=[], metavar="NAME=NUMBER", help="at least; may be repeated")
    parser.add_argument("--against", metavar="BASELINE", help="folder of a run, or the name of a method of the study")
    parser.add_argument("--scorer", help="of limits that name none; default: the study's, else nll")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result for a program")
    return parser


@dataclass(frozen=True, kw_only=True)
class _Found:
    """What the folders hold: method -> its finished runs."""

    methods: Mapping[str, Sequence[Entry]]
    scorer: str
    scorers: Sequence[str]
    metrics: Sequence[str]


def _read(folder: Path, scorer: str | None) -> _Found:
    from residency.report.evidence.samples import METRICS
    from residency.report.records.arms import arms_of
    from residency.report.records.records import read_records

    records = read_records([folder], scorer=scorer)
    arms = arms_of(records)
    done = [entry for entry in records.done if entry.reference is None]
    if not done:
        states = ", ".join(dict.fromkeys(str(entry.record["status"]) for entry in records.entries))
        raise UserError(
            f"{folder} has no finished run ({states or 'no cells'})",
            why="limits are judged on complete records",
            fix="finish it first: the command that began it goes on where it stopped",
        )
    scorers = list(dict.fromkeys(name for entry in done for name in entry.record["scores"]))
    summaries = (entry.record.get("summary") or {} for entry in done)
    known = dict.fromkeys(metric for summary in summaries for own in summary.values() for metric in own)
    return _Found(
        methods={arm.name: [entry for entry in arm.entries if entry.done] for arm in arms},
        scorer=records.scorer,
        scorers=scorers,
        metrics=[*METRICS, *(name for name in known if name not in METRICS)],
    )


def _baseline(
    wanted: str | None, methods: Mapping[str, Sequence[Entry]], scorer: str | None
) -> tuple[str | None, Sequence[Entry]]:
    """(its name, its runs): another folder, or a method of this one."""
    if wanted is None:
        return None, ()
    if wanted in methods:
        return wanted, methods[wanted]
    if not Path(wanted).is_dir():
        raise UserError(
            f"--against {printable(wanted)}",
            why="it is neither a folder nor a method of this study",
            fix=f"give the folder of a run, or one of {', '.join(methods)}",
        )
    runs = [entry for own in _read(Path(wanted), scorer).methods.values() for entry in own]
    return Path(wanted).resolve().name, runs

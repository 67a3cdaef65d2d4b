"""`residency report`: records in, one page out."""

from __future__ import annotations

import argparse
from pathlib import Path

from residency.core.errors import EXIT_DONE, UserError
from residency.core.text import for_terminal

__all__ = ["report_command"]

_EPILOG = """\
examples:
  residency report studies/quickstart
  residency report runs/lora runs/dora --output comparison
  residency report studies/quickstart --reference olora-standard
  residency report studies/quickstart --paper average,forgetting,rougeL

The page needs no network and no server: open index.html. Tables (CSV, Parquet, LaTeX) and figures (PDF, SVG, PNG) lie
beside it.
"""


def report_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency report`.

    Returns:
        Exit code.
    """
    options = _parser().parse_args(words)
    if "list" in options.reference:
        from residency.metrics.published import names

        for name, title in names().items():
            print(f"{name:20} {title}")
        return EXIT_DONE
    if not options.folders:
        raise UserError(
            "residency report without a folder",
            why="a report is made from the records of runs or studies",
            fix="name their folders, for example `residency report studies/quickstart`",
        )
    from residency.report.page.build import build

    page = build(
        options.folders,
        output=options.output,
        references=options.reference,
        scorer=options.scorer,
        baseline=options.baseline,
        wandb_project=options.wandb,
        paper=[part for part in (options.paper or "").split(",") if part],
        overwrite=options.overwrite,
    )
    print(f"report: {for_terminal(page)}")
    return EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="residency report",
        description="Write a report of runs or studies from their records alone: what to take and why, with tables, "
        "figures and the origin of every number.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="*", type=Path, help="folders of runs or studies")
    parser.add_argument("--output", type=Path, help="folder to write into; default: report inside the first folder")
    parser.add_argument("--scorer", help="what the comparison is about; default: the study's, else nll")
    parser.add_argument("--baseline", help="what methods are compared with; default: the study's, else none")
    parser.add_argument(
        "--reference",
        action="append",
        default=[],
        metavar="NAME",
        help="published numbers to print beside, never as a pass mark; may be given several times; `list` lists them",
    )
    parser.add_argument("--wandb", metavar="PROJECT", help="also make a W&B run of the report (offline by default)")
    parser.add_argument(
        "--paper",
        nargs="?",
        const="average,forgetting,learning",
        metavar="METRICS",
        help="also write paper/table.tex: mean ± sd over seeds and orders of METRIC, SCORER or SCORER/METRIC, with "
        "commas between; default: average,forgetting,learning",
    )
    parser.add_argument("--overwrite", action="store_true", help="write into a folder that holds something else, too")
    return parser

"""The report of a study as one W&B run of its own: what to take and why, the tables, the page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from residency.report.advice.advice import Advice
from residency.report.records.records import Records
from residency.runs.views.flat_config import Scalar
from residency.runs.views.tables import finite, printable
from residency.runs.views.wandb_settings import WandbSettings
from residency.runs.views.wandb_view import WandbView

__all__ = ["track_report"]

_ROWS = 5000  # of a table; W&B shows 10,000 at most


def track_report(
    page: Path,
    records: Records,
    advice: Advice,
    tables: Mapping[str, pl.DataFrame],
    *,
    settings: WandbSettings,
    heat_map: Path | None = None,
) -> None:
    """Log a report: job type `report`, in the group of the study; offline unless WANDB_MODE says otherwise.

    A report that is made again goes on with its W&B run.

    Keys: `report/<table>` for every table, `report/page`, and in the summary `report/choice`, `report/evidence`,
    `report/headline`, `report/count`, `report/missing` and `final/<scorer>/<metric>` of the choice.

    Args:
        page: The page, already written; W&B writes beside it unless WANDB_DIR is set.
        records: What the report is about.
        advice: Its summary.
        tables: Name -> table.
        settings: Project, tags, and whether W&B is used.
        heat_map: PNG of the score matrices.
    """
    settings = replace(
        settings, group=records.title, job_type="report", tags=[*settings.tags, "report"], study=records.title
    )
    config: dict[str, Scalar] = {
        "scorer": records.scorer,
        "subject": records.subject,
        "baseline": records.baseline,
        "cells": len(records.entries),
    }
    domains = list(dict.fromkeys(name for entry in records.done for name in entry.record["domains"]))
    view = WandbView(
        settings=settings, run_dir=page.parent, name=f"{records.title} report", flat_config=config, domains=domains
    )
    if not view.start():
        return
    facts: dict[str, Scalar] = {
        "report/choice": advice.choice or "none",
        "report/evidence": advice.evidence,
        "report/headline": advice.headline,
        "report/count": len(records.entries),
        "report/missing": len(records.entries) - len(records.done),
        **_choice(records, advice, tables),
    }
    shown = {"report/page": page} | ({"report/matrices": heat_map} if heat_map and heat_map.is_file() else {})
    view.conclude(facts, {f"report/{name}": _rows(table) for name, table in tables.items()}, pages=shown)


def _rows(table: pl.DataFrame) -> tuple[Sequence[str], list[list[Any]]]:
    return table.columns, [list(row) for row in table.head(_ROWS).rows()]


def _choice(records: Records, advice: Advice, tables: Mapping[str, pl.DataFrame]) -> dict[str, float]:
    """Metrics of the recommended method's first row, under the names that cells have."""
    if advice.choice is None or "methods" not in tables:
        return {}
    found = (
        row
        for row in tables["methods"].to_dicts()
        if str(row["method"]).split(" · ")[0] == printable(advice.choice, 40)
    )
    row = next(found, {})
    metrics = {name: finite(row.get(name)) for name in ("average", "learning", "forgetting", "bwt", "fwt")}
    return {f"final/{records.scorer}/{name}": value for name, value in metrics.items() if value is not None}

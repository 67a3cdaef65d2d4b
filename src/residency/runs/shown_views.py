"""What views have left behind of a complete run, and making it again where it is missing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from residency.core.errors import UserError
from residency.core.tensor_files import read_json, write_json
from residency.runs.folder import RunFolder
from residency.runs.views.base import RunInfo, View

__all__ = ["finish_views", "show_again"]

_FILE = "views.json"


def finish_views(folder: RunFolder, views: Sequence[View], record: Mapping[str, Any]) -> None:
    """Let the views of a run that is complete end, then keep which of them did.

    Args:
        folder: Of the run.
        views: What shows it.
        record: As in results.json.
    """
    for view in views:
        view.finish(record)
    keeping = {view.name for view in views if view.keeps}
    write_json(folder.path / _FILE, {"shown": sorted(keeping | _shown(folder))})


def show_again(folder: RunFolder, views: Sequence[View], record: Mapping[str, Any]) -> None:
    """Make what is missing of the views of a complete run: the process may have ended before they did.

    Args:
        folder: Of the run.
        views: What should show it.
        record: As in results.json; records of versions that kept no digests are left as they are.
    """
    if "files" not in record:
        return
    shown = _shown(folder)
    missing = [view for view in views if view.keeps and (view.name not in shown or not view.is_there())]
    if not missing:
        return
    rows: list[Mapping[str, Any]] = [
        {scorer: dict(zip(_columns(record), row, strict=True)) for scorer, row in rows.items()}
        for rows in _rows(record["scores"])
    ]
    try:
        for view in missing:
            view.start(_info(record), folder.history(), rows)
        finish_views(folder, missing, record)
    except UserError as error:
        # The run is complete all the same; where nothing can be written, nothing has to be.
        folder.on_message(f"not shown again: {error.got}")


def _shown(folder: RunFolder) -> set[str]:
    with suppress(UserError, KeyError, TypeError):
        return {*read_json(folder.path / _FILE)["shown"]}
    return set()


def _columns(record: Mapping[str, Any]) -> list[str]:
    return [*record["domains"], *record["probes"]]


def _rows(scores: Mapping[str, Any]) -> list[dict[str, list[float | None]]]:
    """Row by row, what `scores` holds scorer by scorer."""
    count = max((len(entry["R"]) for entry in scores.values()), default=0)
    return [{scorer: entry["R"][k] for scorer, entry in scores.items()} for k in range(count)]


def _info(record: Mapping[str, Any]) -> RunInfo:
    return RunInfo(
        cell=record["cell"],
        seed=record["seed"],
        axes=record["axes"],
        domains=record["domains"],
        probes=record["probes"],
        layout=record["provenance"]["layout"],
        trainable=record["cost"]["trainable_parameters"],
        total=record["cost"]["total_parameters"],
        resumed=len(record["domains"]),
        split=record["split"],
    )

"""A study that is finished and has not changed is shown at once: nothing is planned, parsed or drawn again.

When all cells of a sweep are complete, `finished.json` keeps the digests of the study file and of every file that it
names, and of every cell's record. The next sweep compares them before it imports anything large.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

import residency
from residency.core.digests import digest_file, seal, unseal
from residency.core.errors import UserError
from residency.core.text import for_terminal, printable
from residency.core.yaml_files import read_yaml
from residency.runs.file_stamps import file_stamps
from residency.runs.whole_run import whole_record

__all__ = ["Finished", "keep_finished", "show_again", "show_files", "show_tables", "unchanged"]

_FILE = "finished.json"
_PRESET = (".yaml", ".yml", ".json")
Finished = Mapping[str, Any]
"""{"name", "scorer", "baseline", "store", "threads", "cells", "compared", "methods", "said", "pictures", "page",
"sources", "code"}."""


def unchanged(study: Path, folder: Path, options: Mapping[str, Any]) -> tuple[Finished, list[dict[str, Any]]] | None:
    """What a finished study left, with the records of its cells; `None` if anything has changed or is damaged.

    Args:
        study: The study file.
        folder: Of the study.
        options: {"store", "threads"} as they were given, `None` for what the study says.
    """
    # Whatever is wrong here is told by the planner, which looks at everything.
    with suppress(OSError, ValueError, KeyError, TypeError, UserError, RecursionError):
        kept = unseal(json.loads((folder / _FILE).read_bytes()), name=_FILE)
        if kept["sources"] != _sources(study) or kept["code"] != _code():
            return None
        if any(given is not None and given != kept[name] for name, given in options.items()):
            return None
        if {"methods", "said"} - kept.keys():
            return None
        if not all(Path(file).is_file() for file in (*kept["pictures"], kept["page"])):
            return None
        records = []
        for cell, digest in kept["cells"].items():
            path = folder / "cells" / cell
            if digest_file(path / "results.json") != digest or (record := whole_record(path)) is None:
                return None
            records.append(record)
        return kept, records
    return None


def keep_finished(study: Path, folder: Path, cells: Sequence[str], **what: Any) -> None:
    """Keep that all cells of a study are complete.

    Args:
        study: The study file.
        folder: Of the study.
        cells: Ids, in order.
        what: Name, scorer, baseline, store, threads, pictures, page, and which cells are compared.
    """
    digests = {cell: digest_file(folder / "cells" / cell / "results.json") for cell in cells}
    content = {**what, "sources": _sources(study), "code": _code(), "cells": digests}
    (folder / _FILE).write_text(json.dumps(seal(content)), encoding="utf-8")


def show_tables(
    records: Sequence[Mapping[str, Any]], *, scorer: str, told: Mapping[str, Any], console: Console
) -> None:
    """Print the score matrices of finished cells, then the comparison.

    Args:
        records: Of the cells of the axes.
        scorer: What is compared.
        told: What the report said: "methods", the rows of that table, and "said", its words.
        console: Where to print.
    """
    from residency.report.tables.console import methods_table
    from residency.runs.views.tables import score_table

    done = [record for record in records if record["status"] == "done"]
    for record in done:
        console.print(score_table(record, scorer))
    known: Mapping[str, Any] = next((record["scores"][scorer] for record in done if scorer in record["scores"]), {})
    unit, higher = str(known.get("unit")), bool(known.get("higher_is_better"))
    console.print(methods_table(told["methods"], scorer=scorer, unit=unit, higher=higher))
    console.print(told["said"])


def show_files(folder: Path, made: Mapping[str, Any], console: Console) -> None:
    """Print where the heat maps, records and report of a study lie."""
    for picture in made["pictures"]:
        console.print(f"  heat maps: {escape(for_terminal(picture))}")
    console.print(f"  records: {escape(for_terminal(folder / 'cells'))}/<cell>/results.json")
    console.print(f"  report: {escape(for_terminal(made['page']))}")


def show_again(study: Path, folder: Path, options: Mapping[str, Any], console: Console) -> bool:
    """Show a finished study that has not changed; whether there is one.

    Args:
        study: The study file.
        folder: Of the study.
        options: As for `unchanged`.
        console: Where to print.
    """
    found = unchanged(study, folder, options)
    if found is None:
        return False
    made, records = found
    name, where = escape(printable(made["name"])), escape(for_terminal(folder))
    console.print(f"[bold]{name}[/bold]: {len(records)} cells, 0 to run, {len(records)} complete in {where}")
    compared = [record for record in records if record["cell"] in made["compared"]]
    show_tables(compared, scorer=made["scorer"], told=made, console=console)
    show_files(folder, made, console)
    return True


def _sources(study: Path) -> dict[str, Any]:
    """{path: SHA-256} of the study file and all files of keys and values it leads to; stamps of data and models."""
    found: dict[str, Any] = {}
    waiting = [study.resolve()]
    while waiting:
        path = waiting.pop()
        if str(path) not in found:
            found[str(path)] = hashlib.sha256(path.read_bytes()).hexdigest()
            texts = list(_texts(read_yaml(path, what="the study")))
            found |= file_stamps(texts)
            waiting += [path.parent / text for text in texts if text.endswith(_PRESET)]
            waiting = [path.resolve() for path in waiting if path.is_file()]
    return found


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)
    elif isinstance(value, str) and len(value) < 1000:
        yield value


def _code() -> str:
    """Of this package: a report drawn by other code may look different."""
    home = Path(residency.__path__[0])
    stats = ((path, path.stat()) for path in sorted(home.rglob("*")) if path.suffix in (".py", ".j2", ".js", ".css"))
    text = "\n".join(f"{path.relative_to(home)} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    return hashlib.sha256(text.encode()).hexdigest()

"""Where numbers come from: what is missing, resolved configs, seeds, versions, fingerprints, licences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from residency.core.text import printable
from residency.report.records.arms import Arm
from residency.report.records.records import Records
from residency.report.records.settings import differences
from residency.report.tables.html_tables import Grid, plain_grid

__all__ = ["configs", "missing", "provenance"]

_CONFIGS, _SETTINGS, _METHODS = 8, 60, 40
# Where things lie says nothing about what a run is.
_PRIVATE = ("run_dir", "store", "wandb", "config")


def missing(records: Records) -> Grid:
    """Cells without results, and why."""
    rows = [
        {"cell": printable(e.record["cell"]), "why": printable(e.record["status"], 200), "seed": e.record.get("seed")}
        for e in records.entries
        if not e.done
    ]
    return plain_grid("missing", "Missing and failed cells", rows)


def provenance(records: Records, arms: Sequence[Arm]) -> list[Grid]:
    """Tables of origin."""
    common, differ = differences(arms[:_METHODS])
    shared = [{"setting": key, "value": value} for key, value in sorted(common.items())]
    apart = [
        {"method": arm.name, **{key: differ[key].get(arm.name) for key in list(differ)[:_SETTINGS]}}
        for arm in arms[:_METHODS]
        if differ
    ]
    return [
        plain_grid("rows", "Rows and tokens that were used and left out", _rows(records)),
        plain_grid("augmented", "Rows that were made of training rows", _augmented(records)),
        plain_grid("left_out", "What takes no part, from the files to the matrix", _left_out(records)),
        plain_grid("findings", "What the check of the data found", _findings(records)),
        plain_grid("origin", "Data and model", _data(records)),
        plain_grid("versions", "Versions", _varying(records, "versions")),
        plain_grid("apart", "Settings that differ between methods", apart),
        plain_grid("shared", "Settings that all methods share", shared),
        plain_grid("cells", "All cells", [_cell(e.record, e.role) for e in records.entries]),
    ]


def _rows(records: Records) -> list[dict[str, Any]]:
    """What became of the rows of every domain and split; cells that say the same are one line."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in records.done:
        for name, splits in ((entry.record.get("data") or {}).get("domains") or {}).items():
            for split, c in splits.items():
                row = {
                    "domain": printable(name),
                    "split": split,
                    "rows given": c.get("given"),
                    "used": c.get("rows"),
                    "left out": (c.get("given") or 0) - (c.get("rows") or 0),
                    "of these too long": c.get("too_long"),
                    "prompts cut": c.get("cut_prompts"),
                    "tokens of them": c.get("cut_prompt_tokens"),
                    "answers cut, their end lost": c.get("cut_answers"),
                    "tokens of these": c.get("cut_answer_tokens"),
                    "longest row, tokens": c.get("longest"),
                }
                found[tuple(row.values())] = row
    return list(found.values())


def _left_out(records: Records) -> list[dict[str, Any]]:
    """Every number of what is left out; cells that say the same are one line."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in records.done:
        for one in (entry.record.get("data") or {}).get("left_out") or ():
            row = {
                "domain": printable(one.get("column")),
                "split": printable(one.get("split") or "-"),
                "left out": one.get("count"),
                "of": one.get("of"),
                "what": printable(f"{one.get('unit')} {one.get('how')}", 300),
                "cell": entry.record["cell"],
            }
            known = found.setdefault(tuple(row.values())[:-1], {**row, "cells": []})
            known["cells"].append(row["cell"])
    return [_with_cells(row) for row in found.values()]


def _augmented(records: Records) -> list[dict[str, Any]]:
    """What each method of a domain's `augment` made; cells that say the same are one line."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in records.done:
        for name, made in ((entry.record.get("data") or {}).get("augmented") or {}).items():
            for one in made:
                dropped = ", ".join(f"{n} {count}" for n, count in sorted((one.get("dropped") or {}).items()))
                row = {
                    "domain": printable(name),
                    "method": printable(one.get("method")),
                    "asked": one.get("asked"),
                    "kept": one.get("kept"),
                    "dropped by": printable(dropped or "-", 300),
                    "above max_share": one.get("not_asked"),
                    "tokens": one.get("tokens"),
                    "cell": entry.record["cell"],
                }
                known = found.setdefault(tuple(row.values())[:-1], {**row, "cells": []})
                known["cells"].append(row["cell"])
    return [_with_cells(row) for row in found.values()]


def _with_cells(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with the first of its cells, and how many more there are."""
    cells = row["cells"]
    more = f" and {len(cells) - 1} more" if len(cells) > 1 else ""
    return {**{key: value for key, value in row.items() if key not in ("cell", "cells")}, "cells": cells[0] + more}


def _findings(records: Records) -> list[dict[str, Any]]:
    """What may make scores mean something else than they seem to."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for entry in records.done:
        for one in (entry.record.get("data") or {}).get("findings") or ():
            if one.get("severity") != "info":
                row = {
                    "domain": printable(one.get("domain")),
                    "split": printable(one.get("split") or "-"),
                    "severity": printable(one.get("severity")),
                    "found": printable(one.get("got"), 300),
                    "why": printable(one.get("why"), 300),
                }
                found[tuple(row.values())] = row
    return list(found.values())


def _cell(record: Mapping[str, Any], role: str) -> dict[str, Any]:
    axes = ", ".join(f"{printable(k)}: {printable(v)}" for k, v in record["axes"].items())
    order = " → ".join(printable(name, 30) for name in record.get("domains") or [])
    status = printable(record.get("status"))
    return {
        "cell": record["cell"],
        "status": status,
        "seed": record.get("seed"),
        "axes": axes,
        "order": order,
        "role": role,
    }


def _varying(records: Records, part: str) -> list[dict[str, Any]]:
    """What all cells say about a part; where they disagree, every value."""
    found: dict[str, dict[str, None]] = {}
    for entry in records.done:
        for key, value in ((entry.record.get("provenance") or {}).get(part) or {}).items():
            found.setdefault(key, {})[printable(value)] = None
    return [
        {
            "what": key,
            "value": ", ".join(values),
            "same everywhere": "yes" if len(values) == 1 else "no: compare with care",
        }
        for key, values in found.items()
    ]


def _data(records: Records) -> list[dict[str, Any]]:
    rows: dict[tuple[str, str, str], dict[str, Any]] = {}
    for entry in records.done:
        origin = entry.record.get("provenance") or {}
        prints, licences = origin.get("fingerprints") or {}, origin.get("licences") or {}
        model = origin.get("backbone") or {}
        described = (
            ", ".join(f"{k}: {_text(v)}" for k, v in model.items()) if isinstance(model, Mapping) else _text(model)
        )
        mark = _short(prints.get("backbone"))
        rows[("model", described, mark)] = {"what": "model", "name": described, "licence": None, "fingerprint": mark}
        data = prints.get("data") or {}
        for name in dict.fromkeys([*data, *licences]):
            mark, licence = _short(data.get(name)), printable(licences.get(name) or "not stated", 200)
            key = ("data", str(name), mark)
            rows[key] = {"what": "data", "name": printable(name), "licence": licence, "fingerprint": mark}
    return list(rows.values())


def _text(value: Any) -> str:
    """A value without the path it lies at."""
    text = printable(value, 120)
    return text.rsplit("/", 1)[-1] if text.startswith(("/", "~")) else text


def _short(fingerprint: Any) -> str:
    if isinstance(fingerprint, Mapping):
        return ", ".join(f"{printable(k, 20)} {str(v)[:12]}" for k, v in fingerprint.items())
    return str(fingerprint or "-")[:16]


def configs(arms: Sequence[Arm]) -> tuple[list[tuple[str, str]], int]:
    """(method, its resolved config as YAML) of the first ones, and how many are left."""
    found = []
    for arm in arms[:_CONFIGS]:
        config = arm.entries[0].config()
        kept = {key: value for key, value in config.items() if key not in _PRIVATE}
        if kept:
            found.append((arm.name, yaml.safe_dump(kept, sort_keys=False, allow_unicode=True)))
    return found, max(0, len(arms) - len(found)) if found else 0

"""The tables of README.md, from the records of a study.

    python experiments/mitigations/table.py studies/mitigations [more ...]     folders of studies, or records as *.jsonl

One row per mitigation: means over the seeds of what the stream ends with, in nats per completion token; ± is the
standard deviation over seeds. Seconds are what a cell costs alone (stages that it shared with others included), as a
multiple of the same seed's cell without a mitigation.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

SUMMARY = ("average", "learning", "bwt", "forgetting")
Records = dict[str, list[dict[str, Any]]]


def read(places: Iterable[Path]) -> Records:
    """{mitigation: records of its seeds}, references under their own names; only what is done, each cell once."""
    cells: dict[str, dict[str, Any]] = {}
    for place in places:
        lines = place.read_text(encoding="utf-8").splitlines() if place.is_file() else _files(place)
        cells |= {record["cell"]: record for record in map(json.loads, lines) if record["status"] == "done"}
    found: Records = defaultdict(list)
    for record in cells.values():
        found[(record.get("axes") or {}).get("mitigation") or record["cell"].rpartition("-s")[0]].append(record)
    return dict(found)


def _files(study: Path) -> Iterable[str]:
    return (file.read_text(encoding="utf-8") for file in sorted(study.glob("cells/*/results.json")))


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there is one."""
    mean = f"{statistics.fmean(values):.2f}".replace("-", "\N{MINUS SIGN}")
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def numbers(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{name: what stands in the table}."""
    rows = [record["summary"]["nll"] for record in records]
    found = {}
    for name in SUMMARY:
        # A record holds average and learning as utilities; people read losses.
        sign = -1 if name in ("average", "learning") else 1
        values = [sign * row[name] for row in rows if row.get(name) is not None]
        found[name] = spread(values) if values else "-"
    return found


def relative_seconds(records: Sequence[Mapping[str, Any]], plain: Sequence[Mapping[str, Any]]) -> str:
    """Seconds of training, with what comes before and after it, over those of the plain cell with the same seed."""
    base = {record["seed"]: _seconds(record) for record in plain}
    ratios = [_seconds(record) / base[record["seed"]] for record in records if record["seed"] in base]
    return f"{statistics.fmean(ratios):.2f}" if ratios else "-"


def _seconds(record: Mapping[str, Any]) -> float:
    return float(sum(record["cost"][f"{part}_seconds"] for part in ("prepare", "train", "finish")))


def state(records: Sequence[Mapping[str, Any]]) -> str:
    """The most that the mitigation held, in MB."""
    held = max(sum(record["cost"]["mitigation_state_bytes"].values()) for record in records)
    return f"{held / 1e6:.2f}" if held else "0"


def table(found: Records) -> str:
    """Markdown, best average first."""
    plain = found["none"]
    lines = [
        "| mitigation | seeds | average | learning | BWT | forgetting | training time | state, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    ends = {name: end for name, records in found.items() if (end := _average(records)) is not None}
    for name in sorted(ends, key=ends.__getitem__):
        shown = numbers(found[name])
        cells = [name, str(len(found[name])), *(shown[key] for key in SUMMARY)]
        lines.append("| " + " | ".join([*cells, relative_seconds(found[name], plain), state(found[name])]) + " |")
    return "\n".join(lines)


def _average(records: Sequence[Mapping[str, Any]]) -> float | None:
    """Mean loss at the end of the stream; `None` for what learned one domain or all at once."""
    rows = [record["summary"]["nll"] for record in records]
    if any(row.get(key) is None for row in rows for key in ("average", "bwt")):
        return None
    return -statistics.fmean(row["average"] for row in rows)


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("places", type=Path, nargs="+", help="folders of studies, or records as *.jsonl")
    print(table(read(parser.parse_args().places)))


if __name__ == "__main__":
    main()

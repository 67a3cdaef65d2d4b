"""The tables of README.md, from the records of a study.

    python experiments/mitigations/table.py studies/mitigations [--curves studies/mitigation-sweeps]

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


def read(study: Path) -> Records:
    """{mitigation: records of its seeds}, references under their own names; only what is done."""
    found: Records = defaultdict(list)
    for file in sorted(study.glob("cells/*/results.json")):
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["status"] == "done":
            name = (record.get("axes") or {}).get("mitigation") or record["cell"].rpartition("-s")[0]
            found[name].append(record)
    return dict(found)


def spread(values: Sequence[float]) -> str:
    """Mean, and the standard deviation where there is one."""
    mean = f"{statistics.fmean(values):.2f}".replace("-", "\N{MINUS SIGN}")
    return mean if len(values) < 2 else f"{mean} ± {statistics.stdev(values):.2f}"


def numbers(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """{name: what stands in the table}."""
    rows = [record["summary"]["nll"] for record in records]
    found = {}
    for name in SUMMARY:
        values = [row[name] for row in rows if row.get(name) is not None]
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
    order = sorted(found, key=lambda name: statistics.fmean(r["summary"]["nll"]["average"] for r in found[name]))
    for name in order:
        shown = numbers(found[name])
        cells = [name, str(len(found[name])), *(shown[key] for key in SUMMARY)]
        lines.append("| " + " | ".join([*cells, relative_seconds(found[name], plain), state(found[name])]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Print them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--curves", type=Path, help="a second study, printed below the first")
    options = parser.parse_args()
    found = read(options.study)
    print(table(found))
    if options.curves is not None:
        print("\n" + table(read(options.curves)))


if __name__ == "__main__":
    main()

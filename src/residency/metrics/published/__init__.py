"""Published numbers, to be printed beside one's own: plausibility bands, never a pass mark.

Every row carries its source, and a mark that says how it is known:

    V    read in the source itself (paper, repository, result file)
    V2   two independent second-hand notes that agree
    S    one second-hand source
    R    recalled from the literature: ±0.5 until checked
    run  recomputed from the authors' raw files

>>> "olora-standard" in names()
True
>>> found = load("olora-standard")
>>> [(row.order, row.value) for row in found.rows if row.method == "O-LoRA"]
[('1', 75.4), ('2', 75.7), ('3', 76.3), ('mean of 1 to 3', 75.8)]
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib import resources
from importlib.abc import Traversable
from typing import Any

from residency.core.errors import UserError

__all__ = ["PROVENANCE", "Reference", "ReferenceSet", "load", "names"]

PROVENANCE = {
    "V": "read in the source itself",
    "V2": "two second-hand notes that agree",
    "S": "one second-hand source",
    "R": "recalled, unchecked",
    "run": "recomputed from the authors' raw files",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """One published number.

    Args:
        method: As the source calls it.
        model: Backbone.
        benchmark: Data.
        order: Order of the domains, as the source labels it.
        metric: In the words of `residency.metrics` where it is the same metric (`average`, `learning`, `bwt`,
            `forgetting`), else the source's.
        value: The number, in `unit`.
        unit: `%`, `share` (0 to 1), `nats per token`, ...; empty for counts.
        n_seeds: Runs it is the mean of; `None` = not stated.
        protocol: What one has to know to compare.
        source: Where it stands.
        provenance: A key of `PROVENANCE`.
        remark: A caveat to print with it, or empty.
    """

    method: str
    model: str
    benchmark: str
    order: str
    metric: str
    value: float
    unit: str
    n_seeds: int | None
    protocol: str
    source: str
    provenance: str
    remark: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceSet:
    """The published numbers of one benchmark.

    Args:
        name: What `load` was given.
        title: One line.
        warnings: To be printed above the numbers.
        rows: The numbers, in the order of the source.
    """

    name: str
    title: str
    warnings: tuple[str, ...]
    rows: tuple[Reference, ...]


def names() -> dict[str, str]:
    """Every set there is: name -> title, sorted by name."""
    files = sorted(_folder().iterdir(), key=lambda file: file.name)
    found = [file for file in files if file.name.endswith(".json")]
    return {file.name.removesuffix(".json"): _read(file.name)["title"] for file in found}


def load(name: str) -> ReferenceSet:
    """The set of that name.

    Raises:
        UserError: There is no such set; the message lists those there are.
    """
    known = names()
    if name not in known:
        raise UserError(
            f"no published numbers under the name {name!r}",
            why="the package has rows of these benchmarks only",
            fix=f"choose from {', '.join(known)}",
        )
    content = _read(f"{name}.json")
    rows = [content["defaults"] | dict(zip(content["columns"], row, strict=True)) for row in content["rows"]]
    return ReferenceSet(
        name=name,
        title=content["title"],
        warnings=tuple(content["warnings"]),
        rows=tuple(Reference(**{**row, "value": float(row["value"])}) for row in rows),
    )


def _folder() -> Traversable:
    return resources.files(__name__)


def _read(file: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((_folder() / file).read_text(encoding="utf-8"))
    return content

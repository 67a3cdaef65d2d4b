"""What the figures of a report share: rows of the tables, best first, and whom to highlight."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from residency.core.text import printable
from residency.report.advice.advice import Advice
from residency.report.records.arms import Arm
from residency.report.records.records import Records
from residency.report.tables.frames import Frames

__all__ = ["ChartSelection"]

Row = dict[str, Any]


class ChartSelection:
    """What the figures share: rows of the tables, best first, and whom to highlight."""

    def __init__(self, records: Records, arms: Sequence[Arm], frames: Frames, advice: Advice) -> None:
        self.records, self.arms, self.frames = records, arms, frames
        trained = [arm for arm in arms if arm.done]
        first = trained[0] if trained else None
        self.higher = first.higher_is_better if first else True
        entry = first.done[0].record["scores"][records.scorer] if first else {}
        self.short = printable(records.scorer, 30)
        self.unit = f"{printable(records.scorer)}, {printable(entry.get('unit') or 'unknown unit', 40)}"
        rows = frames.methods.to_dicts() if frames.methods.height else []
        known = [row for row in rows if row.get("average") is not None and row["role"] != "reference"]
        sign = -1 if self.higher else 1
        self.ranked: list[Row] = sorted(known, key=lambda row: sign * row["average"])
        self.references = [row for row in rows if row["role"] == "reference" and row.get("average") is not None]
        self.chosen = next((r["method"] for r in self.ranked if _value(arms, r["method"]) == advice.choice), None)
        self.baseline = next((row["method"] for row in self.ranked if row["baseline"]), None)

    def best(self, count: int) -> list[Row]:
        """The best rows, the baseline always among them."""
        shown = self.ranked[:count]
        if self.baseline and self.baseline not in [row["method"] for row in shown]:
            shown = [*shown[:-1], *(row for row in self.ranked if row["method"] == self.baseline)]
        return shown

    def names(self, count: int) -> list[str]:
        return [row["method"] for row in self.best(count)]

    def cut(self, count: int) -> str:
        """What is not in the picture."""
        left = len(self.ranked) - count
        return f" Shown: the best {count} of {len(self.ranked)}, and the baseline." if left > 0 else ""

    @property
    def style(self) -> dict[str, str | None]:
        return {"chosen": self.chosen, "baseline": self.baseline}


def _value(arms: Sequence[Arm], name: str) -> str | None:
    return next((arm.value for arm in arms if arm.name == name), None)

"""What all charts share: colours that every common colour vision tells apart, on light and on dark; and one figure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import altair as alt

__all__ = ["BASELINE", "CHOSEN", "SHAPES", "Figure", "axis_scale", "color_of", "config", "number_format"]

# Okabe and Ito without black and yellow, slightly lifted so that each has 3:1 contrast on white and on near-black.
CHOSEN, BASELINE = "#1f83c4", "#808a93"
OTHERS = ["#d55e00", "#0a9a72", "#c46a9c", "#b98500", "#8a6fc0", "#3f9bb8", "#a4673a"]
# Never colour alone: every series has a shape too.
SHAPES = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-left", "triangle-right"]
FONT = "DejaVu Sans, Verdana, Arial, sans-serif"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One picture of a report.

    Args:
        id: File name and anchor.
        title: Heading.
        caption: What is to be seen, for whoever sees it first.
        chart: `None` if there is nothing to draw.
        absent: Then why.
    """

    id: str
    title: str
    caption: str
    chart: alt.TopLevelMixin | None = None
    absent: str = ""

    @cached_property
    def spec(self) -> dict[str, Any]:
        """The Vega-Lite definition without a theme."""
        if self.chart is None:
            raise ValueError(f"figure {self.id} has no chart: {self.absent}")
        spec: dict[str, Any] = self.chart.to_dict()
        # Colours of text and background are the page's, or the printer's, to choose.
        spec.pop("config", None)
        return spec


def config(*, dark: bool = False, background: str = "transparent") -> dict[str, Any]:
    """The theme: Vega-Lite configuration."""
    ink, soft, line = ("#e8eaed", "#a9b1ba", "#3a424c") if dark else ("#1a1d21", "#565f69", "#dfe3e8")
    return {
        "background": background,
        "font": FONT,
        "padding": 8,
        "view": {"stroke": None},
        "axis": {
            "labelColor": ink,
            "titleColor": soft,
            "gridColor": line,
            "domainColor": line,
            "tickColor": line,
            "labelFontSize": 13,
            "titleFontSize": 13,
            "titleFontWeight": "normal",
            "labelLimit": 260,
            "titlePadding": 8,
        },
        "legend": {
            "symbolFillColor": soft,
            "symbolStrokeColor": soft,
            "labelColor": ink,
            "titleColor": soft,
            "labelFontSize": 13,
            "titleFontSize": 13,
            "labelLimit": 260,
        },
        "header": {"labelColor": ink, "titleColor": soft, "labelFontSize": 14, "labelFontWeight": "bold"},
        "title": {"color": ink, "subtitleColor": soft, "fontSize": 15, "anchor": "start", "offset": 12},
        "text": {"color": ink, "fontSize": 13},
        "rule": {"color": soft},
        "point": {"filled": True},
    }


def color_of(names: Sequence[str], *, chosen: str | None, baseline: str | None) -> tuple[alt.Scale, alt.Scale]:
    """Colour and shape by method: the recommended one blue, the baseline grey, wherever they appear."""
    rest = [name for name in names if name not in (chosen, baseline)]
    own = {name: OTHERS[i % len(OTHERS)] for i, name in enumerate(rest)}
    colors = [CHOSEN if name == chosen else BASELINE if name == baseline else own[name] for name in names]
    shapes = [SHAPES[i % len(SHAPES)] for i in range(len(names))]
    return alt.Scale(domain=list(names), range=colors), alt.Scale(domain=list(names), range=shapes)


def axis_scale(values: Sequence[float | None], *, padding: int = 8) -> alt.Scale:
    """A scale that need not begin at 0: logarithmic where positive numbers span a large ratio."""
    known = [v for v in values if v is not None]
    if known and min(known) > 0 and max(known) / min(known) > 6:
        return alt.Scale(type="log", nice=False, padding=padding)
    return alt.Scale(zero=False, nice=False, padding=padding)


def number_format(values: Sequence[float | None]) -> str:
    """As many digits as the tables print."""
    return ".3f" if all(abs(v) <= 1 for v in values if v is not None) else ".2f"

"""Which charts a report draws, and of what."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.report.charts.theme import Figure, config
from residency.report.page.build import Report
from residency.report.records.records import read_records
from support.synthetic_studies import QUICKSTART, write_cell

STRENGTHS = (1, 10, 100)


@pytest.fixture(scope="module")
def figures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Figure]:
    """EWC at three strengths beside none, on two adapters, with observers switched on."""
    folder, cells = tmp_path_factory.mktemp("s"), []
    for adapter in ("lora", "dora"):
        for strength in (0, *STRENGTHS):
            value = f"ewc-{strength}" if strength else "none"
            cell, axes = f"{value}-{adapter}", {"mitigation": value, "adapter": adapter}
            matrix = QUICKSTART["ewc" if strength else "none"]
            cells.append({"id": cell, "axes": axes, "seed": 0})
            place = folder / "cells" / cell
            write_cell(place, cell, matrix, axes, 0, ("medical", "legal", "code"), rows=0)
            content = yaml.safe_load((place / "config.yaml").read_text())
            content["model"]["adapter"]["init_args"]["r"] = 8 if adapter == "lora" else 4
            ewc = {"class_path": "residency.mitigations.EWC", "init_args": {"strength": strength}}
            content["model"]["mitigations"] = {"ewc": ewc} if strength else {}
            (place / "config.yaml").write_text(yaml.safe_dump(content))
            record = json.loads((place / "results.json").read_text())
            drift = {"frobenius": 0.01, "by_block": [0.1, 0.2], "tokens": 5, "cosine": None}
            ece = {"columns": {"medical": {"ece": 0.1, "tokens": 9}, "legal": {"ece": 0.3, "tokens": 9}}}
            record["inside"] = [{}, *({"weights": drift, "calibration": ece} for _ in range(3))]
            (place / "results.json").write_text(json.dumps(record))
    (folder / "plan.json").write_text(json.dumps({"study": {"name": "s"}, "cells": cells}))
    return {figure.id: figure for figure in Report.of(read_records([folder])).figures}


def rows(figure: Figure) -> list[dict[str, Any]]:
    """All data of a figure."""
    return [row for data in figure.spec["datasets"].values() for row in data]


def test_a_grid_of_two_axes(figures: dict[str, Figure]) -> None:
    cells = {(row["row"], row["column"]) for row in rows(figures["grid-average"])}
    assert cells == {(f"ewc-{s}" if s else "none", a) for s in (0, *STRENGTHS) for a in ("lora", "dora")}


def test_a_curve_for_what_was_varied_alone(figures: dict[str, Figure]) -> None:
    curve = figures["sensitivity-1"]
    assert "mitigation.ewc.strength" in curve.title
    assert {(row["group"], row["x"]) for row in rows(curve)} == {
        (a, float(s)) for a in ("lora", "dora") for s in STRENGTHS
    }
    # The adapter's rank has two values only, and differs together with its name.
    assert "sensitivity-2" not in figures


def test_what_observers_found(figures: dict[str, Figure]) -> None:
    found = {(row["panel"], row["stage"]): row["value"] for row in rows(figures["drift"])}
    assert found["weights: ‖ΔW‖ / ‖W‖", 3] == pytest.approx(0.01)
    assert found["calibration: calibration error (ECE)", 1] == pytest.approx(0.2), "the mean over columns"
    assert not [panel for panel, _ in found if "cosine" in panel]
    assert {(row["block"], row["value"]) for row in rows(figures["drift-blocks"])} == {(0, 0.1), (1, 0.2)}


def test_no_chart_chooses_a_text_colour_or_asks_for_an_address(figures: dict[str, Figure]) -> None:
    for figure in figures.values():
        if figure.chart is not None:
            text = json.dumps({k: v for k, v in figure.spec.items() if k != "$schema"})
            assert '"url"' not in text
            assert "config" not in figure.spec


@pytest.mark.parametrize("dark", [False, True])
def test_text_is_readable_on_its_background(dark: bool) -> None:
    """Contrast of 4.5 : 1 and more (WCAG 2.1, AA)."""

    def luminance(color: str) -> float:
        parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    theme, ground = config(dark=dark), luminance("#14181d" if dark else "#ffffff")
    for color in (theme["axis"]["labelColor"], theme["axis"]["titleColor"], theme["text"]["color"]):
        low, high = sorted((luminance(color), ground))
        assert (high + 0.05) / (low + 0.05) >= 4.5


def test_the_palette_is_told_apart_from_both_grounds() -> None:
    from residency.report.charts.theme import BASELINE, CHOSEN, OTHERS

    assert len({CHOSEN, BASELINE, *OTHERS}) == 2 + len(OTHERS)
    assert not {CHOSEN, BASELINE} & {*OTHERS}


def test_a_figure_without_a_chart_says_why(tmp_path: Path) -> None:
    empty = Figure(id="x", title="X", caption="", absent="nothing to draw")
    with pytest.raises(ValueError, match="nothing to draw"):
        _ = empty.spec

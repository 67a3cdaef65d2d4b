"""The published numbers: complete, well formed, and equal to what can be recomputed."""

from __future__ import annotations

import csv
import doctest
from pathlib import Path

import pytest

from residency import metrics
from residency.core.errors import UserError
from residency.metrics import published as references
from residency.metrics.published import PROVENANCE, load, names

DATA = Path(__file__).parents[2] / ".." / "shared" / "data" / "matrices"
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason="no published matrices: ../shared/data/matrices is absent")


def test_documented_examples() -> None:
    result = doctest.testmod(references)
    assert result.attempted == 3
    assert result.failed == 0


@pytest.mark.parametrize("name", names())
def test_every_row_says_where_it_comes_from(name: str) -> None:
    found = load(name)
    assert found.title == names()[name]
    assert found.rows
    for row in found.rows:
        assert row.source
        assert row.provenance in PROVENANCE
        assert row.method
        assert row.model
        assert row.benchmark
        assert row.metric
        assert row.order
        if row.unit == "share":
            assert -1 <= row.value <= 1
        if row.unit == "%":
            assert -100 <= row.value <= 100


@pytest.mark.parametrize("name", names())
def test_no_two_rows_are_the_same_number(name: str) -> None:
    keys = [(r.method, r.model, r.benchmark, r.order, r.metric, r.protocol, r.source) for r in load(name).rows]
    assert len(keys) == len({*keys})


@pytest.mark.parametrize("name", ["olora", "../olora-standard", "", "olora-standard.json"])
def test_an_unknown_name_is_refused_with_the_known_ones(name: str) -> None:
    with pytest.raises(UserError, match="olora-standard"):
        load(name)


@pytest.mark.parametrize("name", ["olora-standard", "olora-long"])
def test_means_over_orders_are_those_of_their_orders(name: str) -> None:
    """Within the rounding of the papers."""
    checked = 0
    rows = load(name).rows
    for mean in (row for row in rows if row.order.startswith("mean")):
        single = [r.value for r in rows if (r.method, r.source) == (mean.method, mean.source) and r != mean]
        if single and "as printed" not in mean.remark:
            assert sum(single) / 3 == pytest.approx(mean.value, abs=0.11), mean
            checked += 1
    assert checked >= 8


def test_the_copied_baselines_carry_their_warning() -> None:
    found = load("olora-standard")
    copied = [r for r in found.rows if r.method in ("SeqFT", "SeqLoRA") and "artefact" in r.remark]
    assert len(copied) == 8
    assert "learning-rate artefacts" in found.warnings[0]


def test_the_peft_table_is_complete() -> None:
    rows = load("peft-metamathqa").rows
    assert len(rows) == 63 * 5
    assert next(r.value for r in rows if r.method == "lora rank32" and "wiki" in r.metric) == 0.05


@needs_data
def test_recomputed_rows_are_what_the_metrics_give() -> None:
    runs = {"SeqFT": "seqft", "IncLoRA": "icrlora", "O-LoRA": "olora", "SeqLoRA": "seqlora"}
    for row in load("olora-raw").rows:
        prefix = "order1" if row.order == "1" else "long"
        with (DATA / f"olora_{prefix}_{runs[row.method]}.csv").open(encoding="utf-8", newline="") as file:
            table = [[float(cell) if cell else None for cell in line[1:]] for line in list(csv.reader(file))[1:]]
        R: list[list[float | None]] = [[None] * len(table), *table]
        value = getattr(metrics, row.metric)(R, higher_is_better=True)
        assert row.value == pytest.approx(value, abs=1e-3), row

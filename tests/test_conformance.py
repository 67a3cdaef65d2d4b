"""Every property on every row of `table.py`, and every compatible pair; what is about single rows only."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from residency.core.errors import UserError
from residency.testing import MitigationRow, conformance
from residency.testing.tiny_runs import domains, train
from support.peft_configs import CONFIGS
from table import ADAPTERS, AUGMENTATIONS, DOMAINS, METRICS, MITIGATIONS, OBJECTIVES, SCORERS

# `make test` takes every mitigation on some adapters and some mitigations on every adapter, `make test-pairs` the rest.
SOME_ADAPTERS = ("lora_dropout",)
SOME_MITIGATIONS = ("ewc", "replay")
SOME_OBJECTIVES = ("flow", "preference_sigmoid", "kto", "rloo", "dapo", "label_policy")
# Through Trainer, files and evaluation as well: one for each way in which an adapter and a mitigation can meet.
STREAMS = [
    ("lora_dropout", "replay"),
    ("inc_lora", "replay"),
    ("full", "ewc"),
    ("sinkhorn", "ewc_online"),
    ("qlora", "weight_mixing"),
    ("lora", "sdft"),
    ("osf", "early_stopping"),
    ("full", "gpm"),
]


# The packaged data are read whole, which takes long; `tests/domains/test_packaged.py` does it once for each.
LONG_DOMAINS = {*DOMAINS} - {"jsonl", "table", "IcdChapters"}


# One class of ours around tuners of PEFT. How these few meet mitigations, are stopped inside of a stage and train as a
# copy is left to `make test-pairs` of the others.
FEW_TUNERS = ("lora", "lora_dropout", "dora", "pissa", "prefix_tuning", "trainable_tokens")
SHOWN_BY_A_FEW = ("a_stopped_run_goes_on_bit_for_bit", "a_copied_model_trains_as_a_fresh_one")


def _marks(row: str, partner: str, title: str) -> Collection[pytest.MarkDecorator]:
    if row in LONG_DOMAINS:
        return [pytest.mark.slow]
    bulk = row in ADAPTERS and partner in MITIGATIONS
    some = row in SOME_ADAPTERS or partner in SOME_MITIGATIONS or (row, partner) in STREAMS
    if row in CONFIGS and row not in FEW_TUNERS and (title in SHOWN_BY_A_FEW or partner):
        return [pytest.mark.pairs]
    if row in OBJECTIVES and partner:
        # Replay takes the place of some of the few rows.
        remark = pytest.mark.filterwarnings("ignore:KTO on")
        return [remark] if row in SOME_OBJECTIVES else [remark, pytest.mark.pairs]
    return [pytest.mark.pairs] if bulk and not some else []


test_conformance = conformance(
    adapters=ADAPTERS,
    mitigations=MITIGATIONS,
    objectives=OBJECTIVES,
    scorers=SCORERS,
    metrics=METRICS,
    domains=DOMAINS,
    augmentations=AUGMENTATIONS,
    streams=STREAMS,
    marks=_marks,
)


@pytest.mark.parametrize("name", ["lora_dropout", "full"])
def test_seed_decides_everything(name: str, llama_dropout: Path, tmp_path: Path) -> None:
    row = ADAPTERS[name]
    records = [
        train(tmp_path / str(i), llama_dropout, row.make(), seed=seed, **row.options)[0]["scores"]["nll"]["R"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert records[0] == records[1]
    assert records[0][1:] != records[2][1:]


def test_every_score_is_a_column_of_the_record(llama: Path, tmp_path: Path) -> None:
    """Through model, matrix and summary, without an edit anywhere: all scorers of the table at once."""
    readers = domains(tmp_path / "data", {"a": "label", "b": "generative"})
    special = ("numeric", "sql_valid", "sql_execution", "preference_accuracy", "reward_accuracy")
    rows = {name: row for name, row in SCORERS.items() if name not in special}
    readers["a"].scorers = readers["b"].scorers = {name: row.make() for name, row in rows.items()}
    full = ADAPTERS["full"].make()
    record, _ = train(tmp_path / "run", llama, full, data={"domains": readers}, steps=2)
    assert [*record["scores"]] == [*rows]
    for name, entry in record["scores"].items():
        labels = rows[name].make().labels != "none"
        assert all((row[0] is not None) and (row[1] is not None or labels) for row in entry["R"]), name
        assert entry["unit"] == rows[name].make().info().unit
    frame = pl.read_parquet(tmp_path / "run" / "stages" / "2-b" / "scores.parquet")
    last = record["scores"]["bits_per_byte"]["R"][-1]
    for column, value in zip("ab", last, strict=True):
        part = frame.filter((pl.col("scorer") == "bits_per_byte") & (pl.col("column") == column))
        assert (part["value"] * part["weight"]).sum() / part["weight"].sum() == pytest.approx(value)


def _classes(rows: Mapping[str, Any], folder: Path) -> set[str]:
    return {
        type(row.make(folder) if rows in (DOMAINS, AUGMENTATIONS) else row.make()).__name__ for row in rows.values()
    }


@pytest.mark.parametrize("kind", ["ADAPTERS", "MITIGATIONS", "OBJECTIVES", "SCORERS", "DOMAINS", "AUGMENTATIONS"])
def test_every_plug_in_has_a_row(kind: str, tmp_path: Path) -> None:
    """A class without a row would be tested by nothing."""
    from residency import adapters, domains, mitigations, objectives
    from residency.domains import augmentation, packaged
    from residency.scorers.find import scorer_classes

    # What a study makes out of other domains is no reader.
    known: dict[str, tuple[Mapping[str, Any], set[str]]] = {
        "ADAPTERS": (ADAPTERS, {*adapters.__all__} - {"Adapter"}),
        "MITIGATIONS": (MITIGATIONS, {*mitigations.__all__} - {"Mitigation"}),
        "OBJECTIVES": (OBJECTIVES, {*objectives.__all__} - {"Objective"}),
        "SCORERS": (SCORERS, {*scorer_classes()}),
        "DOMAINS": (DOMAINS, {*domains.__all__, *packaged.__all__} - {"Domain", "Template", "Chat", "Joint"}),
        "AUGMENTATIONS": (AUGMENTATIONS, {*augmentation.__all__} - {"Augmentation"}),
    }
    rows, classes = known[kind]
    missing = sorted(classes - _classes(rows, tmp_path))
    assert not missing, (
        f"{', '.join(missing)}: no property test has seen it. Add a row to tests/table.py: "
        f'{kind}["a_name"] = {kind.title()[:-1]}Row(make={missing[0] if missing else ""})'
    )


def test_a_suite_without_rows_or_with_unknown_names_is_refused() -> None:
    with pytest.raises(UserError, match="no property would run"):
        conformance()
    scaled: Any = MITIGATIONS["ewc"]
    with pytest.raises(UserError, match=r"'lora_pluss' in a pair\n  why: none of the adapters of this suite"):
        conformance(mitigations={"scaled": scaled}, streams=[("lora_pluss", "scaled")])
    with pytest.raises(UserError, match=r"MitigationRow\(make=..., off=...\)"):
        conformance(adapters={"full": ADAPTERS["full"]}, streams=[("full", "unknown")])


def test_a_row_of_another_kind_is_refused(tmp_path: Path) -> None:
    """In words, by the first property that runs on it."""
    wrong: Any = MitigationRow(make=ADAPTERS["full"].make, off=ADAPTERS["full"].make)  # type: ignore[arg-type]
    suite = conformance(mitigations={"mine": wrong}, streams=[])
    cases = suite.pytestmark[0].args[1]  # type: ignore[attr-defined]
    check = next(case.values[0] for case in cases if "declares" in case.id)
    with pytest.raises(UserError, match=r"the row 'mine' makes Full\n  why: it is no Mitigation"):
        suite(check, tmp_path)

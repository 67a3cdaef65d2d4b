"""What a report recommends, how sure it says it is, and what it refuses to say."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from residency.report.advice.advice import Advice, advise
from residency.report.evidence.of_records import findings_of
from residency.report.records.arms import arms_of
from residency.report.records.records import read_records
from support.synthetic_studies import QUICKSTART, write_cell, write_study

BASE = [[5.0, 5.0], [1.0, 5.0], [3.0, 1.0]]


def advice(folder: Path, **options: Any) -> Advice:
    """The summary of a study folder."""
    material = read_records([folder], **options)
    arms = arms_of(material)
    return advise(material, arms, findings_of(material, arms))


def study(folder: Path, matrices: Mapping[str, Sequence[Sequence[float]]], **options: Any) -> Advice:
    """The summary of a study of two domains."""
    return advice(write_study(folder / "s", matrices, domains=("a", "b"), **options))


def edit(folder: Path, cell: str, **changes: Any) -> None:
    """Change a cell's record."""
    path = folder / "cells" / cell / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_one_seed_recommends_nothing(tmp_path: Path) -> None:
    found = advice(write_study(tmp_path / "s"))
    assert (found.headline, found.choice, found.strength) == ("No clear winner; replay is ahead", None, "none")
    assert "one seed says nothing about other seeds" in found.evidence
    assert {fact.good for fact in found.facts} == {None}
    reasons, limits = " ".join(found.reasons), " ".join(found.limits)
    assert "of the test rows only" in reasons
    assert "One seed: no statement about significance" in limits
    assert "No probe was scored" in limits
    assert "One order of domains" in limits


def test_seeds_can_show_it(tmp_path: Path) -> None:
    found = advice(write_study(tmp_path / "s", seeds=range(4)))
    assert (found.headline, found.choice, found.strength) == ("Take replay", "replay", "shown")
    assert "4 seeds and 96 test rows (p < .001, corrected for 12 comparisons)" in found.evidence
    assert [fact.good for fact in found.facts[:3]] == [True, False, True], "at the end, right after learning, forgotten"
    reasons = " ".join(found.reasons)
    assert "It keeps: forgetting 0.48 against 2.97, 84 % less" in reasons
    assert "By accuracy: the same is shown." in reasons
    assert any("fewer than 6" in limit for limit in found.limits)


def test_a_task_score_that_disagrees_is_in_the_headline(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", seeds=range(4), rows=0)
    for seed in range(4):
        record = json.loads((folder / "cells" / f"replay-s{seed}" / "results.json").read_text())
        record["scores"]["accuracy"]["R"][-1] = [0.1, 0.1, 0.1 + seed / 100]
        edit(folder, f"replay-s{seed}", scores=record["scores"])
    found = advice(folder)
    assert found.headline == "Take replay, but accuracy disagrees"
    assert "by accuracy it does not end better" in found.lead
    assert any("By accuracy: the opposite is shown" in reason for reason in found.reasons)


def test_nats_per_token_do_not_rank_tokenizers(tmp_path: Path) -> None:
    """The same text in more tokens: fewer nats per token, and no better a model."""
    folder = write_study(tmp_path / "s", seeds=range(4))
    for path in folder.glob("cells/replay-*/stages/*/scores.parquet"):
        frame = pl.read_parquet(path)
        more = {name: pl.col(name) * 2 for name in ("tokens", "weight")}
        frame.with_columns(**more).write_parquet(path)
    found = advice(folder)
    assert (found.headline, found.choice) == ("nll ranks nobody here", None)
    assert any("bits_per_byte" in limit for limit in found.limits)
    assert advice(folder, scorer="accuracy").headline.startswith("Take replay")


def test_the_baseline_can_win(tmp_path: Path) -> None:
    found = study(tmp_path, {"none": BASE, "x": [[5.0, 5.0], [4.0, 5.0], [4.0, 4.0]]})
    assert (found.headline, found.choice) == ("Stay with no mitigation", "none")
    # Forgetting nothing because nothing was learnt does not win, and is told.
    assert any("x forgets least" in reason and "learnt less" in reason for reason in found.reasons)


def test_a_lead_that_may_be_chance_is_no_recommendation(tmp_path: Path) -> None:
    matrices = {"none": BASE, "x": [[5.0, 5.0], [1.0, 5.0], [2.99, 1.0]]}
    folder = write_study(tmp_path / "s", matrices, domains=("a", "b"), seeds=(0, 1, 2), rows=0)
    for seed, shift in enumerate((0.3, -0.2, -0.25)):
        path = folder / "cells" / f"x-s{seed}" / "results.json"
        record = json.loads(path.read_text())
        record["scores"]["nll"]["R"][-1][0] += 2 * shift
        path.write_text(json.dumps(record))
    found = advice(folder)
    assert found.strength == "open"
    assert found.headline.startswith(("No clear winner", "Stay with"))


def test_whoever_is_told_the_domain_is_never_recommended(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", seeds=range(4))
    edit(folder, "replay-s0", task_id_at_test=True)
    found = advice(folder)
    assert found.headline == "Take mixing"
    assert any("Told the domain at test time" in limit and "replay" in limit for limit in found.limits)


def test_missing_cells_and_warnings_of_the_record_are_told(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", seeds=(0, 1), unfinished=("ewc-s1",))
    for seed in (0, 1):
        edit(folder, f"replay-s{seed}", warnings={"nll": ["learnt nothing on code"]})
    limits = " ".join(advice(folder).limits)
    assert "1 of 8 cells are not in these numbers: ewc-s1 (missing)" in limits
    assert "replay: learnt nothing on code" in limits


def test_scorers_that_disagree_are_told(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", rows=0)
    record = json.loads((folder / "cells" / "ewc-s0" / "results.json").read_text())
    record["scores"]["accuracy"]["R"][-1] = [0.99, 0.99, 0.99]
    edit(folder, "ewc-s0", scores=record["scores"])
    assert "Scores disagree: by accuracy ewc is ahead." in advice(folder).limits


def test_settings_are_compared_like_with_like(tmp_path: Path) -> None:
    """A method that was run in the easy setting only does not win by that."""
    folder = tmp_path / "s"
    easy, hard = [[5.0, 5.0], [0.5, 5.0], [0.6, 0.5]], [[9.0, 9.0], [4.0, 9.0], [6.0, 4.0]]
    cells = []
    for method, adapter, matrix in (
        ("none", "lora", easy),
        ("none", "full", hard),
        ("x", "lora", [[5.0, 5.0], [0.5, 5.0], [0.7, 0.5]]),
    ):
        axes = {"mitigation": method, "adapter": adapter}
        cell = f"{method}-{adapter}"
        cells.append({"id": cell, "axes": axes, "seed": 0})
        write_cell(folder / "cells" / cell, cell, matrix, axes, 0, ("a", "b"), spread=0, rows=0)
    (folder / "plan.json").write_text(json.dumps({"study": {"scorer": "nll"}, "cells": cells}))
    assert advice(folder).choice == "none"


def test_references_are_no_methods_but_tell_what_is_left(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s")
    plan = json.loads((folder / "plan.json").read_text())
    axes = {"reference": "joint"}
    plan["cells"].append({"id": "joint-s0", "axes": axes, "seed": 0, "reference": "joint"})
    names = ("medical", "legal", "code")
    write_cell(
        folder / "cells" / "joint-s0", "joint-s0", [[5.0] * 4, [0.5, 1.0, 0.9, 1.1]], axes, 0, ("all",), names, spread=0
    )
    (folder / "plan.json").write_text(json.dumps(plan))
    found = advice(folder)
    assert found.leader == "replay"
    assert any("Trained on all domains at once the model reaches 1.00" in reason for reason in found.reasons)


def test_nothing_done(tmp_path: Path) -> None:
    folder = write_study(tmp_path / "s", {"none": QUICKSTART["none"]}, unfinished=("none-s0",))
    assert advice(folder).strength == "none"


@pytest.mark.parametrize("scorer", ["nll", "accuracy"])
def test_both_directions(scorer: str, tmp_path: Path) -> None:
    assert advice(write_study(tmp_path / "s", seeds=range(4)), scorer=scorer).headline == "Take replay"

"""Several ranks learn what one does: states, history and scores."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from support.rank_runs import FLOAT32, Group, apart, run_row
from support.stop_and_resume import history

__all__ = ["KINDS", "SINGLE", "assert_equal_learning"]

EQUAL = 1e-10  # in float64
SINGLE = 1e-5  # in float32: see `FLOAT32`, the command's own runs, and what the history keeps
LEARNT = {EQUAL: 1e-6, SINGLE: 1e-4}
KINDS = {"a": "generative", "b": "label", "c": "generative"}


def assert_equal_learning(
    ranks: Group, backbone: Path, folder: Path, adapter: str, *names: str, **options: Any
) -> dict[str, Any]:
    """Weights, what is remembered, and scores of every stage, and every line of the history; the ranks' record."""
    equal = SINGLE if adapter in FLOAT32 else EQUAL
    row = {"backbone": backbone, "adapter": adapter, "mitigations": names, "steps": 3, "kinds": KINDS, **options}
    alone, shared = folder / "alone" / "run", folder / "shared" / "run"
    one = run_row({**row, "folder": alone}, ranks=1)
    many = ranks.record({**row, "folder": shared})
    far = {name: distance for name, distance in apart(alone, shared).items() if distance > equal}
    assert not far, f"{adapter} with {names} on {ranks.ranks} ranks: {far}"
    lines = [[(line["stage"], line["step"], line["tokens"]) for line in history(run)] for run in (alone, shared)]
    assert lines[0] == lines[1]
    losses = [[line["loss/task"] for line in history(run)] for run in (alone, shared)]
    assert losses[0] == pytest.approx(losses[1], rel=SINGLE)
    before, *after = (row[0] for row in one["scores"]["nll"]["R"])
    assert max(abs(value - before) for value in after) > LEARNT[equal], "something has been learnt"
    for scorer, found in one["scores"].items():
        for mine, theirs in zip(found["R"], many["scores"][scorer]["R"], strict=True):
            assert [x is None for x in mine] == [x is None for x in theirs]
            known = [x for x in mine if x is not None]
            assert [x for x in theirs if x is not None] == pytest.approx(known, rel=equal, abs=equal), scorer
    return many

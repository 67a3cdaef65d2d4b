"""Stages that were stored before the modules moved (commit 91a4eba): today's code goes on from them as that code did.

`golden/states.zip` has one stage of every adapter alone, and of every mitigation on LoRA (the row `rslora`), as that
commit's `save_tree` wrote it, with a summary of the weights that its second stage led to: their norm, and the values at
64 places spread evenly over all of them. `golden/write_states.py` wrote it; it runs on that commit only.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.tensor_files import load_tree
from residency.testing import write_backbone
from residency.testing.pairs import Pairs, Run
from table import ADAPTERS, MITIGATIONS

STATES = Path(__file__).parent / "golden" / "states.zip"
LORA = "rslora"
EXPECTED: dict[str, Any] = json.loads(zipfile.ZipFile(STATES).read("expected.json"))
# What goes on to other weights, and why: what the first stage has stored is read all the same.
CHANGED: dict[str, str] = {}


def names() -> list[str]:
    """Every row that there is today."""
    return [*(f"adapter/{name}" for name in ADAPTERS), *(f"mitigation/{name}" for name in MITIGATIONS)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    folder = tmp_path_factory.mktemp("golden")
    backbone = write_backbone(folder / "llama", width=16)
    return Pairs(backbone, folder / "pairs", adapters=ADAPTERS, mitigations=MITIGATIONS)


def summary(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As `write_states.py` makes it."""
    tensors = [weights[name].detach().double() for name in sorted(weights) if weights[name].is_floating_point()]
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    places = torch.linspace(0, len(flat) - 1, 64).long()
    return {"tensors": len(weights), "norm": float(flat.norm()), "values": flat[places].tolist()}


@pytest.mark.parametrize("row", EXPECTED)
def test_a_stage_of_before_goes_on(row: str, pairs: Pairs, tmp_path: Path) -> None:
    kind, _, name = row.partition("/")
    stored = zipfile.ZipFile(STATES).extract(f"{row}.safetensors", tmp_path)
    parts = {name: MITIGATIONS[name].make()} if kind == "mitigation" else {}
    adapter = LORA if parts else name
    torch.manual_seed(0)
    run = pairs.train(adapter, pairs.module(adapter, parts), after=Run(load_tree(Path(stored)), b"", {}))
    found, wanted = summary(run.final["weights"]), EXPECTED[row]
    assert found["tensors"] == wanted["tensors"]
    same = found["norm"] == pytest.approx(wanted["norm"], rel=1e-6)
    same = same and found["values"] == pytest.approx(wanted["values"], abs=1e-6)
    assert same is (row not in CHANGED), f"{row} goes on to {'the same' if same else 'other'} weights"


def test_every_row_of_before_is_there_or_is_named() -> None:
    """New rows have no stage of before; an old one does not vanish."""
    gone = {*EXPECTED} - {*names()}
    assert not gone, f"rows of before that are no more: {sorted(gone)}"
    assert {*CHANGED} <= {*EXPECTED}

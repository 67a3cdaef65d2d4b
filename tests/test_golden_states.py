"""What was stored before the modules moved (commit 91a4eba): today's code goes on from it as that code did.

`golden/states.zip` has one stage of every adapter alone, and of every mitigation on LoRA (the row `rslora`), as that
commit's `save_tree` wrote it, with a summary of the weights that its second stage led to; `golden/write_states.py` made
it and runs on that commit. `golden/run.zip` is a run of its `residency fit`: the tiny config of `support.cli` with 60
steps, one scorer and a checkpoint every 5 steps, ended by SIGTERM in its second stage; and the scores of the whole run.
"""

from __future__ import annotations

import json
import zipfile
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.tensor_files import load_tree
from residency.runs.folder import RunFolder
from residency.runs.kept_config import differences_today
from residency.testing import write_backbone, write_domain
from residency.testing.pairs import Pairs, Run
from support.cli import call, read_json
from support.tiny_sweeps import matrices, run_sweep
from table import ADAPTERS, MITIGATIONS

STATES = Path(__file__).parent / "golden" / "states.zip"
LORA = "rslora"
WIDE = ("vblora",)
EXPECTED: dict[str, Any] = json.loads(zipfile.ZipFile(STATES).read("expected.json"))
# Factors of LoRA that a mixer makes anew keep the gauge nearest to the remembered ones: other B and A, the same B A.
GAUGE = {f"mitigation/{name}" for name in ("dare", "intruder_reduction", "slerp", "soup", "task_arithmetic", "ties")}
GAUGE |= {"mitigation/weight_mixing"}
_DRAWS = "rehearsal ratios add over mitigations, so every source has draws of its own: other rows are replayed"
# What goes on to other weights on purpose, and why; what was stored is read all the same.
CHANGED = {
    **dict.fromkeys((f"mitigation/{name}" for name in ("replay", "replay_herding_loss", "replay_kmeans_mir")), _DRAWS),
    **dict.fromkeys(("mitigation/generative_replay", "mitigation/lamol"), _DRAWS),
    "mitigation/der": "its draws are per optimizer step, whatever the micro-batches",
}


# `make test` goes on from one of each way in which weights move and are protected, `make test-slow` from all.
SOME = ("adapter/full", "adapter/inc_lora", "adapter/qlora", "adapter/sinkhorn", "mitigation/ewc", "mitigation/gpm")
SOME += ("mitigation/replay", "mitigation/weight_mixing")


def names() -> list[str]:
    """Every row that there is today."""
    return [*(f"adapter/{name}" for name in ADAPTERS), *(f"mitigation/{name}" for name in MITIGATIONS)]


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Pairs]:
    """By the width of the model: 16, or 32 for adapters that need it."""
    folder = tmp_path_factory.mktemp("golden")
    widths = {width: write_backbone(folder / f"llama-{width}", width=width) for width in (16, 32)}
    rows: dict[str, Any] = {"adapters": ADAPTERS, "mitigations": MITIGATIONS}
    return {width: Pairs(model, folder / f"pairs-{width}", **rows) for width, model in widths.items()}


def summary(weights: dict[str, torch.Tensor], *, lora: bool) -> dict[str, Any]:
    """Of all weights together, and of the products B A of LoRA: their norm, and 64 values spread evenly over them."""
    tensors = [weights[name].detach().double() for name in sorted(weights) if weights[name].is_floating_point()]
    pairs = [(name, name.replace("lora_A", "lora_B")) for name in sorted(weights) if "lora_A" in name]
    factors = [weights[b].detach().double() @ weights[a].detach().double() for a, b in pairs] if lora else []
    products = _seen(factors) if lora else None
    return {"tensors": len(weights), "weights": _seen(tensors), "products": products}


def _seen(tensors: list[torch.Tensor]) -> list[float]:
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    places = torch.linspace(0, len(flat) - 1, 64).long()
    return [float(flat.norm()), *flat[places].tolist()]


@pytest.mark.parametrize("row", [pytest.param(row, marks=() if row in SOME else pytest.mark.slow) for row in EXPECTED])
def test_a_stage_of_before_goes_on(row: str, pairs: dict[int, Pairs], tmp_path: Path) -> None:
    kind, _, name = row.partition("/")
    stored = zipfile.ZipFile(STATES).extract(f"{row}.safetensors", tmp_path)
    parts = {name: MITIGATIONS[name].make()} if kind == "mitigation" else {}
    adapter = LORA if parts else name
    torch.manual_seed(0)
    source = pairs[32 if adapter in WIDE else 16]
    run = source.train(adapter, source.module(adapter, parts), after=Run(load_tree(Path(stored)), b"", {}))
    found, wanted = summary(run.final["weights"], lora=adapter == LORA), EXPECTED[row]
    assert found["tensors"] == wanted["tensors"]
    same = {part for part in ("weights", "products") if found[part] == pytest.approx(wanted[part], abs=1e-6)}
    expected = set() if row in CHANGED else {"products"} if row in GAUGE else {"weights", "products"}
    assert same == expected, f"{row}: what is the same today is {sorted(same)}"


def test_every_row_of_before_is_there_or_is_named() -> None:
    """New rows have no stage of before; an old one does not vanish."""
    gone = {*EXPECTED} - {*names()}
    assert not gone, f"rows of before that are no more: {sorted(gone)}"
    assert {*CHANGED, *GAUGE} <= {*EXPECTED}


@pytest.mark.parametrize("path", (STATES.parent / "class_paths.txt").read_text(encoding="utf-8").split())
def test_class_paths_of_before_are_those_of_today(path: str) -> None:
    """All that the presets of that commit named: a config that was written then is read as it is."""
    module, _, name = path.rpartition(".")
    assert getattr(import_module(module), name)


def test_a_run_that_was_begun_before_goes_on(tmp_path: Path) -> None:
    """From its checkpoint, by the command that the refusal of another config names; to the scores of the whole run."""
    zipfile.ZipFile(STATES.parent / "run.zip").extractall(tmp_path)
    write_backbone(tmp_path / "llama")
    for name, kind in {"a": "generative", "b": "label"}.items():
        write_domain(tmp_path / "data", name, kind=kind)
    config = tmp_path / "run" / "config.yaml"
    config.write_text(config.read_text(encoding="utf-8").replace("FOLDER", str(tmp_path)), encoding="utf-8")
    before = read_json(tmp_path / "run" / "stages" / "1-a" / "stage.json")
    done = call("fit", "--config", config, "--run_dir", tmp_path / "run")
    assert done.code == 0, done.err
    record = read_json(tmp_path / "run" / "results.json")
    assert read_json(tmp_path / "run" / "stages" / "1-a" / "stage.json") == before, "its first stage was taken"
    expected = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
    for row, wanted in zip(record["scores"]["nll"]["R"], expected, strict=True):
        assert row == pytest.approx(wanted, abs=1e-6)
    assert len([line for line in RunFolder(tmp_path / "run").history() if line["stage"] == 2]) == 60


def test_a_run_of_before_with_another_value_is_refused(tmp_path: Path) -> None:
    """What came later has its default; what the run was begun with must not change."""
    old = {"data": {"batch_size": 4}}
    assert differences_today(tmp_path / "none.yaml", old, {"data": {"batch_size": 8, "new": 1}}) == [
        "data.batch_size",
        "data.new",
    ]


def test_a_study_that_was_begun_before_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first record: the same command ends with the scores of the whole study.

    The code of the engine, of the backbone and of the adapter is part of every key (`runs.keys`: `environment`,
    `adapter`), as is what is hashed of a model's files; all of them have changed since, so that the three stages of
    that code are trained anew by this one, and none is taken for what this code would have made of it. What the store
    held stays as it was.
    """
    zipfile.ZipFile(STATES.parent / "study.zip").extractall(tmp_path)
    monkeypatch.chdir(tmp_path)  # where its paths begin
    write_backbone(tmp_path / "llama")
    for name, kind in {"a": "generative", "b": "label"}.items():
        write_domain(tmp_path / "data", name, kind=kind)
    assert not list(tmp_path.glob("study/cells/*/results.json"))
    before = {path: path.read_bytes() for path in tmp_path.glob("store/*/*/*")}
    code, out = run_sweep(Path("study.yaml"), Path("study"), store=Path("store"))
    assert code == 0, out
    expected = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))
    found = matrices(tmp_path / "study")
    assert {*found} == {*expected} == {"none-s0", "ewc-s0"}
    for name, scores in found.items():
        for row, wanted in zip(scores["nll"]["R"], expected[name], strict=True):
            assert row == pytest.approx(wanted, abs=1e-6)
    assert {path: path.read_bytes() for path in before} == before
    old = {path.parent.name for path in before if path.parts[-3] == "trained"}
    assert len(old) == 3
    assert len({path.name for path in tmp_path.glob("store/trained/*")} - old) == 3

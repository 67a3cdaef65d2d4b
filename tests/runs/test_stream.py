"""The record of a run: what is written when, what is refused, what is shared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from filelock import FileLock
from lightning.pytorch import Callback, Trainer

from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.engine.module import ContinualModule
from residency.mitigations import EWC, Replay
from residency.runs.folder import RunFolder
from residency.testing.tiny_runs import domains, train


def tiny_lora() -> Any:
    return lora(r=4, target_modules="all-linear")


@pytest.fixture(scope="module")
def finished(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], ContinualModule]:
    """A complete run with a probe."""
    folder = tmp_path_factory.mktemp("stream") / "run"
    probe = domains(folder.parent / "data", {"chat": "generative"})
    record, module = train(folder, llama, tiny_lora(), {"replay": Replay()}, data={"probes": probe})
    return folder, record, module


def test_record_is_as_the_design_says(finished: tuple[Path, dict[str, Any], ContinualModule]) -> None:
    folder, record, _ = finished
    stored = json.loads((folder / "results.json").read_text())
    assert stored.pop("schema") == 1
    # What makes the record a seal of the folder: tests/runs/test_damage.py.
    assert {"history.jsonl", "stages/0-base/stage.json"} <= stored.pop("files").keys()
    assert len(stored.pop("checksum")) == 64
    assert stored == json.loads(json.dumps(record))
    assert record["domains"] == ["a", "b", "c"]
    assert record["probes"] == ["chat"]
    assert record["status"] == "done"
    nll = record["scores"]["nll"]
    assert nll["higher_is_better"] is False
    assert [len(row) for row in nll["R"]] == [4] * 4, "row 0 and one per stage; domains and probes"
    assert all(isinstance(value, float) for row in nll["R"] for value in row)
    accuracy = record["scores"]["accuracy"]["R"]
    assert all(row[0] is None and row[1] is not None for row in accuracy), "no score is null, never 0"
    assert set(record["summary"]["nll"]) >= {"average", "learning", "bwt", "forgetting", "fwt"}
    assert record["provenance"]["fingerprints"]["data"].keys() == {"a", "b", "c", "chat"}
    assert record["cost"]["mitigation_state_bytes"]["replay"] > 0


def test_rows_of_scores_make_the_matrix(finished: tuple[Path, dict[str, Any], ContinualModule]) -> None:
    folder, record, _ = finished
    for k, name in enumerate(["0-base", "1-a", "2-b", "3-c"]):
        frame = pl.read_parquet(folder / "stages" / name / "scores.parquet")
        for column, domain in enumerate(["a", "b", "c", "chat"]):
            rows = frame.filter((pl.col("column") == domain) & (pl.col("scorer") == "nll"))
            assert len(rows) == 8
            mean = (rows["value"] * rows["tokens"]).sum() / rows["tokens"].sum()
            assert mean == pytest.approx(record["scores"]["nll"]["R"][k][column], abs=1e-9)


def test_history_has_every_step(finished: tuple[Path, dict[str, Any], ContinualModule]) -> None:
    folder, _, _ = finished
    lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
    assert [line["stream_step"] for line in lines] == list(range(1, 13))
    assert [(line["stage"], line["step"]) for line in lines] == [(k, s) for k in (1, 2, 3) for s in (1, 2, 3, 4)]
    assert all({"domain", "loss", "loss/task", "lr", "tokens"} <= set(line) for line in lines)


def test_a_complete_run_is_not_touched(
    finished: tuple[Path, dict[str, Any], ContinualModule], llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, record, _ = finished
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}
    monkeypatch.setattr(ContinualModule, "build", lambda self, seed: pytest.fail("a complete run loads no model"))
    again, _ = train(folder, llama, tiny_lora(), {"replay": Replay()})
    assert again["scores"] == record["scores"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != ".lock"}


def test_another_config_is_refused(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.keep_config({"model": {"lr": 1.0}, "name": "x"})
    run.complete_stage(run.stage(0, "base"), [], {"stage": 0})
    run.keep_config({"model": {"lr": 1.0}, "name": "renamed"})
    with pytest.raises(UserError, match=r"model\.lr"):
        run.keep_config({"model": {"lr": 2.0}, "name": "x"})


def test_a_run_in_use_is_refused(llama: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    with FileLock(folder / ".lock"), pytest.raises(UserError, match="in use"):
        train(folder, llama, tiny_lora())


def test_what_a_killed_process_left_half_written_is_removed(llama: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    stale = run / "stages" / "1-a" / ".state.safetensors.123-0a1b2c3d.tmp"
    mine = [run / ".bashrc.tmp", run / "sub" / ".editor.swp.tmp", run / "stages" / "1-a" / ".mine.tmp"]
    RunFolder(run).claim()
    for file in (stale, *mine):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(b"half")
    train(run, llama, tiny_lora(), steps=1, kinds={"a": "generative"})
    assert not stale.exists()
    assert all(file.read_bytes() == b"half" for file in mine)
    # Killed after the record of the stage, before what it was trained from was removed.
    (run / "results.json").unlink()
    (run / "stages" / "1-a" / "checkpoint.safetensors").write_bytes(b"of the last step but one")
    train(run, llama, tiny_lora(), steps=1, kinds={"a": "generative"})
    assert not (run / "stages" / "1-a" / "checkpoint.safetensors").exists()


class Diverge(Callback):
    """Breaks a weight."""

    def on_train_batch_start(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 1):
            with torch.no_grad():
                next(iter(module.adapter.trainable(module.model).values())).fill_(float("nan"))


def test_divergence_is_told_and_keeps_complete_stages(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage 2 \(b\)"):
        train(tmp_path / "run", llama, tiny_lora(), callbacks=[Diverge()])
    assert (tmp_path / "run" / "stages" / "1-a" / "stage.json").is_file()
    assert not (tmp_path / "run" / "results.json").exists()


def test_hostile_names_stay_inside_the_run(llama: Path, tmp_path: Path) -> None:
    hostile = {"../../x": "generative", "<script>alert(1)</script>": "label"}
    options = domains(tmp_path / "data", {"a": "generative", "b": "label"})
    named = dict(zip(hostile, options.values(), strict=True))
    record, _ = train(tmp_path / "run", llama, tiny_lora(), steps=1, data={"domains": named})
    assert record["domains"] == list(hostile)
    stages = {path.name for path in (tmp_path / "run" / "stages").iterdir()}
    assert stages == {"0-base", "1-x", "2-script_alert_1_script"}


def test_ewc_holds_the_weights_it_found_important(llama: Path, tmp_path: Path) -> None:
    """The stronger the pull, the less the first domain's weights move in later stages."""
    distances = []
    for strength in (0.0, 1e3, 1e6):
        mitigations = {"ewc": EWC(strength=strength, fisher_samples=8)}
        _, module = train(
            tmp_path / str(strength), llama, tiny_lora(), mitigations, kinds={"a": "generative", "b": "label"}
        )
        first = RunFolder(tmp_path / str(strength)).load_state(tmp_path / str(strength) / "stages" / "1-a")
        fisher, anchor = first["mitigations"]["ewc"]["precision"], first["weights"]
        now = module.adapter.state(module.model)
        distances.append(sum(float((fisher[n] * (now[n] - anchor[n]).square()).sum()) for n in anchor))
    assert distances[0] > distances[1] > distances[2]

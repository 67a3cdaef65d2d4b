"""W&B as a view: real offline runs. `records` reads their log back; wandb 0.31 ships no Python reader any more."""

from __future__ import annotations

import json
import re
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from residency.core.errors import UserError
from residency.report.page.build import Report
from residency.report.page.wandb_report import track_report
from residency.report.records.records import read_records
from residency.runs.views.flat_config import flat_config
from residency.runs.views.wandb_view import WandbSettings, WandbView
from support.synthetic_studies import write_study

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z0-9_]+)+")
CONFIG = {"adapter": "LoraConfig", "adapter.r": 8, "mitigation": "ewc", "seed": 0}
LOSSES = {"loss": 1.5, "loss/ewc/penalty": 0.01, "lr": 1e-3, "tokens": 512, "seconds": 0.5}
LINES = [{"stage": 1 + i // 3, "domain": "x", "step": 1 + i % 3, "stream_step": 1 + i} | LOSSES for i in range(6)]
ROWS = [{"nll": {"medical": 5.0 - k, "legal": 6.0 - k, "chat": 4.0}, "accuracy": {"medical": 0.2}} for k in range(3)]
RECORD: dict[str, Any] = {
    "domains": ["medical", "legal"],
    "probes": ["chat"],
    "scores": {"nll": {"higher_is_better": False, "R": [[5.0, 6.0, 4.0], [4.0, 5.0, 4.0], [3.0, 4.0, None]]}},
    "summary": {"nll": {"average": -3.5, "bwt": 1.0, "forgetting": -1.0, "fwt": None}},
}


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B's caches go to temporary folders."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WANDB_MODE", raising=False)
        patch.delenv("WANDB_DIR", raising=False)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(tmp_path_factory.mktemp("wandb-home")))
        yield


def view(run_dir: Path, *, settings: WandbSettings | None = None, **changed: Any) -> WandbView:
    parts = {"name": "ewc-s0", "flat_config": CONFIG, "domains": ["medical", "legal"], "probes": ["chat"]} | changed
    return WandbView(settings=settings or WandbSettings(), run_dir=run_dir, **parts)


def records(log: Path) -> Iterator[Any]:
    """A .wandb file: 7 bytes of header, then (checksum, length, type, data) per record; blocks of 32 KiB."""
    data, at = log.read_bytes(), 7
    assert len(data) < 32768, "one block, so that no record is split"
    while at < len(data):
        (length,) = struct.unpack_from("<H", data, at + 4)
        yield wandb_internal_pb2.Record.FromString(data[at + 7 : at + 7 + length])
        at += 7 + length


def read(folder: Path) -> Any:
    """What a run's log holds: run, config, history, summary, metrics, kinds of records, exit code."""
    found: dict[str, list[Any]] = {}
    for record in records(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    lines = [{i.key or i.nested_key[0]: json.loads(i.value_json) for i in h.item} for h in found.get("history", [])]
    return SimpleNamespace(
        folder=folder,
        run=found["run"][0],
        kinds=set(found),
        config={u.key: json.loads(u.value_json) for u in found["run"][0].config.update if u.key != "_wandb"},
        history=[{key: value for key, value in line.items() if not key.startswith("_")} for line in lines],
        summary={u.key: json.loads(u.value_json) for s in found["summary"] for u in s.update if u.key},
        metrics={m.name or m.glob_name: m.step_metric for m in found["metric"]},
        exit_code=found["exit"][0].exit_code,
    )


def runs(run_dir: Path) -> list[Any]:
    wandb.teardown()  # finish() returns before an offline log is wholly on disk; the end of W&B's service waits for it
    return [read(folder) for folder in (run_dir / "wandb").glob("offline-run-*")]


def series(run: Any, key: str, axis: str) -> list[Any]:
    return [(line[axis], line[key]) for line in run.history if key in line]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "nll.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    one = view(run_dir, settings=WandbSettings(project="study", group="ewc-mlc", tags=["t1"]))
    one.start()
    one.replay(LINES, ROWS)
    one.finish(RECORD, exit_code=0, heat_map=run_dir / "nll.png")
    return runs(run_dir)[0]


def test_every_key_and_no_other(seen: Any) -> None:
    run = seen.run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("study", "ewc-mlc", "train", "ewc-s0")
    assert ([*run.tags], seen.config, seen.exit_code) == (["t1"], CONFIG, 0)
    keys = {"stream/step", "stream/domain_index", "stream/domain", "R", "heat_map"} | {f"train/{k}" for k in LOSSES}
    keys |= {"eval/medical/nll", "eval/legal/nll", "eval/chat/nll", "eval/medical/accuracy"}
    assert {key for line in seen.history for key in line} == keys
    final = {key: value for key, value in seen.summary.items() if key.startswith("final/")}
    assert final == {"final/nll/average": -3.5, "final/nll/bwt": 1.0, "final/nll/forgetting": -1.0}


def test_curves_run_over_the_stream_and_never_restart(seen: Any) -> None:
    assert {k: v for k, v in seen.metrics.items() if v} == {"train/*": "stream/step", "eval/*": "stream/domain"}
    assert series(seen, "train/loss", "stream/step") == [(step, 1.5) for step in range(1, 7)]
    assert [y for _, y in series(seen, "stream/domain_index", "stream/step")] == [1, 1, 1, 2, 2, 2]
    assert series(seen, "eval/legal/nll", "stream/domain") == [(0, 6.0), (1, 5.0), (2, 4.0)]


def test_the_table_and_the_picture(seen: Any) -> None:
    table = json.loads(next(seen.folder.rglob("*.table.json")).read_text())
    assert table["columns"] == ["row", "after", "domain", "scorer", "score"]
    assert table["data"][0] == [0, "base", "medical", "nll", 5.0]
    assert table["data"][8] == [2, "legal", "chat", "nll", None]
    assert 'src="data:image/png;base64,iVBORw0KGgp' in next(seen.folder.rglob("*.html")).read_text()


def test_no_console_code_or_git_leaves_the_machine(seen: Any) -> None:
    assert not seen.kinds & {"output", "output_raw"}
    assert not seen.run.HasField("git")
    uploaded = {path.name for path in (seen.folder / "files").rglob("*") if path.is_file()}
    assert {name.split("_")[0] for name in uploaded} == {"requirements.txt", "R", "heat"}
    assert not [path for path in (seen.folder / "tmp").rglob("*") if path.is_file()]


def test_a_second_attempt_is_a_new_run_of_the_group_that_shows_everything(tmp_path: Path) -> None:
    first, second = view(tmp_path), view(tmp_path)
    first.start()
    first.replay(LINES[:2], ROWS[:1])
    first.finish(None, exit_code=75)
    second.start()
    second.replay(LINES[:5], ROWS[:2])
    second.log_step(LINES[5])
    second.log_row(2, ROWS[2])
    second.finish(RECORD, exit_code=0)
    stopped, whole = sorted(runs(tmp_path), key=lambda run: len(run.history))
    assert stopped.run.run_id != whole.run.run_id
    assert stopped.run.run_group == whole.run.run_group == "ewc-s0"
    assert (stopped.exit_code, whole.exit_code) == (75, 0)
    assert not any(key.startswith("final/") for key in stopped.summary)
    order = ["row" if "stream/domain" in line else line["stream/step"] for line in whole.history[:9]]
    assert order == ["row", 1, 2, 3, "row", 4, 5, 6, "row"]


@pytest.mark.parametrize("enabled", [True, False])
def test_switched_off_it_writes_nothing(enabled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled" if enabled else "offline")
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it would fail: nothing of W&B is touched
    assert "wandb" not in vars(
        sys.modules["residency.runs.views.wandb_view"]
    )  # nor was it when the module was imported
    off = view(tmp_path, settings=WandbSettings(enabled=enabled))
    off.start()
    off.replay(LINES, ROWS)
    off.finish(RECORD, exit_code=0)
    assert not [*tmp_path.iterdir()]


def test_wandb_dir_decides_where_and_a_live_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    one, two = view(tmp_path / "run"), view(tmp_path / "run")
    one.start()
    with pytest.raises(UserError, match="ewc-s0") as raised:
        two.start()
    two.finish(RECORD, exit_code=1)
    assert ("wandb.finish()" in raised.value.fix, wandb.run is None) == (True, False)  # the first was left alone
    one.finish(None, exit_code=0)
    assert [run.exit_code for run in runs(tmp_path / "elsewhere")] == [0]
    assert [path.name for path in tmp_path.iterdir()] == ["elsewhere"]


def test_a_start_that_fails_warns_once_and_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wandb, "init", lambda **_: 1 / 0)
    one = view(tmp_path)
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        one.start()
    one.replay(LINES, ROWS)  # a second warning would be an error
    one.finish(RECORD, exit_code=0)


def test_a_failure_midway_warns_once_and_the_run_is_still_ended(tmp_path: Path) -> None:
    one = view(tmp_path)
    one.start()
    one._run.log = lambda _: 1 / 0
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        one.log_row(0, ROWS[0])
    one.replay(LINES, ROWS)  # a second warning would be an error
    one.finish(RECORD, exit_code=3)
    assert wandb.run is None
    assert [run.exit_code for run in runs(tmp_path)] == [3]


def test_missing_scores_and_text_are_not_logged(tmp_path: Path) -> None:
    one = view(tmp_path)
    one.start()
    one.log_row(0, {"nll": {"medical": None, "legal": float("nan"), "chat": 1.0, "stranger": 2.0}})
    one.log_step({"stage": 1, "stream_step": 1, "loss": float("nan"), "note": "text", "flag": True, "lr": 0.5})
    one.finish(None, exit_code=0)
    rest = {"stream/step": 1, "stream/domain_index": 1, "train/lr": 0.5}
    assert runs(tmp_path)[0].history == [{"stream/domain": 0, "eval/chat/nll": 1.0}, rest]


def test_names_do_no_harm(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "../../x", "a b", "a_b", "医学", "..", "eval/*"]
    one = view(tmp_path / "run", name="../../[x]\n", domains=names[:4], probes=names[4:])
    one.start()
    one.log_row(0, {"n/l.l": {name: 1.0 + at for at, name in enumerate(names)}})
    one.log_step({"stage": 1, "stream_step": 1, "loss/../../<b>": 1.0})
    scores = {"scores": {"n/l.l": {"R": [[1.0] * 7] * 5}}, "summary": {"n/l.l": {"bwt": 0.5}}}
    one.finish({"domains": names[:4], "probes": names[4:]} | scores, exit_code=0)
    found = runs(tmp_path / "run")[0]
    keys = {key for line in found.history for key in line} - {"R"}
    assert all(map(KEY.fullmatch, keys))
    assert len([key for key in keys if key.startswith("eval/")]) == len(names)
    assert ("train/loss/unnamed/unnamed/b" in keys, found.summary["final/n_l_l/bwt"]) == (True, 0.5)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    table = json.loads(next(found.folder.rglob("*.table.json")).read_text())
    assert {row[2] for row in table["data"]} == {*names}  # data stays as it is


def test_the_report_of_a_study_is_one_run_of_its_group(tmp_path: Path) -> None:
    report = Report.of(read_records([write_study(tmp_path / "quick", rows=0, seeds=range(5))]))
    page = tmp_path / "out" / "index.html"
    page.parent.mkdir()
    page.write_text("<p>what to take, and why</p>")
    track_report(page, report.records, report.advice, report.frames.items(), project="study")
    (found,) = runs(tmp_path / "out")
    run = found.run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("study", "quick", "report", "quick report")
    assert found.config == {"scorer": "nll", "subject": "mitigation", "baseline": "none", "cells": 20}
    tables = {"first", "methods", "comparisons", "scores", "domains", "costs", "cells"}
    assert {key for line in found.history for key in line} == {f"report/{name}" for name in (*tables, "page")}
    facts = {key: value for key, value in found.summary.items() if key.split("/")[-1] not in {*tables, "page"}}
    facts = {key: value for key, value in facts.items() if not key.startswith("_")}
    metrics = {"average", "learning", "forgetting", "bwt", "fwt"}
    names = {f"report/{name}" for name in ("choice", "evidence", "headline", "count", "missing")}
    assert {*facts} == names | {f"final/nll/{name}" for name in metrics}
    assert (facts["report/choice"], facts["report/count"], facts["report/missing"]) == ("replay", 20, 0)
    methods = json.loads(next(found.folder.rglob("methods_*.table.json")).read_text())
    assert "replay" in [row[methods["columns"].index("method")] for row in methods["data"]]
    assert next(found.folder.rglob("page_*.html")).read_bytes() == page.read_bytes()


def test_flat_config_is_short_and_complete() -> None:
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 8, "target_modules": ["q", "v"], "layers": None}}
    ewc, kd = {"class_path": "a.EWC", "init_args": {"strength": 1.0}}, {"class_path": "a.KD"}
    model = {
        "adapter": {"class_path": "residency.adapters.Peft", "init_args": {"config": lora}},
        "mitigations": {"ewc": ewc, "my.kd": kd},
        "backbone": {"class_path": "residency.backbones.CausalLM", "init_args": {"path": "/some/where/smol"}},
    }
    law = {"class_path": "a.Jsonl", "init_args": {"a": {"b": {"c": 1}}, "d": {"e": 2}}}
    data = {"domains": {"law": law, "code": {"class_path": "a.Code"}}, "order": ["code", "law"], "batch_size": 8}
    rest = {"name": "run", "wandb": {"project": "study"}, "run_dir": "/some/where", "evaluation": {"x": "y" * 500}}
    config = rest | {"seed_everything": 3, "trainer": {"max_steps": 20, "logger": False}, "model": model, "data": data}
    assert flat_config({"fit": config}) == flat_config(config)
    assert flat_config(config) == (
        {"seed": 3, "batch_size": 8, "trainer.max_steps": 20, "trainer.logger": False}
        | {"stream": "code,law", "domain.law": "Jsonl", "domain.law.d.e": 2, "domain.code": "Code"}
        | {"mitigation": "ewc+my_kd", "mitigation.ewc": "EWC", "mitigation.ewc.strength": 1.0, "mitigation.my_kd": "KD"}
        | {"adapter": "LoraConfig", "adapter.r": 8, "adapter.target_modules": "q,v"}
        | {"backbone": "CausalLM", "backbone.path": "smol"}
    )
    bare = flat_config({"data": {"domains": {"law": law}, "order": None}, "model": {"mitigations": None}})
    assert (bare["mitigation"], bare["stream"]) == ("none", "law")

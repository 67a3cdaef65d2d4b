"""W&B as a view: real offline runs, read back from their files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb

from residency.core.errors import UserError
from residency.report.page.build import Report
from residency.report.page.wandb_report import track_report
from residency.report.records.records import read_records
from residency.runs.views.flat_config import flat_config
from residency.runs.views.wandb_journal import JOURNAL
from residency.runs.views.wandb_settings import WandbSettings
from residency.runs.views.wandb_view import WandbView
from support.synthetic_studies import write_study
from support.wandb_logs import fragments, series, temporary_home

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z0-9_]+)+")
CONFIG = {"adapter": "LoraConfig", "adapter.r": 8, "mitigation": "ewc", "seed": 0}
LOSSES = {"loss": 1.5, "loss/ewc/penalty": 0.01, "lr": 1e-3, "tokens": 512, "seconds": 0.5}
LINES = [
    {"stage": 1 + i // 3, "domain": "x", "step": 1 + i % 3, "stream_step": 1 + i, "time": 1.7e9 + i} | LOSSES
    for i in range(6)
]
ROWS = [{"nll": {"medical": 5.0 - k, "legal": 6.0 - k, "chat": 4.0}, "accuracy": {"medical": 0.2}} for k in range(3)]
RECORD: dict[str, Any] = {
    "cell": "ewc-s0",
    "domains": ["medical", "legal"],
    "probes": ["chat"],
    "scores": {"nll": {"higher_is_better": False, "R": [[5.0, 6.0, 4.0], [4.0, 5.0, 4.0], [3.0, 4.0, None]]}},
    "summary": {"nll": {"average": -3.5, "bwt": 1.0, "forgetting": -1.0, "fwt": None}},
    "general": {"nll": {"deltas": {"chat": -0.5}, "mean": -0.5, "minimum": -0.5, "worst": "chat", "missing": []}},
    "cost": {"train_seconds": 12.5, "evaluation_seconds": 2.0, "mitigation_state_bytes": {"ewc": 4096}},
    "provenance": {"fingerprints": {"data": {"medical": "abc"}}, "licences": {"medical": "MIT"}},
}


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B's caches go to temporary folders."""
    with pytest.MonkeyPatch.context() as patch:
        temporary_home(patch, tmp_path_factory.mktemp("wandb-home"))
        yield


def view(run_dir: Path, *, settings: WandbSettings | None = None, **changed: Any) -> WandbView:
    parts = {"name": "ewc-s0", "flat_config": CONFIG, "domains": ["medical", "legal"], "probes": ["chat"]} | changed
    parts = {"directions": {"nll": False, "accuracy": True}} | parts
    return WandbView(settings=settings or WandbSettings(), run_dir=run_dir, **parts)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One whole run."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "nll.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    one = view(run_dir, settings=WandbSettings(project="study", group="ewc-mlc", tags=["t1"]))
    one.start()
    one.replay(LINES, ROWS)
    one.finish(RECORD, exit_code=0, heat_map=run_dir / "nll.png")
    return fragments(run_dir)[0]


def test_every_key_and_no_other(seen: Any) -> None:
    run = seen.run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("study", "ewc-mlc", "train", "ewc-s0")
    assert ([*run.tags], seen.config, seen.exit_code) == (["t1"], CONFIG, 0)
    keys = {"stream/step", "stream/domain_index", "stream/domain", "R", "heat_map", "state_bytes"} | {
        f"train/{k}" for k in LOSSES
    }
    keys |= {"eval/medical/nll", "eval/legal/nll", "eval/chat/nll", "eval/medical/accuracy"}
    assert {key for line in seen.history for key in line} == keys
    final = {key: value for key, value in seen.summary.items() if key.startswith("final/")}
    general = {"final/general/nll/chat": -0.5, "final/general/nll/mean": -0.5, "final/general/nll/minimum": -0.5}
    cost = {"final/cost/train_seconds": 12.5, "final/cost/evaluation_seconds": 2.0}
    scores = {"final/nll/average": -3.5, "final/nll/bwt": 1.0, "final/nll/forgetting": -1.0}
    assert final == scores | general | cost


def test_curves_run_over_the_stream_and_never_restart(seen: Any) -> None:
    axes = {name: metric.step_metric for name, metric in seen.metrics.items() if metric.step_metric}
    assert (axes.pop("train/*"), axes.pop("eval/*")) == ("stream/step", "stream/domain")
    assert {*axes.values()} == {"stream/domain"}
    assert series(seen, "train/loss", "stream/step") == [(step, 1.5) for step in range(1, 7)]
    assert [y for _, y in series(seen, "stream/domain_index", "stream/step")] == [1, 1, 1, 2, 2, 2]
    assert series(seen, "eval/legal/nll", "stream/domain") == [(0, 6.0), (1, 5.0), (2, 4.0)]


def test_every_line_has_its_own_time(seen: Any) -> None:
    told = [time for time, line in zip(seen.times, seen.history, strict=True) if "train/loss" in line]
    assert told == [1.7e9 + i for i in range(6)]


def test_the_summary_knows_which_value_is_the_best(seen: Any) -> None:
    kinds = {name: metric.summary for name, metric in seen.metrics.items() if name.startswith("eval/medical/")}
    assert (kinds["eval/medical/nll"].min, kinds["eval/medical/nll"].max) == (True, False)
    assert (kinds["eval/medical/accuracy"].min, kinds["eval/medical/accuracy"].max) == (False, True)
    assert all(kind.last for kind in kinds.values())


def test_the_table_and_the_picture(seen: Any) -> None:
    table = json.loads(next(seen.folder.rglob("R_*.table.json")).read_text())
    assert table["columns"] == ["row", "after", "domain", "scorer", "score"]
    assert table["data"][0] == [0, "base", "medical", "nll", 5.0]
    assert table["data"][8] == [2, "legal", "chat", "nll", None]
    assert 'src="data:image/png;base64,iVBORw0KGgp' in next(seen.folder.rglob("*.html")).read_text()


def test_no_console_code_or_git_leaves_the_machine(seen: Any) -> None:
    assert not seen.kinds & {"output", "output_raw"}
    assert not seen.run.HasField("git")
    uploaded = {path.name for path in (seen.folder / "files").rglob("*") if path.is_file()}
    assert {name.split("_")[0] for name in uploaded} == {"requirements.txt", "R", "heat", "state"}
    assert not [path for path in (seen.folder / "tmp").rglob("*") if path.is_file()]


def test_a_second_attempt_goes_on_with_the_same_run_and_tells_nothing_twice(tmp_path: Path) -> None:
    first, second = view(tmp_path), view(tmp_path)
    first.start()
    first.replay(LINES[:2], ROWS[:1])
    first.finish(None, exit_code=75)
    second.start()
    second.replay(LINES[:5], ROWS[:2])
    second.log_step(LINES[5])
    second.log_row(2, ROWS[2])
    second.finish(RECORD, exit_code=0)
    stopped, whole = fragments(tmp_path)
    assert stopped.folder != whole.folder
    assert stopped.run.run_id == whole.run.run_id
    assert (stopped.run.resumed or stopped.run.resume, whole.run.resume) == (True, True)
    assert stopped.run.run_group == whole.run.run_group == "ewc-s0"
    assert (stopped.exit_code, whole.exit_code) == (75, 0)
    assert not any(key.startswith("final/") for key in stopped.summary)
    assert [step for step, _ in series([stopped, whole], "train/loss", "stream/step")] == [1, 2, 3, 4, 5, 6]
    assert [row for row, _ in series([stopped, whole], "eval/medical/nll", "stream/domain")] == [0, 1, 2]


def test_another_folder_is_another_run_also_of_the_same_name(tmp_path: Path) -> None:
    for name in "ab":
        one = view(tmp_path / name)
        one.start()
        one.finish(None, exit_code=0)
    assert len({part.run.run_id for part in fragments(tmp_path)}) == 2


def test_two_processes_do_not_write_to_one_run_at_once(tmp_path: Path) -> None:
    """Who comes second leaves it, and what it would have said is told by the next one."""
    first, second = view(tmp_path), view(tmp_path)
    assert first.journal.open(wait=0.0)
    assert not second.start(wait=0.0)
    second.log_row(0, ROWS[0])
    first.journal.close()
    assert second.start(wait=0.0)
    second.replay([], ROWS[:1])
    second.finish(None, exit_code=0)
    (found,) = fragments(tmp_path)
    assert series(found, "eval/medical/nll", "stream/domain") == [(0, 5.0)]


def test_what_a_killed_process_told_is_told_again(tmp_path: Path) -> None:
    """Its file may lack the end, or everything: the fragment goes, and nothing is there twice."""
    one = view(tmp_path)
    one.start()
    one.replay(LINES[:2], ROWS[:1])
    one.finish(None, exit_code=0)
    killed = view(tmp_path)
    killed.start()
    killed.log_step(LINES[2])
    killed._run.finish()
    killed.journal._lock.release()  # as the end of its process would
    path = tmp_path / JOURNAL
    path.write_bytes(path.read_bytes()[:-5])
    again = view(tmp_path)
    again.start()
    again.log_step(LINES[3])
    again.replay(LINES[:4], ROWS[:2])
    again.finish(None, exit_code=0)
    parts = fragments(tmp_path)
    assert len({part.run.run_id for part in parts}) == 1
    assert sorted(step for step, _ in series(parts, "train/loss", "stream/step")) == [1, 2, 3, 4]
    assert [row for row, _ in series(parts, "eval/medical/nll", "stream/domain")] == [0, 1]


def test_runs_of_a_study_are_filed_under_it() -> None:
    place = WandbSettings(study="rank", group="ewc", tags=["mine"]).place("ewc-s0")
    assert (place.project, place.group, place.tags) == ("rank", "rank: ewc", ("rank", "mine"))
    assert WandbSettings(study="rank", project="lab").place("ewc-s0").project == "lab"
    alone = WandbSettings().place("run")
    assert (alone.project, alone.group, alone.tags) == ("residency", "run", ())


def test_weights_and_data_are_artifacts_with_their_lineage(tmp_path: Path) -> None:
    for k, (domain, size) in enumerate((("medical", 100), ("legal", 3000)), start=1):
        stage = tmp_path / "stages" / f"{k}-{domain}"
        stage.mkdir(parents=True)
        (stage / "state.safetensors").write_bytes(b"x" * size)
        (stage / "stage.json").write_text("{}")
    one = view(tmp_path, settings=WandbSettings(study="rank", artifact_mb=0.001))
    one.start()
    one.finish(RECORD, exit_code=0)
    (found,) = fragments(tmp_path)
    inputs = {a.name: a for a in found.artifacts if a.use_after_commit}
    outputs = [a for a in found.artifacts if not a.use_after_commit and a.type == "adapter"]
    assert {*inputs} == {"rank-data-medical", "rank-data-legal", "rank-data-chat"}
    assert json.loads(inputs["rank-data-medical"].metadata)["fingerprint"] == "abc"
    (adapter,) = outputs  # the other one is larger than the limit
    assert (adapter.name, {*adapter.aliases}) == ("rank-ewc-s0", {"latest", "stage-1"})
    assert {file.path for file in adapter.manifest.contents} == {"state.safetensors", "stage.json"}
    assert json.loads(adapter.metadata)["domain"] == "medical"


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
    assert [run.exit_code for run in fragments(tmp_path / "elsewhere")] == [0]
    assert not (tmp_path / "run" / "wandb").exists()


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
    one._run.log = lambda *_, **__: 1 / 0
    with pytest.warns(RuntimeWarning, match="ZeroDivisionError"):
        one.log_row(0, ROWS[0])
    one.replay(LINES, ROWS)  # a second warning would be an error
    one.finish(RECORD, exit_code=3)
    assert wandb.run is None
    assert [run.exit_code for run in fragments(tmp_path)] == [3]


def test_missing_scores_and_text_are_not_logged(tmp_path: Path) -> None:
    one = view(tmp_path)
    one.start()
    one.log_row(0, {"nll": {"medical": None, "legal": float("nan"), "chat": 1.0, "stranger": 2.0}})
    one.log_step({"stage": 1, "stream_step": 1, "loss": float("nan"), "note": "text", "flag": True, "lr": 0.5})
    one.finish(None, exit_code=0)
    rest = {"stream/step": 1, "stream/domain_index": 1, "train/lr": 0.5}
    assert fragments(tmp_path)[0].history == [{"stream/domain": 0, "eval/chat/nll": 1.0}, rest]


def test_names_do_no_harm(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "../../x", "a b", "a_b", "医学", "..", "eval/*"]
    one = view(tmp_path / "run", name="../../[x]\n", domains=names[:4], probes=names[4:])
    one.start()
    one.log_row(0, {"n/l.l": {name: 1.0 + at for at, name in enumerate(names)}})
    one.log_step({"stage": 1, "stream_step": 1, "loss/../../<b>": 1.0})
    scores = {"cell": "../x", "scores": {"n/l.l": {"R": [[1.0] * 7] * 5}}, "summary": {"n/l.l": {"bwt": 0.5}}}
    one.finish({"domains": names[:4], "probes": names[4:]} | scores, exit_code=0)
    found = fragments(tmp_path / "run")[0]
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
    track_report(page, report.records, report.advice, report.frames.items(), settings=WandbSettings(project="study"))
    (found,) = fragments(tmp_path / "out")
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

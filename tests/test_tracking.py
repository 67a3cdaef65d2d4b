"""W&B as a view: real offline runs, whose log files are read back record by record.

wandb 0.31 ships no reader of its log in Python any more, so `records` reads it: a LevelDB log of protobuf records.
"""

from __future__ import annotations

import json
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from residency.errors import UserError
from residency.tracking import WandbSettings, WandbView, flat_config

KEY = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(/[A-Za-z0-9_]+)+")
PNG = b"\x89PNG\r\n\x1a\nnot really"
CONFIG = {"adapter": "LoraConfig", "adapter.r": 8, "mitigation": "ewc", "seed": 0}


@pytest.fixture(scope="module", autouse=True)
def _own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """W&B's caches go to a temporary folder, its service process ends with the tests, and it finds no account."""
    home = tmp_path_factory.mktemp("wandb-home")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_RUN_GROUP", "WANDB_API_KEY"):
            patch.delenv(name, raising=False)
        for name in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR", "WANDB_CONFIG_DIR"):
            patch.setenv(name, str(home))
        patch.setenv("NETRC", str(home / "netrc"))
        yield
        wandb.teardown()


def view(run_dir: Path, *, name: str = "ewc-s0", settings: WandbSettings | None = None, **changed: Any) -> WandbView:
    parts = {"flat_config": CONFIG, "domains": ["medical", "legal"], "probes": ["chat"]} | changed
    return WandbView(settings=settings or WandbSettings(), run_dir=run_dir, name=name, **parts)


def history() -> list[dict[str, Any]]:
    return [
        {
            "stage": 1 + step // 3,
            "domain": ("medical", "legal")[step // 3],
            "step": 1 + step % 3,
            "stream_step": step + 1,
            "loss": 2.0 - 0.1 * step,
            "loss/ewc/penalty": 0.01 * step,
            "lr": 1e-3,
            "tokens": 512,
            "seconds": 0.5,
        }
        for step in range(6)
    ]


ROWS = [
    {"nll": {"medical": 5.0 - row, "legal": 6.0 - row, "chat": 4.0}, "accuracy": {"medical": 0.2}} for row in range(3)
]
RECORD = {
    "cell": "ewc-s0",
    "domains": ["medical", "legal"],
    "probes": ["chat"],
    "scores": {"nll": {"higher_is_better": False, "R": [[5.0, 6.0, 4.0], [4.0, 5.0, 4.0], [3.0, 4.0, None]]}},
    "summary": {"nll": {"average": -3.5, "bwt": 1.0, "forgetting": -1.0, "fwt": None}},
}


# -- reading back -------------------------------------------------------------------------------------------------


def records(log: Path) -> Iterator[Any]:
    """The records of a .wandb file: 7 bytes of header, then blocks of 32 KiB of (checksum, length, type, data)."""
    data, at, parts = log.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            parts = b""
            yield record


@dataclass
class Seen:
    """What a run's log holds."""

    run: Any
    config: dict[str, Any]
    history: list[dict[str, Any]]
    summary: dict[str, Any]
    metrics: dict[str, str]
    kinds: set[str]
    exit_code: int | None
    folder: Path

    def series(self, key: str, axis: str) -> list[tuple[float, float]]:
        return [(line[axis], line[key]) for line in self.history if key in line]


def read(folder: Path) -> Seen:
    found: dict[str, list[Any]] = {}
    for record in records(next(folder.glob("*.wandb"))):
        kind = record.WhichOneof("record_type")
        found.setdefault(kind, []).append(getattr(record, kind))
    run = found["run"][0]
    lines = []
    for entry in found.get("history", []):
        items = {i.key or "/".join(i.nested_key[:1]): json.loads(i.value_json) for i in entry.item}
        lines.append({key: value for key, value in items.items() if not key.startswith("_")})
    updates = [u for s in found.get("summary", []) for u in s.update]
    return Seen(
        run=run,
        config={u.key: json.loads(u.value_json) for u in run.config.update if u.key != "_wandb"},
        history=lines,
        summary={u.key: json.loads(u.value_json) for u in updates if u.key},
        metrics={m.name or m.glob_name: m.step_metric for m in found.get("metric", [])},
        kinds=set(found),
        exit_code=found["exit"][0].exit_code if "exit" in found else None,
        folder=folder,
    )


def runs(run_dir: Path) -> list[Seen]:
    return [read(folder) for folder in sorted((run_dir / "wandb").glob("offline-run-*"))]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """One whole run."""
    run_dir = tmp_path_factory.mktemp("run")
    (run_dir / "nll.png").write_bytes(PNG)
    one = view(run_dir, settings=WandbSettings(project="study", group="ewc-mlc", tags=["t1"]))
    one.start()
    one.log_row(0, ROWS[0])
    for line in history():
        one.log_step(line)
        if line["step"] == 3:
            one.log_row(line["stage"], ROWS[line["stage"]])
    one.finish(RECORD, exit_code=0, heat_map=run_dir / "nll.png")
    (found,) = runs(run_dir)
    return found


# -- one run ------------------------------------------------------------------------------------------------------


def test_project_group_tags_and_config(seen: Seen) -> None:
    run = seen.run
    assert (run.project, run.run_group, run.job_type, run.display_name) == ("study", "ewc-mlc", "train", "ewc-s0")
    assert [*run.tags] == ["t1"]
    assert seen.config == CONFIG
    assert seen.exit_code == 0


def test_every_key_and_no_other(seen: Seen) -> None:
    keys = {"stream/step", "stream/domain_index", "stream/domain", "R", "heat_map"}
    keys |= {"train/loss", "train/loss/ewc/penalty", "train/lr", "train/tokens", "train/seconds"}
    keys |= {"eval/medical/nll", "eval/legal/nll", "eval/chat/nll", "eval/medical/accuracy"}
    assert {key for line in seen.history for key in line} == keys
    assert {key for key in seen.summary if key.startswith("final/")} == {
        "final/nll/average",
        "final/nll/bwt",
        "final/nll/forgetting",
    }
    assert seen.summary["final/nll/forgetting"] == -1.0


def test_curves_run_over_the_stream_and_never_restart(seen: Seen) -> None:
    assert seen.metrics == {
        "stream/step": "",
        "stream/domain": "",
        "train/*": "stream/step",
        "eval/*": "stream/domain",
    }
    loss = seen.series("train/loss", "stream/step")
    assert loss == [(line["stream_step"], pytest.approx(line["loss"])) for line in history()]
    assert [y for _, y in seen.series("stream/domain_index", "stream/step")] == [1, 1, 1, 2, 2, 2]
    assert seen.series("eval/legal/nll", "stream/domain") == [(0, 6.0), (1, 5.0), (2, 4.0)]


def test_the_table_and_the_picture(seen: Seen) -> None:
    (file,) = seen.folder.rglob("*.table.json")
    table = json.loads(file.read_text())
    assert table["columns"] == ["row", "after", "domain", "scorer", "score"]
    assert len(table["data"]) == 9
    assert table["data"][0] == [0, "base", "medical", "nll", 5.0]
    assert table["data"][-1] == [2, "legal", "chat", "nll", None]
    (page,) = seen.folder.rglob("*.html")
    assert 'src="data:image/png;base64,iVBORw0KGgp' in page.read_text()


def test_no_console_code_or_git_leaves_the_machine(seen: Seen) -> None:
    assert not seen.kinds & {"output", "output_raw"}
    assert not seen.run.HasField("git")
    uploaded = {path.name for path in (seen.folder / "files").rglob("*") if path.is_file()}
    assert {name.split("_")[0] for name in uploaded} == {"requirements.txt", "R", "heat"}
    assert not [path for path in (seen.folder / "tmp").rglob("*") if path.is_file()]


# -- attempts -----------------------------------------------------------------------------------------------------


def test_a_second_attempt_is_a_new_run_of_the_group_that_shows_everything(tmp_path: Path) -> None:
    first = view(tmp_path)
    first.start()
    first.log_row(0, ROWS[0])
    for line in history()[:2]:
        first.log_step(line)
    first.finish(None, exit_code=75)

    second = view(tmp_path)
    second.start()
    second.replay(history()[:5], ROWS[:2])
    second.log_step(history()[5])
    second.log_row(2, ROWS[2])
    second.finish(RECORD, exit_code=0)

    stopped, whole = sorted(runs(tmp_path), key=lambda run: len(run.history))
    assert stopped.run.run_id != whole.run.run_id
    assert stopped.run.run_group == whole.run.run_group == "ewc-s0"
    assert (stopped.exit_code, whole.exit_code) == (75, 0)
    assert not any(key.startswith("final/") for key in stopped.summary)
    assert [x for x, _ in whole.series("train/loss", "stream/step")] == [1, 2, 3, 4, 5, 6]
    assert [x for x, _ in whole.series("eval/medical/nll", "stream/domain")] == [0, 1, 2]
    # In the order of the stream: row 0, stage 1, row 1, stage 2, row 2.
    order = ["row" if "stream/domain" in line else line["stream/domain_index"] for line in whole.history[:9]]
    assert order == ["row", 1, 1, 1, "row", 2, 2, 2, "row"]


@pytest.mark.parametrize("how", ["settings", "environment"])
def test_switched_off_it_writes_nothing(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if how == "environment":
        monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.setattr(wandb, "init", lambda **_: pytest.fail("W&B was called"))
    off = view(tmp_path, settings=WandbSettings(enabled=how == "environment"))
    off.start()
    off.replay(history(), ROWS)
    off.finish(RECORD, exit_code=0)
    assert not [*tmp_path.iterdir()]


def test_wandb_dir_decides_where(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_DIR", str(tmp_path / "elsewhere"))
    one = view(tmp_path / "run")
    one.start()
    one.finish(None, exit_code=0)
    assert len(runs(tmp_path / "elsewhere")) == 1
    assert not (tmp_path / "run").exists()


# -- trouble ------------------------------------------------------------------------------------------------------


def test_a_live_run_is_refused_and_left_alone(tmp_path: Path) -> None:
    other = wandb.init(mode="offline", dir=tmp_path, name="foreign", settings=wandb.Settings(silent=True))
    try:
        one = view(tmp_path / "run")
        with pytest.raises(UserError, match="foreign") as raised:
            one.start()
        assert "wandb.finish()" in raised.value.fix
        one.finish(RECORD, exit_code=1)
        assert wandb.run is other
    finally:
        other.finish()


def test_online_without_an_account_warns_once_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("No API key configured")

    monkeypatch.setattr(wandb, "init", refuse)
    one = view(tmp_path)
    with pytest.warns(RuntimeWarning, match="No API key configured"):
        one.start()
    one.replay(history(), ROWS)  # a second warning would be an error
    one.finish(RECORD, exit_code=0)


def test_a_failure_midway_warns_once_and_the_run_is_still_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        ended: int | None = None

        def define_metric(self, *_: object, **__: object) -> None: ...

        def log(self, _: object) -> None:
            raise OSError("disk full")

        def finish(self, exit_code: int) -> None:
            self.ended = exit_code
            raise OSError("disk full")

    broken = Broken()
    monkeypatch.setattr(wandb, "init", lambda **_: broken)
    one = view(tmp_path)
    one.start()
    with pytest.warns(RuntimeWarning, match="disk full"):
        one.log_row(0, ROWS[0])
    one.replay(history(), ROWS)  # a second warning would be an error
    one.finish(RECORD, exit_code=3)
    assert broken.ended == 3


def test_a_record_that_cannot_be_shown_does_not_keep_the_run_open(tmp_path: Path) -> None:
    odd = {"domains": None, "summary": {}}
    one = view(tmp_path)
    one.start()
    with pytest.warns(RuntimeWarning, match="TypeError"):
        one.finish(odd, exit_code=0)
    assert wandb.run is None
    assert runs(tmp_path)[0].exit_code == 0


def test_missing_scores_are_not_logged(tmp_path: Path) -> None:
    one = view(tmp_path)
    one.start()
    one.log_row(0, {"nll": {"medical": None, "legal": float("nan"), "chat": 1.0, "stranger": 2.0}})
    one.log_step({"stage": 1, "stream_step": 1, "loss": float("nan"), "note": "text", "flag": True, "lr": 0.5})
    one.finish(None, exit_code=0)
    assert runs(tmp_path)[0].history == [
        {"stream/domain": 0, "eval/chat/nll": 1.0},
        {"stream/step": 1, "stream/domain_index": 1, "train/lr": 0.5},
    ]


def test_names_do_no_harm(tmp_path: Path) -> None:
    names = ["<script>alert(1)</script>", "../../x", "a b", "a_b", "医学", "..", "eval/*"]
    one = view(tmp_path / "run", name="../../[x]\n", domains=names[:4], probes=names[4:])
    one.start()
    one.log_row(0, {"n/l.l": {name: 1.0 + at for at, name in enumerate(names)}})
    one.log_step({"stage": 1, "stream_step": 1, "loss/../../<b>": 1.0})
    matrix = [[1.0] * 7 for _ in range(5)]
    record = {"domains": names[:4], "probes": names[4:], "scores": {"n/l.l": {"R": matrix}}}
    one.finish(record | {"summary": {"n/l.l": {"bwt": 0.5}}}, exit_code=0)
    (found,) = runs(tmp_path / "run")
    keys = {key for line in found.history for key in line} - {"R"}
    assert all(KEY.fullmatch(key) for key in keys)
    assert len([key for key in keys if key.startswith("eval/")]) == len(names)
    assert "train/loss/unnamed/unnamed/b" in keys
    assert found.summary["final/n_l_l/bwt"] == 0.5
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    (file,) = found.folder.rglob("*.table.json")
    assert {row[2] for row in json.loads(file.read_text())["data"]} == {*names}  # data stays as it is


# -- without W&B --------------------------------------------------------------------------------------------------


def test_importing_the_module_does_not_import_wandb() -> None:
    code = "import sys, residency.tracking; sys.exit('wandb' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_settings_are_documented_options() -> None:
    documented = re.findall(r"^ {8}(\w+):", WandbSettings.__doc__ or "", flags=re.MULTILINE)
    assert documented == [f.name for f in fields(WandbSettings)]


def resolved() -> dict[str, Any]:
    lora = {"class_path": "peft.LoraConfig", "init_args": {"r": 8, "target_modules": ["q", "v"], "layers": None}}
    return {
        "seed_everything": 3,
        "name": "run",
        "trainer": {"max_steps": 20, "accelerator": "auto", "callbacks": None},
        "model": {
            "adapter": {"class_path": "residency.adapters.Peft", "init_args": {"config": lora}},
            "mitigations": {
                "ewc": {"class_path": "residency.mitigations.EWC", "init_args": {"strength": 100.0}},
                "my.replay": {"class_path": "residency.mitigations.Replay"},
            },
            "backbone": {"class_path": "residency.backbones.CausalLM", "init_args": {"path": "/home/me/models/smol"}},
        },
        "data": {
            "domains": {"medical": {"class_path": "a.Jsonl", "init_args": {"a": {"b": {"c": 1}}, "d": {"e": 2}}}},
            "order": ["medical"],
            "batch_size": 8,
        },
        "evaluation": {"prompt": "x" * 500},
        "wandb": {"project": "study"},
        "run_dir": "/home/me/runs/run",
    }


def test_flat_config_is_short_and_complete() -> None:
    assert flat_config(resolved()) == {
        "seed": 3,
        "stream": "medical",
        "mitigation": "ewc+my_replay",
        "mitigation.ewc": "EWC",
        "mitigation.ewc.strength": 100.0,
        "mitigation.my_replay": "Replay",
        "adapter": "LoraConfig",
        "adapter.r": 8,
        "adapter.target_modules": "q,v",
        "backbone": "CausalLM",
        "backbone.path": "smol",
        "domain.medical": "Jsonl",
        "domain.medical.d.e": 2,
        "batch_size": 8,
        "trainer.max_steps": 20,
        "trainer.accelerator": "auto",
    }


def test_flat_config_of_less() -> None:
    config = resolved()
    config["model"]["mitigations"] = None
    config["data"]["order"] = None
    config["data"]["domains"] |= {"legal": {"class_path": "a.Jsonl"}}
    flat = flat_config({"fit": config})
    assert (flat["mitigation"], flat["stream"]) == ("none", "medical,legal")
    assert not any(key.startswith("mitigation.") for key in flat)
    assert all(key.count(".") <= 3 for key in flat)
    assert flat_config({})["mitigation"] == "none"

"""Lightning's own loggers show the whole stream; nothing restarts at a new domain."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from support.cli import call, read_json, tiny_config, write_yaml


@pytest.fixture(scope="module")
def folder(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two domains with a CSV logger."""
    folder = tmp_path_factory.mktemp("logged")
    config = tiny_config(folder / "data", llama)
    options = {"save_dir": str(folder / "logs"), "name": "csv"}
    config["trainer"]["logger"] = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": options}
    path = write_yaml(folder / "config.yaml", config)
    result = call("fit", "--config", path, "--run_dir", folder / "run")
    assert result.code == 0, result.err
    return folder


def test_a_csv_logger_gets_every_step_and_every_score(folder: Path) -> None:
    logs = sorted((folder / "logs" / "csv").glob("version_*/metrics.csv"))
    assert len(logs) == 2, "one Trainer per stage, one logger per Trainer"
    rows = [row for log in logs for row in csv.DictReader(log.read_text().splitlines())]
    losses = [(int(row["step"]), float(row["train/loss"])) for row in rows if row.get("train/loss")]
    history = [line for line in (folder / "run" / "history.jsonl").read_text().splitlines() if line]
    assert [step for step, _ in losses] == [1, 2, 3, 4, 5, 6]
    assert len(history) == 6
    scores = [(float(row["stage"]), float(row["eval/a/nll"])) for row in rows if row.get("eval/a/nll")]
    wanted = [row[0] for row in read_json(folder / "run" / "results.json")["scores"]["nll"]["R"]]
    assert [value for _, value in scores] == pytest.approx(wanted)
    assert [stage for stage, _ in scores] == [0, 1, 2]


# Of MLflow's own tables, when they are first mapped.
@pytest.mark.filterwarnings("ignore:The ``noload`` loader strategy")
def test_mlflow_gets_every_step_and_every_score(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset with the real client, offline."""
    tracking = pytest.importorskip("mlflow.tracking", reason="pip install residency[mlflow]")
    monkeypatch.chdir(tmp_path)
    path = write_yaml(tmp_path / "config.yaml", tiny_config(tmp_path / "data", llama))
    result = call("fit", "--config", path, "--run_dir", tmp_path / "run", "--trainer.logger", "mlflow")
    assert result.code == 0, result.err
    client = tracking.MlflowClient("sqlite:///mlflow.db")
    experiment = client.get_experiment_by_name("residency")
    runs = [run.info.run_id for run in client.search_runs([experiment.experiment_id], order_by=["start_time ASC"])]
    assert len(runs) == 2, "one per stage"
    losses = [metric for run in runs for metric in client.get_metric_history(run, "train/loss")]
    wanted = [json.loads(line)["loss"] for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert [metric.step for metric in losses] == [1, 2, 3, 4, 5, 6]
    assert [metric.value for metric in losses] == pytest.approx(wanted)
    scores = [metric.value for run in runs for metric in client.get_metric_history(run, "eval/a/nll")]
    R = read_json(tmp_path / "run" / "results.json")["scores"]["nll"]["R"]
    assert scores == pytest.approx([row[0] for row in R])

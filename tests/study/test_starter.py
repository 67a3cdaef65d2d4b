"""`residency init`: from three user files to a config and a study that run."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import yaml

import residency
from residency.core.errors import UserError
from residency.study.starter.files import collect, read_rows
from support.cli import call, printed_config, read_json


def _files(folder: Path) -> list[Path]:
    """JSON Lines, a CSV of labels and an alpaca file."""
    jsonl, table, alpaca = folder / "Case Law.jsonl", folder / "tickets.csv", folder / "notes.json"
    rows = [{"prompt": f"question {n}?", "completion": f"answer {n * n}"} for n in range(40)]
    jsonl.write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label"])
        writer.writerows([f"00{n}", f'a "quoted", ticket {n}', ("bill", "login")[n % 2]] for n in range(40))
    alpaca.write_text(json.dumps([{"instruction": f"Sum {n}", "input": str(n), "output": "x"} for n in range(40)]))
    return [jsonl, table, alpaca]


def test_three_files_become_a_study_that_runs(llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    files = _files(tmp_path)
    before = [path.read_bytes() for path in files]
    result = call("init", "mine", "--data", *files, "--model", llama)
    assert result.code == 0, result.err
    config = printed_config("fit", "--config", "mine/config.yaml")
    assert list(config["data"]["domains"]) == ["case_law", "tickets", "notes"]
    assert config["data"]["domains"]["tickets"]["init_args"]["kind"] == "label"
    assert config["model"]["adapter"]["init_args"]["config"]["class_path"] == "peft.LoraConfig"
    assert call("sweep", "mine/study.yaml", "--dry-run").code == 0
    words = ("--trainer.max_steps=1", "--trainer.accelerator=cpu", "--evaluation.generation_rows=1", "--run_dir=r")
    done = call("fit", "--config", "mine/config.yaml", *words)
    assert done.code == 0, done.err
    assert read_json(tmp_path / "r/results.json")["domains"] == ["case_law", "tickets", "notes"]
    assert [path.read_bytes() for path in files] == before


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    files = _files(tmp_path)
    residency.init(tmp_path / "mine", data=files)
    with pytest.raises(UserError, match="nothing is overwritten"):
        residency.init(tmp_path / "mine", data=files)


def test_enough_rows_always_leave_some_to_test_on(tmp_path: Path) -> None:
    for number in range(200):
        path = tmp_path / f"law{number}.jsonl"
        rows = [{"prompt": f"law {number} {n}?", "completion": f"answer {n}"} for n in range(30)]
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        (domain,) = collect([path])
        assert len(domain.rows["train"]) + len(domain.rows["validation"]) + len(domain.rows["test"]) == 30
        assert domain.rows["test"]


def test_rows_are_dealt_out_whole(tmp_path: Path) -> None:
    for domain in collect(_files(tmp_path)):
        rows = [row for part in domain.rows.values() for row in part]
        assert len(rows) == len({row.id for row in rows}) == 40
        assert domain.rows["train"]
        assert domain.rows["test"]


def test_equal_prompts_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Same  {n // 4}", "completion": str(n)} for n in range(200)]
    path.write_text("\n".join(map(json.dumps, rows)))
    (domain,) = collect([path])
    prompts = [{row.prompt for row in part} for part in domain.rows.values()]
    assert sum(map(len, prompts)) == len(set.union(*prompts)) == 50


def test_cells_are_text(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,answer\n007,1.50\nyes,NA\n")
    pair, rows = read_rows(path)
    assert pair == ("question", "answer")
    assert [(row.prompt, row.completion) for row in rows] == [("007", "1.50"), ("yes", "NA")]


def test_splits_by_name(tmp_path: Path) -> None:
    for split, count in (("train", 30), ("test", 5), ("dev", 4)):
        rows = [{"prompt": f"{split} {n}", "completion": f"c {n}"} for n in range(count)]
        (tmp_path / f"law-{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (domain,) = collect(sorted(tmp_path.glob("*.jsonl")))
    assert {split: len(rows) for split, rows in domain.rows.items()} == {"train": 30, "test": 5, "validation": 4}
    assert not domain.split


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("a.jsonl", '{"a": "x", "b": "y"}\n', "columns a, b"),
        ("a.jsonl", '{"prompt": "x"', "cannot read"),
        ("a.jsonl", '{"prompt": "x", "completion": " "}\n', "row 1, completion is empty"),
        ("a.jsonl", "[1]\n", "row 1: list"),
        ("a.xlsx", "x", "ends in .xlsx"),
        ("a.jsonl", '{"prompt": "x", "completion": "y"}\n', "rows to train on"),
    ],
)
def test_what_cannot_be_read_is_said(tmp_path: Path, name: str, text: str, said: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=said):
        collect([tmp_path / name])


def test_the_config_is_commented(tmp_path: Path) -> None:
    config, study = residency.init(tmp_path / "mine", data=_files(tmp_path))
    assert config.read_text().count("#") > 8
    assert yaml.safe_load(study.read_text())["base"] == "config.yaml"

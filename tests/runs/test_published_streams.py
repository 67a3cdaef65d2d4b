"""Streams of the field: presets as published, from a copy in the authors' layout, and trained from real rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from residency.core.errors import UserError
from residency.core.presets import find_preset, list_presets
from residency.domains.stream_data import StreamData
from residency.domains.table import Table
from residency.runs.cli import parse
from support.cli import call, read_json, tiny_config, write_yaml

SHARED = Path(__file__).parents[2] / ".." / "shared" / "data"
ORDERS = {
    "olora_order1": "dbpedia amazon yahoo agnews",
    "olora_order2": "dbpedia amazon agnews yahoo",
    "olora_order3": "yahoo amazon agnews dbpedia",
    "long_mnli": "MNLI CB WiC COPA QQP BoolQA RTE IMDB yelp amazon SST-2 dbpedia agnews MultiRC yahoo",
    "long_multirc": "MultiRC BoolQA WiC MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yelp amazon yahoo",
    "long_yelp": "yelp amazon MNLI CB COPA QQP RTE IMDB SST-2 dbpedia agnews yahoo MultiRC BoolQA WiC",
    "trace": "C-STANCE FOMC MeetingBank Py150 ScienceQA NumGLUE-cm NumGLUE-ds 20Minuten",
    "superni_1": "samsum sst2 xsum outcome quoref evalution multi_woz personachat commonsenseqa diplomacy glucose "
    "reddit_tifu sciq sentiment140 emotion",
    "superni_2": "glucose commonsenseqa diplomacy multi_woz samsum sentiment140 sciq sst2 evalution personachat "
    "outcome reddit_tifu quoref xsum emotion",
}
TRACE_EPOCHS = {
    "C-STANCE": 5,
    "FOMC": 3,
    "MeetingBank": 7,
    "Py150": 5,
    "ScienceQA": 3,
    "NumGLUE-cm": 5,
    "NumGLUE-ds": 5,
    "20Minuten": 7,
}
"""Wang et al. 2023, their training script."""


def content(kind: str, name: str) -> dict[str, Any]:
    path = find_preset(kind, name)
    assert path is not None
    found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize("name", ORDERS)
def test_orders_are_those_of_the_papers(name: str) -> None:
    """And every domain of a stream is one preset, which nothing else repeats."""
    stream = content("stream", name)
    assert stream["data"]["order"] == list(stream["data"]["domains"]) == ORDERS[name].split()
    for domain, preset in stream["data"]["domains"].items():
        given = content("domain", preset)["init_args"]
        assert Path(given["path"]).name.endswith(domain) or domain in given["path"]
        assert "nll" in given["scorers"]
        assert len(given["scorers"]) > 1


def test_every_published_domain_is_part_of_a_stream() -> None:
    used = {preset for name in ORDERS for preset in content("stream", name)["data"]["domains"].values()}
    assert {preset.name for preset in list_presets("domain")} == used | {"controlled"}


def test_trace_trains_as_long_as_its_authors() -> None:
    assert content("stream", "trace")["stages"] == {task: {"epochs": n} for task, n in TRACE_EPOCHS.items()}


# -- a copy in the authors' layout -----------------------------------------------------------------------------------


def rows_of(path: str, split: str, count: int) -> Any:
    """Rows as the authors of a data set write them, by its place."""
    said = [f"{Path(path).name} {split} number {i}" for i in range(count)]
    if path.startswith("SuperNI"):
        instances = [{"id": f"{split}{i}", "input": text, "output": [f"out {i}", "or"]} for i, text in enumerate(said)]
        return {"Definition": ["Do it."], "Positive Examples": [], "Instances": instances}
    if "/" in path:
        return [{"sentence": text, "label": ("True", "False")[i % 2]} for i, text in enumerate(said)]
    return [{"prompt": text, "answer": "AB"[i % 2] + " "} for i, text in enumerate(said)]


def write_copy(root: Path, stream: str) -> None:
    for preset in content("stream", stream)["data"]["domains"].values():
        path = content("domain", preset)["init_args"]["path"]
        (root / path).mkdir(parents=True)
        dev = "eval" if stream == "trace" else "dev"
        for split in ("train", dev, "test"):
            # As published: the dev files of O-LoRA and SAPT are their test files.
            name = split if split == "train" or stream == "trace" else "test"
            (root / path / f"{split}.json").write_text(json.dumps(rows_of(path, name, 30)), encoding="utf-8")
        if stream.startswith(("olora", "long")):
            (root / path / "labels.json").write_text('["True", "False"]', encoding="utf-8")


@pytest.mark.parametrize("name", ["trace", "olora_order1", "long_yelp", "superni_1"])
def test_a_copy_in_the_authors_layout_is_read(name: str, tmp_path: Path) -> None:
    write_copy(tmp_path, name)
    cli = parse(["fit", "--config", "quickstart", "--config", name, f"--data.root={tmp_path}"])
    data: StreamData = cli.datamodule
    data.check()
    assert data.order == ORDERS[name].split()
    for domain in data.columns.values():
        if isinstance(domain, Table):
            tests = {row.prompt for row in domain.rows("test")}
            assert tests
            assert not tests & {row.prompt for row in domain.rows("validation")}
    assert set(cli.settings.stages) == (set(TRACE_EPOCHS) if name == "trace" else set())
    if name.startswith("superni"):
        row = data.domains["xsum"].rows("train")[0]
        assert row.prompt.startswith("Definition: Do it.\n\nNow complete the following example -\nInput: ")
        assert row.references == ("or",)
    if name == "long_yelp":
        assert data.domains["COPA"].rows("train")[0].prompt.startswith("Option: True, False \n")
        assert "is the candidate answer true or false?" in data.domains["MultiRC"].rows("train")[0].prompt


def test_a_size_for_a_few_cores_is_given_behind_any_stream(tmp_path: Path) -> None:
    write_copy(tmp_path, "trace")
    words = [f"--data.root={tmp_path}", "--data.max_train=12", "--stages.FOMC.steps=7"]
    cli = parse(["fit", "--config", "quickstart", "--config", "trace", "--config", "cpu_size", *words])
    data = cli.datamodule
    assert [len(data.domains["FOMC"].rows(split)) for split in ("train", "validation", "test")] == [12, 20, 30]
    assert set(cli.settings.stages) == {"FOMC"}
    assert cli.settings.stages["FOMC"].given == {"steps": 7}
    assert cli.resolved["trainer"]["max_steps"] == 40


def test_a_flatter_copy_is_found_and_a_missing_one_is_told(tmp_path: Path) -> None:
    write_copy(tmp_path / "whole", "olora_order1")
    shutil.copytree(tmp_path / "whole/TC/agnews", tmp_path / "flat/agnews")
    read = [Table(path="TC/agnews", kind="label").under(tmp_path / name).fingerprint() for name in ("whole",)]
    assert read == [Table(path=str(tmp_path / "whole/TC/agnews"), kind="label").fingerprint()]
    assert Table(path="TC/agnews").under(tmp_path / "flat").source == str(tmp_path / "flat/agnews")
    with pytest.raises(UserError, match=r"data\.root is .*nowhere"):
        StreamData(domains={"a": Table(path="TC/agnews")}, root=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match="agnews"):
        StreamData(domains={"a": Table(path="TC/agnews")}, root=str(tmp_path / "whole/TC/yahoo")).check()
    with pytest.raises(UserError, match=r"data\.max_test is 0"):
        StreamData(domains={"a": Table(path="TC/agnews")}, max_test=0)


# -- real rows -------------------------------------------------------------------------------------------------------


def long_llama(llama: Path, folder: Path) -> Path:
    """The tiny model with positions for a page of bytes: it has no parameters that depend on them."""
    shutil.copytree(llama, folder)
    config = read_json(folder / "config.json")
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 4096}), encoding="utf-8")
    return folder


def trained(stream: dict[str, Any], root: Path, llama: Path, folder: Path) -> tuple[dict[str, Any], dict[int, int]]:
    """The record of a stream on a tiny model, and the steps of its stages."""
    base = tiny_config(folder / "data", long_llama(llama, folder / "llama"))
    size = {"max_train": 8, "max_validation": 2, "max_test": 3, "batch_size": 4, "root": str(root)}
    trainer = {**base["trainer"], "max_steps": -1, "max_epochs": 1}
    data = {**stream["data"], **size}
    config = {**base, "data": data, "trainer": trainer, "stages": stream.get("stages", {})}
    config["evaluation"] = {"generation_rows": 2}
    path = write_yaml(folder / "config.yaml", config)
    found = call("fit", "--config", path, "--run_dir", folder / "run")
    assert found.code == 0, found.err
    lines = [json.loads(line) for line in (folder / "run/history.jsonl").read_text().splitlines()]
    steps: dict[int, int] = {}
    for line in lines:
        steps[line["stage"]] = steps.get(line["stage"], 0) + 1
    return read_json(folder / "run/results.json"), steps


def there(root: Path, names: list[str]) -> list[str]:
    if not root.is_dir():
        pytest.skip(f"no rows in {root}: see its README for their origin")
    return [name for name in names if (root / name).is_dir()]


@pytest.mark.slow
def test_trace_runs_from_real_rows_with_the_epochs_of_each_task(llama: Path, tmp_path: Path) -> None:
    stream = content("stream", "trace")
    order = there(SHARED / "trace", stream["data"]["order"])
    assert len(order) == 7
    stream["data"]["order"] = order
    record, steps = trained(stream, SHARED / "trace", llama, tmp_path)
    assert record["domains"] == order
    assert list(steps.values()) == [2 * TRACE_EPOCHS[task] for task in order]
    assert {"nll", "accuracy", "exact_match", "edit_similarity", "choice", "numeric", "sari"} <= set(record["scores"])
    for scorer, only in (("sari", "20Minuten"), ("edit_similarity", "Py150"), ("accuracy", "FOMC")):
        column = [row[order.index(only)] for row in record["scores"][scorer]["R"]]
        assert len(column) == 8
        assert all(value is not None and 0 <= value <= 1 for value in column)


@pytest.mark.slow
def test_nine_tasks_of_the_long_order_run_from_real_rows(llama: Path, tmp_path: Path) -> None:
    stream = content("stream", "long_yelp")
    order = there(SHARED / "olora", stream["data"]["order"])
    assert len(order) == 9
    stream["data"]["order"] = order
    stream["stages"] = {name: {"steps": 1 + i % 3, "lr": 1e-3 * (1 + i)} for i, name in enumerate(order)}
    record, steps = trained(stream, SHARED / "olora", llama, tmp_path)
    assert list(steps.values()) == [1 + i % 3 for i in range(9)]
    for scorer in ("nll", "accuracy", "exact_match_olora"):
        matrix = record["scores"][scorer]["R"]
        assert [len(row) for row in matrix] == [9] * 10
        assert all(value is not None for row in matrix for value in row)

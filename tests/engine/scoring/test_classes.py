"""Which labels compete: a domain's own, those seen so far, or those of the whole stream."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from residency.runs.cli import parse
from residency.runs.keys import RunKeys
from residency.runs.stream import open_stage_cache
from residency.testing.tiny_models import write_domain
from support.cli import call, read_json, tiny_config, write_yaml


def seasons(folder: Path, llama: Path, **data: Any) -> Path:
    """Three domains of one, two and one classes: spring; winter or summer; autumn."""
    base = tiny_config(folder / "data", llama)
    base["data"]["domains"] = {}
    for name, classes in (("first", ["spring"]), ("second", ["winter", "summer"]), ("third", ["autumn"])):
        domain = write_domain(folder / "data", name, kind="label")
        for split in ("train", "validation", "test"):
            path = folder / "data" / f"{name}-{split}.jsonl"
            rows = path.read_text(encoding="utf-8").splitlines()
            named = [
                json.dumps({**json.loads(row), "completion": classes[i % len(classes)]}) for i, row in enumerate(rows)
            ]
            path.write_text("\n".join(named), encoding="utf-8")
        base["data"]["domains"][name] = domain
    base["data"] |= data
    return write_yaml(folder / "config.yaml", base)


def candidates(config: Path) -> list[list[int]]:
    """How many labels compete, by stages learned and domain."""
    data = parse(["fit", "--config", str(config)]).datamodule
    return [[len(data.labels(name, learned)) for name in data.order] for learned in range(4)]


def test_the_labels_that_compete(llama: Path, tmp_path: Path) -> None:
    for name in ("own", "seen", "all"):
        (tmp_path / name).mkdir()
    own, seen, every = (candidates(seasons(tmp_path / n, llama, classes=n)) for n in ("own", "seen", "all"))
    assert own == [[1, 2, 1]] * 4
    assert seen == [[1, 2, 1], [1, 3, 2], [3, 3, 4], [4, 4, 4]]
    assert every == [[4, 4, 4]] * 4


def test_a_class_incremental_stream_scores_over_the_classes_seen(llama: Path, tmp_path: Path) -> None:
    """A domain of one class has an accuracy as soon as there is another class; what was learned first is lost."""
    found = call("fit", "--config", seasons(tmp_path, llama, classes="seen"), "--run_dir", tmp_path / "run")
    assert found.code == 0, found.err
    accuracy = read_json(tmp_path / "run/results.json")["scores"]["accuracy"]["R"]
    there = [[value is not None for value in row] for row in accuracy]
    assert there == [[False, True, False], [False, True, True], [True, True, True], [True, True, True]]


@pytest.mark.parametrize(("classes", "same"), [("own", [True] * 4), ("seen", [False] * 4), ("all", [False] * 4)])
def test_scores_of_other_candidates_are_not_shared(classes: str, same: list[bool], llama: Path, tmp_path: Path) -> None:
    config = seasons(tmp_path, llama)

    def keys(*words: str) -> RunKeys:
        cli = parse(["fit", "--config", str(config), f"--store={tmp_path / 'store'}", *words])
        parts: dict[str, Any] = {"module": cli.model, "data": cli.datamodule, "trainers": cli.trainers}
        return open_stage_cache(**parts, settings=cli.settings, config=cli.resolved).keys

    plain, other = keys(), keys(f"--data.classes={classes}")
    assert plain.stages == other.stages, "what is trained does not depend on what is scored"
    settings = parse(["fit", "--config", str(config)]).settings.evaluation
    how: dict[str, Any] = {"split": "test", "settings": settings, "layout": "packed"}
    assert [plain.scores(k, "first", **how) == other.scores(k, "first", **how) for k in range(4)] == same

"""Nothing of a user's is left out without a number: each place, in console, results.json and report.

Every place is a domain of one of two runs: as everything is by default, and with every limit of a run set.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from residency.core.text import printable
from residency.domains.left_out import in_words
from residency.report.page.build import build
from support.cli import call, read_json, tiny_config, write_yaml

Rows = list[dict[str, Any]]
Change = Callable[[Rows], None]

TRAIN, TEST, VALIDATION = 40, 10, 3
LIMITS = {
    "data": {"max_test": 8, "shots": 3},
    "evaluation": {"accuracy_rows": 4, "generation_rows": 3},
    "trainer": {"max_steps": 2},
}
"""Of the second run; a batch has 4 rows."""


@dataclass(frozen=True, kw_only=True)
class Place:
    """One place where something is left out.

    Args:
        what: Its name in `data.left_out`.
        count: How many; `None` = more than none, for what depends on a model.
        of: Of how many; `None` = of the answers in all states.
        split: Whose rows these are; empty = of all.
        rows: Changes the rows of the files, by split.
        options: Of the domain.
        template: Of its template.
        files: Further files of its folder, which is then read as a whole: name -> content; with a `train.json` among
            them it holds nothing else.
        limited: Whether it is part of the run with all limits.
        probe: Whether it is only scored.
    """

    what: str
    count: int | None
    of: int | None
    split: str = "train"
    rows: Mapping[str, Change] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    template: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)
    limited: bool = False
    probe: bool = False


def each(many: int, **columns: Any) -> Change:
    """Sets columns of the first rows; `{i}` is the number of a row."""

    def change(rows: Rows) -> None:
        for i, row in enumerate(rows[:many]):
            row.update({k: v.format(i=i) if isinstance(v, str) else v for k, v in columns.items()})

    return change


def wanted(but: int) -> Change:
    """Every answer is wanted, but the first ones."""
    return lambda rows: (each(len(rows), label=True)(rows), each(but, label=False)(rows))[0]


LONG = {"prompt": "a question that goes on and on"}
LABELS = {"kind": "label", "scorers": ["nll", "accuracy"]}
TEXTS = {"scorers": ["nll", "exact_match"]}
UNPAIRED = {"train": wanted(0), "validation": wanted(0), "test": wanted(4)}


def task(many: int, words: str) -> str:
    """A task of Natural Instructions."""
    instances = [{"id": f"{words}{i}", "input": f"NAME {words} {i}", "output": ["yes"]} for i in range(many)]
    shown = [{"input": "NAME", "output": "yes"}] * 2
    return json.dumps({"Definition": ["Say yes.", "Say aye."], "Positive Examples": shown, "Instances": instances})


def sentences(many: int, words: str) -> str:
    """A split of O-LoRA."""
    return json.dumps([{"sentence": f"NAME {words} {i}", "label": ("yes", "no")[i % 2]} for i in range(many)])


TASK = {"train.json": task(40, "tr"), "dev.json": task(10, "te"), "test.json": task(10, "te")}
OLORA = {"train.json": sentences(40, "tr"), "dev.json": sentences(9, "te"), "test.json": sentences(9, "te")}
WIDE = {"max_tokens": 256, "keep_prefix": 0}
PLACES = {
    "columns": Place(what="columns", count=2, of=4, split="", rows={"train": each(3, url="u", topic="t")}),
    "blanks": Place(what="blanks", count=4, of=TRAIN, rows={"train": each(4, completion=" yes\n")}),
    "files": Place(what="files", count=1, of=4, split="", files={"extra.csv": "prompt,completion\n"}),
    "task_examples": Place(what="task_examples", count=2, of=2, files=TASK, template=WIDE, probe=True),
    "definitions": Place(what="definitions", count=1, of=2, files=TASK, template=WIDE, probe=True),
    "superni_dev": Place(what="twin", count=10, of=10, split="validation", files=TASK, template=WIDE, probe=True),
    "olora_dev": Place(
        what="twin", count=9, of=9, split="validation", files=OLORA | {"labels.json": '["yes", "no"]'}, template=WIDE,
        options={"scorers": ["nll"]}, probe=True,
    ),
    "references": Place(what="references", count=6, of=46, rows={"train": each(3, references=["aye", "yea"])}),
    "max_train": Place(what="max_rows", count=33, of=TRAIN, options={"max_train": 7}),
    "max_test": Place(what="max_rows", count=4, of=TEST, split="test", options={"max_test": 6}, probe=True),
    "no_validation": Place(
        what="max_rows", count=3, of=3, split="validation", options={"max_validation": 0}, probe=True
    ),
    "drop": Place(what="too_long", count=5, of=40, rows={"train": each(5, **LONG)}, template={"too_long": "drop"}),
    "cut": Place(
        what="cut_prompt", count=5, of=40, rows={"train": each(5, **LONG)}, template={"too_long": "truncate_prompt"},
    ),
    "cut_answer": Place(
        what="cut_answer", count=4, of=40, rows={"train": each(4, completion="yes, and many words more than that")},
        template={"too_long": "truncate"},
    ),
    "scored": Place(what="cut_prompt", count=3, of=TEST, split="test", rows={"test": each(3, **LONG)}, probe=True),
    "unscored": Place(
        what="cut_prompt", count=2, of=3, split="validation", rows={"validation": each(2, **LONG)}, probe=True
    ),
    "unread": Place(what="unread_split", count=3, of=3, split="validation"),
    "unwanted": Place(what="not_scored", count=4, of=TEST, split="test", rows=UNPAIRED, probe=True),
    "one_text": Place(
        what="not_scored", count=10, of=10, split="test", options={"scorers": ["nll", "accuracy"]}, probe=True
    ),
    "endless": Place(what="unfinished", count=None, of=None, split="", options=TEXTS, probe=True),
    "shots": Place(
        what="shots", count=8, of=8, split="test", template={"max_tokens": 40, "max_prompt_tokens": 30}, limited=True
    ),
    "forgotten": Place(what="memory", count=2, of=6, limited=True),
    "few_steps": Place(what="no_batch", count=TRAIN - 6, of=TRAIN, limited=True),  # replay takes two places of eight
    "few_labels": Place(what="not_scored", count=4, of=8, split="test", options=LABELS, limited=True),
    "few_texts": Place(what="not_scored", count=5, of=8, split="test", options=TEXTS, limited=True),
    "run_limit": Place(what="max_rows", count=2, of=TEST, split="test", limited=True),
    "idle": Place(what="order", count=1, of=7, split="", limited=True),
    "probe": Place(what="unread_split", count=TRAIN, of=TRAIN, limited=True, probe=True),
}  # fmt: skip


def written(folder: Path, name: str, place: Place) -> dict[str, Any]:
    """The domain of a place: its files are written; a config."""
    home = folder / "TC" / name
    home.mkdir(parents=True)
    for file, text in place.files.items():
        (home / file).write_text(text.replace("NAME", name), encoding="utf-8")
    sizes = {"train": TRAIN, "test": TEST, "validation": VALIDATION}
    for split, size in sizes.items():
        rows: Rows = [{"prompt": "ask", "completion": ("yes", "no")[i % 2]} for i in range(size)]
        place.rows.get(split, list)(rows)
        for i, row in enumerate(rows):
            row["prompt"] = f"{[*PLACES].index(name):02} {split[:2]} {i:02} {row['prompt']}"
        if "train.json" not in place.files:
            (home / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    files = {"path": str(home)} if place.files else {split: str(home / f"{split}.jsonl") for split in sizes}
    # What tells a prompt from others is never cut.
    template = {
        "prompt": "{prompt}>",
        "completion": "{completion}",
        "max_tokens": 24,
        "keep_prefix": 8,
        **place.template,
    }
    options = {"scorers": ["nll"], **files, "template": template, **place.options}
    return {"class_path": "residency.domains.Table", "init_args": options}


def fitted(folder: Path, llama: Path, *, limited: bool) -> tuple[str, dict[str, Any], str]:
    """(what the console says, the record, the report's page) of a run of all places of a kind."""
    base = tiny_config(folder / "tiny", llama)
    places = {name: one for name, one in PLACES.items() if one.limited == limited}
    domains = {name: written(folder / "rows", name, one) for name, one in places.items()}
    base["data"]["probes"] = {name: domains.pop(name) for name, one in places.items() if one.probe}
    base["trainer"]["max_steps"] = 10  # an epoch
    if limited:
        for section, keys in LIMITS.items():
            base.setdefault(section, {}).update(keys)
        replay = {"ratio": 0.25, "capacity": 20, "policy": "balanced"}
        base["model"]["mitigations"] = {"memory": {"class_path": "residency.mitigations.Replay", "init_args": replay}}
        base["data"]["order"] = [name for name in domains if name != "idle"]
    base["data"]["domains"] = domains
    found = call("fit", "--config", write_yaml(folder / "c.yaml", base), "--run_dir", folder / "run")
    assert found.code == 0, found.err
    page = build(folder / "run", output=folder / "report").read_text(encoding="utf-8")
    return " ".join(found.out.split()), read_json(folder / "run/results.json"), page


@pytest.fixture(scope="module")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, tuple[str, dict[str, Any], str]]:
    """{with all limits: console, record, page}."""
    folder = tmp_path_factory.mktemp("left-out")
    return {limited: fitted(folder / str(limited), llama, limited=limited) for limited in (False, True)}


@pytest.mark.parametrize("name", PLACES)
def test_what_is_left_out_is_counted(name: str, runs: Mapping[bool, tuple[str, dict[str, Any], str]]) -> None:
    place = PLACES[name]
    said, record, page = runs[place.limited]
    mine = [one for one in record["data"]["left_out"] if (one["column"], one["what"]) == (name, place.what)]
    (met,) = [one for one in mine if one["split"] == place.split]
    assert met["of"] == (place.of or TEST * len(record["scores"]["nll"]["R"]))
    assert met["count"] == place.count if place.count is not None else met["count"] > 0
    assert f"{place.split}: {in_words(met)}".removeprefix(": ") in said
    table = page[page.index("What takes no part, from the files to the matrix") :].split("</table>")[0]
    lines = [line for line in table.split("<tr") if f"{met['unit']} {met['how']}" in line and f">{name}<" in line]
    cells = [[part.split(">")[-1] for part in line.split("</td>")] for line in lines]
    assert [place.split or "-", f"{met['count']:,}", f"{met['of']:,}"] in [row[:3] for row in cells]


def test_nothing_is_told_that_is_not_so(runs: Mapping[bool, tuple[str, dict[str, Any], str]]) -> None:
    """A domain of which nothing is lost by its files or limits has no such entry, and no entry counts nothing."""
    _, record, _ = runs[False]
    plain = [one for one in record["data"]["left_out"] if one["column"] == "unread"]
    assert [one["what"] for one in plain] == ["unread_split"]
    assert all(one["count"] > 0 for _, record, _ in runs.values() for one in record["data"]["left_out"])
    assert all(printable(one["how"], 300) == one["how"] for one in record["data"]["left_out"])

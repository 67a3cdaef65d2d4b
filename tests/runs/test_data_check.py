"""The check of the data before every run: told, recorded, and refused where scores would mean nothing."""

from __future__ import annotations

import io
import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console

from residency.adapters import Full
from residency.core.errors import UserError
from residency.domains.base import Domain
from residency.domains.jsonl import Jsonl
from residency.report.page.build import build
from residency.runs.views.base import View
from residency.runs.views.guarded import GuardedView
from residency.runs.views.tables import majority, score_table
from residency.testing.tiny_runs import domains, train
from support.cli import call, tiny_config, write_yaml
from support.tiny_sweeps import run_sweep, write_study

WORDS = ["".join(pair) for pair in itertools.product(("am", "bir", "ced", "dus", "em"), ("ber", "ch", "ar", "k"))]


def written(folder: Path, name: str, *, start: int, count: int, answer: str = "yes {0}") -> str:
    path = folder / f"{name}.jsonl"
    prompts = [
        f"{WORDS[i % 20]} {WORDS[i * 7 % 19]} {WORDS[i * 3 % 17]} number {i}" for i in range(start, start + count)
    ]
    lines = [json.dumps({"prompt": p, "completion": answer.format(p.split()[0])}) for p in prompts]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


def files(folder: Path, **options: Any) -> dict[str, Domain]:
    train_file, test_file = written(folder, "t", start=0, count=40), written(folder, "e", start=100, count=12)
    return {"kitchen": Jsonl(train=train_file, test=test_file, **options)}


def test_counts_and_findings_are_in_the_record(llama: Path, tmp_path: Path) -> None:
    readers = files(tmp_path, max_train=30)
    readers |= domains(tmp_path / "data", {"b": "label"})
    record, _ = train(tmp_path / "run", llama, Full(), {}, data={"domains": readers}, steps=1)
    found = json.loads((tmp_path / "run" / "results.json").read_text())["data"]
    assert found == record["data"]
    counts = found["domains"]["kitchen"]["train"]
    carved = found["domains"]["kitchen"]["validation"]["given"]
    assert (counts["given"] + carved, counts["rows"]) == (40, 30)
    assert {one["check"] for one in found["findings"] if one["domain"] == "kitchen"} >= {"few_rows", "rows_left_out"}


def test_what_is_left_out_is_told_on_the_console_in_the_record_and_on_the_page(llama: Path, tmp_path: Path) -> None:
    """Rows beyond a limit, rows that are too long, prompts and answers that are cut: the same numbers three times."""
    base = tiny_config(tmp_path / "data", llama)
    long = "word " * 20
    for split, lengths in (("train", [9] * 497 + [200] * 3), ("test", [9] * 10 + [200] * 4)):
        rows = [{"prompt": f"{split} {i:03d} {(long * 3)[:n]}{i}", "completion": "yes"} for i, n in enumerate(lengths)]
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"own-{split}.jsonl").write_text(text, encoding="utf-8")
    own = {f: str(tmp_path / f"own-{f}.jsonl") for f in ("train", "test")} | {"max_validation": 5, "scorers": ["nll"]}
    own["template"] = {"max_tokens": 64, "max_prompt_tokens": 60}
    base["data"]["domains"] = {"own": {"class_path": "residency.domains.Jsonl", "init_args": own}}
    found = call("fit", "--config", write_yaml(tmp_path / "c.yaml", base), "--run_dir", tmp_path / "run")
    assert found.code == 0, found.err
    counts = json.loads((tmp_path / "run/results.json").read_text())["data"]["domains"]["own"]
    carved = counts["validation"]
    left = counts["train"]["given"] - counts["train"]["rows"]
    assert counts["train"]["too_long"] == left > 0
    assert counts["train"]["given"] + carved["given"] == 500
    assert (carved["rows"], counts["test"]["cut_prompts"], counts["test"]["rows"]) == (5, 4, 14)
    said = " ".join(found.out.split())
    assert f"own, train: {left} of {counts['train']['given']} rows left out (too long)" in said
    assert f"own, validation: {carved['given'] - 5} of {carved['given']} rows not used (max_validation)" in said
    assert f"own, test: 4 of 14 prompts cut by {counts['test']['cut_prompt_tokens']} tokens" in said
    page = build(tmp_path / "run", output=tmp_path / "report").read_text(encoding="utf-8")
    table = page[page.index("Rows and tokens that were used and left out") :].split("</table>")[0]
    for split, c in counts.items():
        (row,) = [row for row in table.split("<tr") if f">{split}<" in row]
        told = [c["given"], c["rows"], c["given"] - c["rows"], c["too_long"], c["cut_prompts"], c["cut_prompt_tokens"]]
        cells = [part.split(">")[-1] for part in row.split("</td>")]
        assert cells[1:7] == [f"{number:,}" for number in told]


def test_cells_of_a_study_count_what_their_files_hold(llama: Path, tmp_path: Path) -> None:
    """Their workers take rows that are read already: the rows beyond a limit are counted all the same."""
    axes = {"x": {"plain": {"data.domains.a.max_train": 9}}}
    study = write_study(
        tmp_path, llama, axes=axes, references=["joint", "frozen"], domains="ab", seeds=[0], scorer="nll"
    )
    code, out = run_sweep(study, tmp_path / "study")
    assert code == 0, out
    found = {
        p.parent.name: json.loads(p.read_text())["data"] for p in (tmp_path / "study").glob("cells/*/results.json")
    }
    counts = found["plain-s0"]["domains"]["a"]["train"]
    assert (counts["given"], counts["rows"]) == (24, 9)
    left = {
        cell: {
            (one["column"], one["what"]): (one["count"], one["of"])
            for one in data["left_out"]
            if one["split"] == "train"
        }
        for cell, data in found.items()
    }
    # Two steps of four rows in each stage; the joint reference has as many steps in its one.
    assert left == {
        "plain-s0": {("a", "max_rows"): (15, 24), ("a", "no_batch"): (1, 9), ("b", "no_batch"): (16, 24)},
        "joint-plain-s0": {("joint", "max_rows"): (15, 48), ("joint", "no_batch"): (17, 33)},
        "frozen-plain-s0": {
            ("a", "max_rows"): (15, 24),
            ("a", "unread_split"): (9, 9),
            ("b", "unread_split"): (24, 24),
        },
    }


def test_labels_have_their_majority_line(llama: Path, tmp_path: Path) -> None:
    """What the most frequent training label would score: in the record, below the matrix, in the report's tables."""
    base = tiny_config(tmp_path / "data", llama)
    base["data"]["domains"].pop("a")
    found = call("fit", "--config", write_yaml(tmp_path / "c.yaml", base), "--run_dir", tmp_path / "run")
    assert found.code == 0, found.err
    record = json.loads((tmp_path / "run/results.json").read_text())
    lines = {s: (tmp_path / f"data/b-{s}.jsonl").read_text().splitlines() for s in ("train", "test")}
    rows = {split: [json.loads(line) for line in part] for split, part in lines.items()}
    most = Counter(row["completion"] for row in rows["train"]).most_common(1)[0][0]
    share = sum(row["completion"] == most for row in rows["test"]) / len(rows["test"])
    assert record["data"]["domains"]["b"]["test"]["majority"] == share == majority(record, "accuracy", "b")
    assert majority(record, "nll", "b") is None
    console = Console(file=io.StringIO(), width=120)
    console.print(score_table(record, "accuracy"))
    assert f"majority {share:.3f}" in " ".join(console.file.getvalue().split())  # type: ignore[attr-defined]
    page = build(tmp_path / "run", output=tmp_path / "report", scorer="accuracy").read_text(encoding="utf-8")
    assert "what the most frequent label of the training rows would score" in page
    frame = pl.read_parquet(tmp_path / "report/tables/domains.parquet")
    assert frame["majority"].to_list() == [share]


def test_a_guard_passes_everything_on() -> None:
    """A method that it forgot would be swallowed in silence, as the counts of the data once were."""
    public = {name for name in vars(View) if not name.startswith("_") and callable(getattr(View, name))}
    assert public <= {*vars(GuardedView)}


@pytest.mark.parametrize("copied", ["test", "train"])
def test_validation_rows_that_are_scored_or_trained_on_are_refused(copied: str, llama: Path, tmp_path: Path) -> None:
    other = files(tmp_path)["kitchen"]
    assert isinstance(other, Jsonl)
    readers: dict[str, Domain] = {
        "kitchen": Jsonl(train=other.train, test=other.test, validation=getattr(other, copied), max_validation=None)
    }
    with pytest.raises(
        UserError, match=rf"data\.domains\.kitchen\.validation: \d+ validation rows are {copied} rows too"
    ):
        train(tmp_path / "run", llama, Full(), {}, data={"domains": readers}, steps=1)
    assert not (tmp_path / "run" / "stages").exists()


def test_the_command(llama: Path, tmp_path: Path) -> None:
    """Table, JSON, rows as the model reads them, a cleaned copy, exit codes."""
    train_file, test_file = written(tmp_path, "t", start=0, count=520), written(tmp_path, "e", start=1000, count=110)
    words = ["doctor", train_file, test_file, f"--model={llama}", f"--json={tmp_path / 'found.json'}"]
    clean = call(*words, "--show", "1")
    assert clean.code == 0, clean.out
    assert "[[" in clean.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["domains"]["data"]["train"]["prompt_tokens"]["max"] > 10
    lines = Path(train_file).read_text().splitlines()
    Path(train_file).write_text("\n".join([*lines, Path(test_file).read_text().splitlines()[0]]))
    before = Path(train_file).read_bytes()
    leaking = call(*words, "--fix", f"--output={tmp_path / 'cleaned'}")
    assert leaking.code == 2
    assert "error   data/test  1 test rows are train rows too" in leaking.out
    assert Path(train_file).read_bytes() == before
    mended = [str(tmp_path / "cleaned" / "data" / f"{split}.jsonl") for split in ("train", "validation", "test")]
    again = call("doctor", *mended, f"--model={llama}")
    assert again.code == 0, again.out

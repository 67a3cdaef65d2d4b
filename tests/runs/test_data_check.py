"""The check of the data before every run: told, recorded, and refused where scores would mean nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from residency.adapters import Full
from residency.core.errors import UserError
from residency.domains.base import Domain
from residency.domains.jsonl import Jsonl
from residency.testing.tiny_runs import domains, train
from support.cli import call

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

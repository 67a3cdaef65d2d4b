"""Rows that an augmentation makes, in whole runs: told, recorded, part of the key, in no memory unasked."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from residency.adapters import Full
from residency.backbones.pretrained import Pretrained
from residency.core.tensor_files import write_json
from residency.domains.augmentation import Synonyms
from residency.domains.table import Table
from residency.domains.template import Template
from residency.mitigations import DER, GEM, Mitigation, Replay
from residency.mitigations.rehearsal.memory import unpack_examples
from residency.report.page.build import build
from residency.runs.cli import parse
from residency.runs.store.store import Store
from residency.study.worker import domain_key, rows_facts, rows_of, take_rows
from residency.testing.tiny_runs import domains, train
from support.cli import call, read_json, tiny_config, write_yaml
from support.small_wordnet import SYNSETS, write_wordnet

SPLITS = {"train": 8, "validation": 2, "test": 3}


def files(folder: Path) -> dict[str, str]:
    """Eight training rows with one word that has two synonyms."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, many in SPLITS.items():
        texts = [(f"{split} {i} of {split}: ask the physician", f"yes {i}") for i in range(many)]
        rows = [{"id": f"{split}{i}", "prompt": p, "completion": c} for i, (p, c) in enumerate(texts)]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {split: str(folder / f"{split}.jsonl") for split in SPLITS}


def config(folder: Path, backbone: Path, **options: Any) -> dict[str, Any]:
    """The tiny config with a domain before the others that has synonyms."""
    made = tiny_config(folder / "data", backbone)
    given = {"wordnet": str(write_wordnet(folder / "wordnet")), "share": 1.0, **options}
    method = {"class_path": "residency.domains.augmentation.Synonyms", "init_args": given}
    arguments = {**files(folder / "care"), "augment": [method], "max_share": 0.4, "scorers": ["nll"]}
    table = {"class_path": "residency.domains.Table", "init_args": arguments}
    made["data"]["domains"] = {"care": table, "a": made["data"]["domains"]["a"]}
    return made


def parsed(path: Path) -> Any:
    return parse(["fit", "--config", str(path)])


def test_a_run_tells_what_was_made_and_goes_on_with_the_same_rows(llama: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "c.yaml", config(tmp_path, llama))
    done = call("fit", "--config", path, "--run_dir", tmp_path / "run")
    assert done.code == 0, done.err
    record = read_json(tmp_path / "run/results.json")
    (made,) = record["data"]["augmented"]["care"]
    # Two fifths of all training rows are five beside eight.
    assert (made["method"], made["asked"], made["kept"], made["not_asked"]) == ("synonyms", 5, 5, 3)
    assert "care: 5 of 5 rows made by synonyms; 3 more would be above max_share" in done.out
    assert record["data"]["domains"]["care"]["train"]["rows"] == 13
    assert all(one["count"] > 0 for one in record["data"]["left_out"])
    page = build(tmp_path / "run", output=tmp_path / "report").read_text(encoding="utf-8")
    assert "Rows that were made of training rows" in page
    again = call("fit", "--config", path, "--run_dir", tmp_path / "run")
    assert again.code == 0
    assert "nothing to train" in again.out
    # Other synonyms are other rows, and one matrix is not made of both.
    write_wordnet(tmp_path / "wordnet", {**SYNSETS, "noun": [["physician", "medic"]]})
    other = call("fit", "--config", path, "--run_dir", tmp_path / "run")
    assert other.code == 2
    assert "rows or template of care" in other.err


def test_what_all_domains_teach_together_includes_what_was_made(llama: Path, tmp_path: Path) -> None:
    """The joint reference scores the domains as probes, which make no rows."""
    write_yaml(tmp_path / "c.yaml", config(tmp_path, llama))
    study = write_yaml(tmp_path / "study.yaml", {"name": "s", "base": "c.yaml", "references": ["joint"]})
    planned = call("sweep", study, "--dry-run", "--study_dir", tmp_path / "out", "--store", tmp_path / "store")
    assert planned.code == 0, planned.err
    assert "joint" in planned.out


def written_by(folder: Path, backbone: Path) -> Path:
    """The config with rewordings by the model of the run instead of synonyms."""
    made = config(folder, backbone)
    made["data"]["domains"]["care"]["init_args"]["augment"] = [
        {"class_path": "residency.domains.augmentation.Paraphrase"}
    ]
    return write_yaml(folder / "p.yaml", made)


def test_what_a_model_writes_is_written_once_and_counted(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tokens are part of the cost of the stage; a second run reads what the first one wrote."""
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    path = written_by(tmp_path, llama)

    def write(self: Pretrained, request: str, **options: Any) -> str:
        self.tokens += 100
        start, _, end = request.rpartition("\n\n")[2].partition(": ")
        return f"{end}, {start}"

    monkeypatch.setattr(Pretrained, "write", write)
    runs = [tmp_path / name for name in ("run", "again")]
    first = call("fit", "--config", path, "--run_dir", runs[0])
    assert first.code == 0, first.err

    def fail(self: Pretrained, request: str, **options: Any) -> str:
        raise AssertionError("it was written before")

    monkeypatch.setattr(Pretrained, "write", fail)
    assert call("fit", "--config", path, "--run_dir", runs[1]).code == 0
    records = [read_json(run / "results.json") for run in runs]
    (made,) = records[0]["data"]["augmented"]["care"]
    assert 0 < made["kept"] <= made["asked"] == 5
    assert made["tokens"] >= 500
    assert records[0]["scores"] == records[1]["scores"]
    assert records[0]["data"]["augmented"] == records[1]["data"]["augmented"]
    stage = read_json(next((runs[1] / "stages").glob("*-care")) / "stage.json")
    assert stage["augment_tokens"] == made["tokens"]
    trained = sum(read_json(f)["train_tokens"] + read_json(f).get("finish_tokens", 0) for f in
                  (runs[1] / "stages").glob("[12]-*/stage.json"))  # fmt: skip
    assert records[1]["cost"]["train_tokens"] == trained + made["tokens"]


def test_a_model_that_writes_nothing_of_use_is_refused_before_training(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    done = call("fit", "--config", written_by(tmp_path, llama), "--run_dir", tmp_path / "run")
    assert done.code == 2
    assert "Paraphrase made 0 rows that can be used of 5" in done.err
    assert not (tmp_path / "run/results.json").exists()


MEMORIES: dict[str, Callable[[], Mitigation]] = {
    "reservoir": lambda: Replay(capacity=50),
    "ring": lambda: Replay(capacity=50, policy="ring"),
    "der": lambda: DER(capacity=50),
    "gem": lambda: GEM(capacity=50),
}


@pytest.mark.parametrize("kept", [False, True], ids=["unasked", "asked"])
@pytest.mark.parametrize("name", MEMORIES)
def test_memories_keep_children_only_where_the_method_says_so(
    name: str, kept: bool, llama: Path, tmp_path: Path
) -> None:
    method = Synonyms(wordnet=str(write_wordnet(tmp_path / "wordnet")), share=1.0, replay_augmented=kept)
    table = Table(**files(tmp_path / "care"), augment=[method], template=Template(max_tokens=64), scorers=["nll"])
    stream = {"care": table, "a": domains(tmp_path / "data", {"a": "generative"})["a"]}
    memory = MEMORIES[name]()
    record, _ = train(tmp_path / "run", llama, Full(), {"memory": memory}, steps=6, data={"domains": stream})
    assert record["data"]["augmented"]["care"][0]["kept"] == 8
    names = remembered(memory)
    assert names
    assert any("~synonyms" in row for row in names) == kept


def remembered(memory: Mitigation) -> list[str]:
    """Ids of the rows in a memory."""
    buffer = memory.state["buffer"]
    assert isinstance(buffer, dict)
    return [example.row for example in unpack_examples(buffer) if example.domain == "care"]


def copy_rows(source: Path, folder: Path) -> None:
    shutil.copy(source / "rows.json", folder / "rows.json")


def test_workers_learn_from_the_rows_of_the_plan(llama: Path, tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "c.yaml", config(tmp_path, llama))
    plan, worker, store = parsed(path), parsed(path), Store(tmp_path / "store")
    facts = {}
    for key, domain in rows_of(plan.datamodule, plan.resolved):
        facts[key] = json.loads(json.dumps(rows_facts(domain)))
        write_json(tmp_path / domain.fingerprint() / "rows.json", domain.give_rows())
        store.put("data", domain.fingerprint(), partial(copy_rows, tmp_path / domain.fingerprint()), meta={})
    for file in (tmp_path / "wordnet").iterdir():
        file.unlink()
    take_rows(worker.datamodule, worker.resolved, facts, store)
    for name, domain in plan.datamodule.domains.items():
        assert worker.datamodule.domains[name].rows("train") == domain.rows("train")
    assert worker.datamodule.augmented() == plan.datamodule.augmented() != {}


def test_domains_that_make_rows_are_shared_only_where_the_rows_are_equal(llama: Path, tmp_path: Path) -> None:
    """Which rows are made depends on what else is scored, and on who writes; which are read does not."""
    one = parsed(write_yaml(tmp_path / "c.yaml", config(tmp_path, llama))).resolved
    for change in (
        lambda c: c["data"]["domains"].pop("a"),
        lambda c: c["model"]["backbone"]["init_args"].update(dtype="bfloat16"),
    ):
        other = json.loads(json.dumps(one))
        change(other)
        care, plain = one["data"]["domains"]["care"], one["data"]["domains"]["a"]
        assert domain_key(other, care) != domain_key(one, care)
        assert domain_key(other, plain) == domain_key(one, plain)

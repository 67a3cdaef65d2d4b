"""Benchmarks of lm-eval from a local task file, through the live model, offline."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from residency.core.errors import UserError
from residency.core.types import Example
from residency.domains.stream_data import StreamData
from residency.inspection import Inspection, LmEval
from residency.objectives.sft import token_nll
from residency.runs.judgement import general_ability
from residency.testing.tiny_runs import domains, make_module
from table import ADAPTERS

pytest.importorskip("lm_eval", reason="the extra lm-eval is not installed")

ROWS = [{"question": f"{a} + 1 =", "choices": [f" {a + 1}", f" {a + 3}"], "answer": 0} for a in range(6)]


@pytest.fixture
def tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "tasks"
    folder.mkdir()
    data = folder / "sums.json"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    task = {
        "task": "tiny_sums",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "doc_to_choice": "{{choices}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1},
    }
    (folder / "sums.yaml").write_text(yaml.safe_dump(task))
    return folder


def looked(module: Any, data: StreamData, observer: LmEval, k: int) -> dict[str, Any]:
    facts = Inspection({"bench": observer}).after_stage(
        module, data, k=k, seed=0, states=lambda stage: module.adapter.state(module.model), facts={}
    )
    found: dict[str, Any] = facts["inside"]["bench"]["benchmarks"]
    return found


def test_a_local_task_through_the_live_model(tasks: Path, tmp_path: Path, llama: Path) -> None:
    module = make_module(llama, ADAPTERS["lora"].make(), {})
    module.build(seed=0)
    data = StreamData(domains=domains(tmp_path / "data", {"a": "generative"}))
    observer = LmEval(tasks=["tiny_sums"], include_path=str(tasks), batch_size=4)
    generators = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # type: ignore[union-attr]
    base = looked(module, data, observer, 0)
    assert random.getstate() == generators[0]
    assert (np.random.get_state()[1] == generators[1]).all()  # type: ignore[index]
    assert torch.equal(torch.get_rng_state(), generators[2])
    # The state of the live model counts, and its adapter is off before training.
    with torch.no_grad():
        for name, leaf in module.adapter.trainable(module.model).items():
            leaf.normal_(generator=torch.Generator().manual_seed(len(name)))
    module.model.train()
    assert looked(module, data, observer, 0) == base
    after = looked(module, data, observer, 1)
    assert module.model.training
    assert after["tiny_sums"]["value"] == pytest.approx(accuracy(module), rel=1e-5)
    assert set(after["tiny_sums"]) == {"metric", "value", "stderr", "higher_is_better", "rows"}
    assert (after["tiny_sums"]["metric"], after["tiny_sums"]["rows"]) == ("acc", 6)
    delta = general_ability({}, domains=1, probes=[], inside=[{"bench": {"benchmarks": f}} for f in (base, after)])
    assert delta["lm_eval/acc"]["mean"] == pytest.approx(
        after["tiny_sums"]["value"] - base["tiny_sums"]["value"], abs=1e-6
    )
    short = LmEval(tasks=["tiny_sums"], include_path=str(tasks), rows=2)
    assert looked(module, data, short, 1)["tiny_sums"]["rows"] == 2


def accuracy(module: Any) -> float:
    """The same by our own likelihoods."""
    encode, hits = module.backbone.tokenizer.encode, 0
    for row in ROWS:
        nll = []
        for choice in row["choices"]:  # type: ignore[attr-defined]
            example = Example.of(
                domain="x", row="0", prompt=tuple(encode(row["question"])), completion=tuple(encode(choice))
            )
            batch = module.objective.collate([example], layout=module.layout)
            with torch.no_grad():
                module.model.eval()
                nll.append(float(token_nll(module.forward(batch), batch.targets).sum()))
        hits += nll[0] < nll[1]
    return hits / len(ROWS)


def test_what_cannot_be_run_is_refused(tasks: Path, tmp_path: Path, llama: Path) -> None:
    with pytest.raises(UserError, match="at least one task"):
        LmEval(tasks=[], include_path=str(tasks))
    with pytest.raises(UserError, match="folder of task files"):
        LmEval(tasks=["tiny_sums"], include_path=str(tasks / "absent"))
    module = make_module(llama, ADAPTERS["lora"].make(), {})
    module.build(seed=0)
    data = StreamData(domains=domains(tmp_path / "data", {"a": "generative"}))
    with pytest.raises(UserError, match="tiny_sums"):
        looked(module, data, LmEval(tasks=["mmlu"], include_path=str(tasks)), 0)

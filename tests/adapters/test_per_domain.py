"""Per-domain adapters: nothing is forgotten, and the record says what not knowing the domain would cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, PromptTuningConfig

from attached import EXAMPLES, attach, backbone, logits
from growing import go
from residency.adapters import PerDomain
from residency.adapters.learnt import learnt
from residency.adapters.per_domain import lowest
from residency.errors import UserError
from residency.routing import routing_summary
from running import train
from table import ADAPTERS

KINDS = {"a": "generative", "b": "label", "c": "generative"}


def per_domain(**options: Any) -> PerDomain:
    return PerDomain(config=LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=6), **options)


@pytest.fixture(scope="module")
def runs(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The records of the same stream with each routing."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        routing: train(folder / routing, llama, per_domain(routing=routing), steps=6, lr=3e-2, kinds=KINDS)[0]
        for routing in ("oracle", "nll", "last")
    }


def test_with_the_task_id_nothing_moves_after_its_stage(runs: dict[str, Any]) -> None:
    record = runs["oracle"]
    assert record["task_id_at_test"] is True
    for scores in record["scores"].values():
        for j, column in enumerate(zip(*scores["R"], strict=True)):
            assert len({*column[j + 1 :]}) == 1, "learnt once, never changed, bit for bit"
            assert len({*column[: j + 1]}) == 1, "until then it is the pretrained model"
    nll = record["scores"]["nll"]["R"]
    assert all(nll[3][j] < nll[0][j] for j in range(3)), "and it did learn"


def test_the_record_holds_every_adapter_on_every_domain(runs: dict[str, Any]) -> None:
    routing = runs["oracle"]["routing"]
    assert routing["parts"] == routing["domains"] == ["a", "b", "c"]
    rows = runs["last"]["scores"]["nll"]["R"]
    for a in range(3):
        # The newest adapter after stage a is adapter a: training is the same whoever is asked later.
        assert routing["C"][a] == pytest.approx(rows[a + 1], rel=1e-6)
    oracle = runs["oracle"]["scores"]["nll"]["R"][3]
    assert [routing["oracle"][d] for d in "abc"] == pytest.approx(oracle, rel=1e-6)
    assert json.loads(json.dumps(routing)) == routing


def test_the_score_without_the_task_id_is_what_such_a_run_gets(runs: dict[str, Any]) -> None:
    agnostic = runs["nll"]["scores"]["nll"]["R"][3]
    assert [runs["oracle"]["routing"]["agnostic"][d] for d in "abc"] == pytest.approx(agnostic, rel=1e-6)
    assert runs["nll"]["task_id_at_test"] is False
    assert runs["nll"]["routing"] == runs["oracle"]["routing"]
    assert agnostic != pytest.approx(runs["oracle"]["scores"]["nll"]["R"][3], rel=1e-3), "some rows went astray"


def test_routing_in_closed_form() -> None:
    """Two parts, three rows of domain x, one of y; the prompt of the third x row misleads."""
    found = routing_summary(
        completion=torch.tensor([[2.0, 4, 6, 9], [4.0, 8, 12, 3]]).double(),
        prompt=torch.tensor([[1.0, 1, 3, 2], [2.0, 2, 2, 1]]).double(),
        tokens=torch.tensor([1.0, 2, 3, 1]).double(),
        column=torch.tensor([0, 0, 0, 1]),
        parts=["x", "y"],
        domains=["x", "y"],
    )
    assert found["C"] == [[2.0, 9.0], [4.0, 3.0]]
    assert found["oracle"] == {"x": 2.0, "y": 3.0}
    assert found["agnostic"] == {"x": (2 + 4 + 12) / 6, "y": 3.0}
    assert found["error"] == {"x": pytest.approx(1 / 3), "y": 0.0}
    assert lowest(torch.tensor([[1.0, 2, 3], [1.0, 1, 4]])).tolist() == [0, 1, 0]


def test_nobody_else_pays(llama: Path, tmp_path: Path) -> None:
    record, _ = train(tmp_path / "run", llama, ADAPTERS["lora"].make(), steps=2, kinds={"a": "generative"})
    assert "routing" not in record
    assert record["task_id_at_test"] is False


def test_rows_are_grouped_by_the_likeliest_prompt(llama: Path) -> None:
    adapter = per_domain(routing="nll")
    model = go(attach(llama, adapter), adapter, 3)
    alone = []
    for context in adapter.routes(model).values():
        with context:
            alone.append(logits(model))
    answers = iter(torch.tensor([[3.0, 1, 2], [1.0, 2, 2], [2.0, 2, 1]]))
    groups = list(adapter.serve(model, "whatever", EXAMPLES, lambda rows: next(answers)))
    assert [[e.row for e in rows] for _, rows in groups] == [["1"], ["0"], ["2"]]
    for (context, _), expected in zip(groups, alone, strict=True):
        with context:
            assert torch.equal(logits(model), expected)


def test_what_is_not_learnt_gets_the_pretrained_model(llama: Path) -> None:
    adapter = per_domain()
    model = go(attach(llama, adapter), adapter, 2)
    plain = logits(backbone(llama).load())
    for column, known in (("d0", True), ("d1", True), ("d2", False), ("a probe", False)):
        [(context, rows)] = adapter.serve(model, column, EXAMPLES, lambda rows: torch.zeros(len(rows)))
        with context:
            assert torch.equal(logits(model), plain) != known
        assert rows is EXAMPLES
    fresh = attach(llama, adapter)
    [(context, _)] = per_domain(routing="nll").serve(fresh, "d0", EXAMPLES, lambda rows: torch.zeros(len(rows)))
    with context:
        assert torch.equal(logits(fresh), plain)


def test_domain_names_survive_in_a_state(llama: Path) -> None:
    adapter = per_domain()
    model = go(attach(llama, adapter), adapter, 2)
    model.register_buffer("learnt_001", torch.tensor(list("Recht / ../§ 🧑‍⚖️".encode()), dtype=torch.uint8))
    fresh = attach(llama, adapter)
    adapter.load_state(fresh, adapter.state(model))
    assert learnt(fresh) == {"d0": 0, "Recht / ../§ 🧑‍⚖️": 1}


def test_every_domain_is_exported(llama: Path, tmp_path: Path) -> None:
    adapter = per_domain()
    model = go(attach(llama, adapter), adapter, 2)
    adapter.export(model, tmp_path)
    folders = json.loads((tmp_path / "domains.json").read_text())
    assert folders == {"d0": "domains/1", "d1": "domains/2"}
    for domain, context in adapter.routes(model).items():
        loaded = PeftModel.from_pretrained(backbone(llama).load(), tmp_path / folders[domain])
        with context:
            torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-6)


def test_any_tuner_that_changes_weights(llama: Path) -> None:
    adapter = PerDomain(config=IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), routing="last")
    model = go(attach(llama, adapter), adapter, 2)
    fresh = attach(llama, adapter)
    adapter.load_state(fresh, adapter.state(model))
    assert torch.equal(logits(fresh), logits(model))
    expected = logits(model)
    torch.testing.assert_close(logits(adapter.merge(model)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [LoraConfig(init_lora_weights="pissa"), LoraConfig(bias="all"), PromptTuningConfig(num_virtual_tokens=3)],
    ids=["pissa", "bias", "prompt"],
)
def test_what_has_no_common_base_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match=r"same frozen base.*\n.*progressive_prompts.yaml"):
        PerDomain(config=config)

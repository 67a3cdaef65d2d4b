"""One adapter per domain: nothing is forgotten, and who answers is said or found."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, VeraConfig

from residency.adapters import PerDomain
from residency.adapters.per_domain import group_rows, lowest
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.core.types import Example
from residency.testing.tiny_runs import train

LORA = {"r": 4, "target_modules": "all-linear"}


def matrix(record: dict[str, Any], scorer: str) -> list[list[float | None]]:
    """R without the probes."""
    rows: list[list[float | None]] = record["scores"][scorer]["R"]
    return rows


@pytest.fixture(scope="module")
def oracle(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    folder = tmp_path_factory.mktemp("oracle") / "run"
    record, module = train(folder, llama, PerDomain(config=LoraConfig(**LORA)), lr=3e-2, steps=8)
    return record, module, folder


def test_nothing_is_forgotten_bit_for_bit(oracle: Any) -> None:
    record, _, _ = oracle
    assert record["task_id_at_test"] is True
    R = matrix(record, "nll")
    for j in range(3):
        learned = [R[i][j] for i in range(j + 1, 4)]
        assert len({*learned}) == 1, "a learned domain is answered by the same adapter for ever"
        assert [R[i][j] for i in range(j + 1)] == [R[0][j]] * (j + 1), "an unknown domain is answered by the base"
    assert record["summary"]["nll"]["forgetting"] == 0


def test_wrong_adapter_matrix_has_the_oracle_on_its_diagonal(oracle: Any) -> None:
    record, _, _ = oracle
    R, C = matrix(record, "nll"), matrix(record, "nll_newest")
    assert C[0] == [None] * 3
    for k in range(1, 4):
        assert C[k][k - 1] == pytest.approx(R[k][k - 1], abs=1e-5)
        others = [abs(C[k][j] - R[k][j]) for j in range(k - 1)]
        assert not others or max(others) > 1e-3, "another domain's adapter is not one's own"


def test_routed_scores_are_those_of_the_chosen_adapters(oracle: Any) -> None:
    record, _, _ = oracle
    routed, newest, error = (matrix(record, name) for name in ("nll_routed", "nll_newest", "routing_error"))
    assert routed[1] == newest[1], "with one adapter there is nothing to choose"
    assert error[1] == [0.0, None, None], "the error is known for domains that have an adapter"
    for i in (2, 3):
        assert all(0 <= value <= 1 for value in error[i][:i])
        R = matrix(record, "nll")
        for j in range(i):
            if error[i][j] == 0:
                assert routed[i][j] == pytest.approx(R[i][j], abs=1e-5)


def test_routing_by_prompt_equals_the_routed_score_of_the_oracle_run(oracle: Any, llama: Path, tmp_path: Path) -> None:
    record, _, _ = oracle
    found, _ = train(tmp_path / "run", llama, PerDomain(config=LoraConfig(**LORA), routing="nll"), lr=3e-2, steps=8)
    assert found["task_id_at_test"] is False
    assert "nll_routed" not in found["scores"]
    for i in (1, 2, 3):
        assert matrix(found, "nll")[i] == pytest.approx(matrix(record, "nll_routed")[i], abs=1e-5)


def test_last_is_the_newest_adapter(oracle: Any, llama: Path, tmp_path: Path) -> None:
    record, _, _ = oracle
    found, _ = train(tmp_path / "run", llama, PerDomain(config=LoraConfig(**LORA), routing="last"), lr=3e-2, steps=8)
    for i in (1, 2, 3):
        assert matrix(found, "nll")[i] == pytest.approx(matrix(record, "nll_newest")[i], abs=1e-5)


def test_earlier_adapters_stay_bit_for_bit(oracle: Any) -> None:
    _, module, folder = oracle
    states = [
        load_tree(folder / "stages" / f"{k}-{n}" / "state.safetensors")["weights"] for k, n in ((1, "a"), (3, "c"))
    ]
    own = [name for name in states[0] if ".domain1." in name]
    assert own
    assert all(torch.equal(states[0][name], states[1][name]) for name in own)
    assert module.adapter.domains(module.model) == ["a", "b", "c"]


def test_export_writes_every_adapter(oracle: Any, tmp_path: Path) -> None:
    _, module, _ = oracle
    module.adapter.export(module.model, tmp_path)
    found = sorted(path.parent.name for path in tmp_path.glob("*/adapter_config.json"))
    assert found == ["block-1", "block-2", "block-3"]
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "block-3" / "adapter_model.safetensors"
    ).read_bytes()


def test_lowest_and_groups() -> None:
    nll = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.5, 4.0]])
    assert lowest(nll).tolist() == [0, 1, 0], "the earliest of equals"
    rows = [Example.of(domain="x", row=str(i), prompt=(1,), completion=(2,)) for i in range(4)]
    groups = group_rows([1, 0, 1, 0], rows)
    assert {block: [e.row for e in group] for block, group in groups.items()} == {0: ["1", "3"], 1: ["0", "2"]}
    assert list(groups) == [0, 1]


@pytest.mark.parametrize(
    "config",
    [VeraConfig(), LoraConfig(init_lora_weights="pissa"), LoraConfig(bias="all")],
    ids=["vera", "pissa", "bias"],
)
def test_what_cannot_stand_side_by_side_is_refused(config: Any) -> None:
    with pytest.raises(UserError, match=r"PerDomain.*\n.*one unchanged base.*\n.*use peft\.LoraConfig"):
        PerDomain(config=config)

"""Exports as the ecosystem takes them: the hub's id and commit in the adapter, a card that hubs read, push."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM

import residency
from residency.core.errors import UserError
from residency.runs.export.hub_base import hub_model
from residency.runs.export.push import check_card
from support.cli import call, read_json, tiny_config, write_yaml

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HUB_ID = "lab/tiny-llama"


@pytest.fixture(scope="module")
def cache(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hub cache without a network that holds one model under its id."""
    folder = tmp_path_factory.mktemp("hub")
    repo = folder / "models--lab--tiny-llama"
    shutil.copytree(llama, repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return folder


@pytest.fixture(autouse=True)
def _offline(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture(scope="module")
def exported(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA that was trained on the cached model, named by its id."""
    folder = tmp_path_factory.mktemp("exported")
    config = tiny_config(folder / "data", cache / "models--lab--tiny-llama" / "snapshots" / COMMIT)
    path = write_yaml(folder / "c.yaml", config)
    assert call("fit", "--config", path, "--run_dir", folder / "run").code == 0
    return Path(residency.export(folder / "run", stage=2)["path"])


def test_the_adapter_names_its_base_by_id_and_commit(exported: Path) -> None:
    config = read_json(exported / "adapter_config.json")
    assert (config["base_model_name_or_path"], config["revision"]) == (HUB_ID, COMMIT)
    everything = "".join(p.read_text() for p in exported.iterdir() if p.suffix in (".json", ".md"))
    assert str(exported.parents[2]) not in everything


def test_plain_peft_finds_the_base_by_itself_in_an_offline_cache(exported: Path, cache: Path) -> None:
    ids = torch.arange(20, 44).view(2, 12)
    snapshot = cache / "models--lab--tiny-llama" / "snapshots" / COMMIT
    found: Any = AutoPeftModelForCausalLM.from_pretrained(exported)
    plain = AutoModelForCausalLM.from_pretrained(snapshot)
    with torch.no_grad():
        assert not torch.equal(found(input_ids=ids).logits, plain(input_ids=ids).logits)
        with found.disable_adapter():
            torch.testing.assert_close(found(input_ids=ids).logits, plain(input_ids=ids).logits, rtol=0, atol=1e-6)


def test_the_card_is_what_hubs_read(exported: Path) -> None:
    card = ModelCard.load(exported / "README.md")
    assert (card.data.base_model, card.data.library_name, card.data.pipeline_tag) == (HUB_ID, "peft", "text-generation")
    facts = read_json(exported / "residency.json")
    results = {(r.metric_type, r.dataset_name): r.metric_value for r in card.data.eval_results}
    assert results == {(scorer, column): v for scorer, row in facts["scores"].items() for column, v in row.items()}
    assert check_card(exported / "README.md").data.to_dict() == card.data.to_dict()


def test_a_dry_run_lists_what_would_go(exported: Path) -> None:
    result = call("push", exported, "--repo", "me/tiny", "--dry-run")
    assert result.code == 0, result.err
    assert "adapter_model.safetensors" in result.out
    assert "would go to me/tiny" in result.out


def test_the_real_client_is_given_the_folder_and_a_private_repository(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []
    api = "huggingface_hub.HfApi"
    monkeypatch.setattr(f"{api}.create_repo", lambda self, repo, **options: calls.append((repo, options)))
    monkeypatch.setattr(f"{api}.upload_folder", lambda self, **options: calls.append(("up", options)) or "https://x/1")
    assert residency.push(exported, repo="me/tiny")["url"] == "https://x/1"
    assert calls[0] == ("me/tiny", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == exported


def test_what_is_no_export_or_has_a_broken_card_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no export"):
        residency.push(tmp_path, repo="me/x")
    with pytest.raises(UserError, match="owner/name"):
        residency.push(exported, repo="../x", dry_run=True)
    shutil.copytree(exported, tmp_path / "copy")
    card = tmp_path / "copy" / "README.md"
    card.write_text(card.read_text().replace(f"base_model: {HUB_ID}", "base_model: /home/me/model"))
    with pytest.raises(UserError, match="base_model"):
        residency.push(tmp_path / "copy", repo="me/x", dry_run=True)


def test_a_plain_folder_has_no_id(tmp_path: Path) -> None:
    assert hub_model(tmp_path) is None

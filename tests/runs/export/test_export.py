"""`residency export`: what other programs load, the merge tax, the card, and folders that are whole or not there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

import residency
from residency.adapters import Adapter, Bottleneck, Full
from residency.adapters.export_format import attach_exported
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.tensor_files import load_tree
from residency.runs.export.export import check_request, difference, merged_model
from residency.runs.export.model_card import model_card, text
from residency.testing.tiny_runs import make_module
from support.cli import call, read_json, tiny_config, write_yaml

IDS = torch.arange(20, 44).view(2, 12)
HOSTILE = ("../../x", "<script>alert(1)</script>|**b**[c](http://d)")


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits  # type: ignore[no-any-return]


def fitted(folder: Path, backbone: Path, adapter: dict[str, Any] | None = None, **options: Any) -> Path:
    """A finished run whose domains have names that mean harm."""
    config = tiny_config(folder / "data", backbone)
    config["data"]["domains"] = dict(zip(HOSTILE, config["data"]["domains"].values(), strict=True))
    config["evaluation"] = {"generation_rows": 2}
    if adapter is not None:
        config["model"]["adapter"] = adapter
    config["model"]["backbone"]["init_args"] |= options
    result = call("fit", "--config", write_yaml(folder / "c.yaml", config), "--run_dir", folder / "run")
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LoRA on a Llama with a tied head."""
    return fitted(tmp_path_factory.mktemp("lora"), llama)


def trained(run: Path, backbone: Path, adapter: Adapter, stage: int) -> nn.Module:
    """The model of a stage, restored by hand."""
    module = make_module(backbone, adapter, {})
    module.build(seed=0)
    folder = next((run / "stages").glob(f"{stage}-*"))
    module.adapter.load_state(module.model, load_tree(folder / "state.safetensors")["weights"])
    return module.model


def row(run: Path, stage: int) -> dict[str, dict[str, float]]:
    record = read_json(run / "results.json")
    return {
        name: {c: v for c, v in zip(record["domains"], entry["R"][stage], strict=True) if v is not None}
        for name, entry in record["scores"].items()
    }


def test_an_adapter_for_plain_peft(run: Path, llama: Path) -> None:
    found = residency.export(run, stage=1)
    folder = Path(found["path"])
    assert folder == run / "export" / "1-x"
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32), folder)
    expected = logits(trained(run, llama, lora(r=4, target_modules="all-linear"), 1))
    torch.testing.assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    assert found["scores"] == row(run, 1)
    assert found["merge_tax"] == {}
    assert (found["stage"], found["domain"], found["format"]) == (1, HOSTILE[0], "peft")
    assert (
        AutoTokenizer.from_pretrained(folder)("abc").input_ids == AutoTokenizer.from_pretrained(llama)("abc").input_ids
    )


def test_a_merged_model_and_its_tax(run: Path, llama: Path, tmp_path: Path) -> None:
    before = sorted(path for path in run.rglob("*") if "export" not in path.parts)
    result = call("export", run, "--stage", 2, "--merge", "--output", tmp_path / "out")
    assert result.code == 0, result.err
    assert "merge tax" in result.out
    assert before == sorted(path for path in run.rglob("*") if "export" not in path.parts), "the run is only read"
    expected = logits(trained(run, llama, lora(r=4, target_modules="all-linear"), 2))
    # In a process that has never heard of residency.
    code = (
        "import sys, torch; from transformers import AutoModelForCausalLM as A;"
        "torch.set_num_threads(1); m = A.from_pretrained(sys.argv[1]).eval();"
        "assert 'residency' not in sys.modules;"
        "torch.save(m(input_ids=torch.arange(20, 44).view(2, 12)).logits.detach(), sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "out", tmp_path / "logits"], check=True, timeout=120)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), expected, rtol=0, atol=1e-4)
    facts = read_json(tmp_path / "out" / "residency.json")
    assert facts["scores"] == row(run, 2)
    assert {scorer: {*tax} for scorer, tax in facts["merge_tax"].items()} == {
        scorer: {*scores} for scorer, scores in facts["scores"].items()
    }
    assert all(abs(tax) < 1e-4 for tax in facts["merge_tax"]["nll"].values())
    with safe_open(tmp_path / "out" / "model.safetensors", framework="pt") as file:
        assert not [name for name in file.keys() if "lm_head" in name or "lora" in name]  # noqa: SIM118 (not a dict)


def test_the_tax_is_merged_minus_unmerged() -> None:
    tax = difference({"nll": {"a": 2.5, "b": 1.0}, "x": {"a": 1.0}}, {"nll": {"a": 2.0, "c": 0.0}})
    assert tax == {"nll": {"a": 0.5}}


def test_rounding_has_a_tax(run: Path) -> None:
    taxes = [
        residency.export(run, stage=2, merge=True, dtype=d, overwrite=True)["merge_tax"] for d in (None, "bfloat16")
    ]
    rounded, exact = (max(abs(v) for v in tax["nll"].values()) for tax in taxes[::-1])
    assert rounded > 10 * exact
    folder = next((run / "export").glob("2-*-merged"))
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16


def test_a_card_says_who_was_told_the_domain(run: Path) -> None:
    facts = read_json(Path(residency.export(run, stage=1, overwrite=True)["path"]) / "residency.json")
    assert not facts["task_id_at_test"]
    told = "with the name of each domain known"
    assert told not in model_card(facts)
    assert told in model_card({**facts, "task_id_at_test": True})


def test_the_card(run: Path) -> None:
    folder = Path(residency.export(run, stage=2, merge=True, overwrite=True)["path"])
    card = (folder / "README.md").read_text(encoding="utf-8")
    _, head, body = card.split("---\n", 2)
    assert yaml.safe_load(head)["license"] == "other"
    assert "<script" not in body
    assert "](http" not in body
    assert "**b**" not in body
    order = body.index("Stream: " + text(HOSTILE[0]) + " → **" + text(HOSTILE[1]))
    assert order > 0
    tables = [line for line in body.splitlines() if line.startswith("|")]
    cells = {line.replace("\\|", "").count("|") for line in tables}
    assert cells == {6, 3}, "names do not open cells"
    nll = row(run, 2)["nll"]
    assert all(f"{value:.4f}" in body for value in nll.values())
    assert str(run) not in card
    assert f"residency {read_json(folder / 'residency.json')['versions']['residency'].replace('.', '.')}" in body


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("plain-name 1.0", "plain-name 1.0"),
        ("<b>&amp;", "&lt;b&gt;&amp;amp;"),
        ("a|b\n# c", "a\\|b # c"),
        ("[x](y) `z` _u_ *v*", "\\[x\\]\\(y\\) \\`z\\` \\_u\\_ \\*v\\*"),
        ("\u202eevil\x00", "evil"),
    ],
)
def test_names_are_shown_and_do_nothing_else(name: str, shown: str) -> None:
    assert text(name) == shown


# -- architectures, tied weights, precision -------------------------------------------------------------------------


def spread(model: nn.Module) -> nn.Module:
    """As if it had been trained."""
    draw = torch.Generator().manual_seed(0)
    for p in model.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=draw)
    return model


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "wte"], ["wte", "c_attn"], ["lm_head"]])
def test_merging_on_gpt2_with_a_tied_head(targets: Any, gpt2: Path, tmp_path: Path) -> None:
    """Folding into one of two tied weights would change the other; they are parted then, and stay so in the files."""
    adapter = lora(r=2, target_modules=targets, fan_in_fan_out=targets == "all-linear" or "c_attn" in targets)
    model = spread(adapter.attach(CausalLM(path=str(gpt2)).load()))
    expected = logits(model)
    merged = merged_model(adapter, model, dtype=None)
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    Full().export(merged, tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), expected, rtol=0, atol=1e-4)
    assert merged.config.tie_word_embeddings is (targets == "all-linear")


def test_full_fine_tuning_on_gpt2(gpt2: Path, tmp_path: Path) -> None:
    run = fitted(tmp_path, gpt2, {"class_path": "residency.adapters.Full"})
    found = residency.export(run, stage=1, merge=True)
    expected = logits(trained(run, gpt2, Full(), 1))
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(found["path"])), expected, rtol=0, atol=1e-5)
    assert set(found["merge_tax"]["nll"].values()) == {0.0}, "nothing was folded"
    assert found["format"] == "transformers"


def test_half_precision_is_rounded_once(llama: Path) -> None:
    adapter = lora(r=2, target_modules="all-linear")
    model = spread(adapter.attach(CausalLM(path=str(llama), dtype="bfloat16").load()))
    layer: Any = model.get_submodule("base_model.model.model.layers.0.mlp.up_proj")
    exact = layer.base_layer.weight.float() + layer.get_delta_weight("default").float()
    merged = merged_model(adapter, model, dtype=None)
    assert torch.equal(merged.get_submodule("model.layers.0.mlp.up_proj").weight, exact.bfloat16())


def test_a_4_bit_base_is_merged_on_a_dequantised_copy(llama: Path, tmp_path: Path) -> None:
    quantised = {"quantisation": {"kind": "nf4", "double": True, "compute_dtype": "float32"}}
    run = fitted(tmp_path, llama, **quantised)
    found = residency.export(run, stage=2, merge=True)
    assert all(abs(tax) < 1e-3 for tax in found["merge_tax"]["nll"].values())
    plain = AutoModelForCausalLM.from_pretrained(found["path"])
    assert all(p.dtype == torch.float32 for p in plain.parameters())
    assert "quantization_config" not in read_json(Path(found["path"]) / "config.json")


def test_an_adapter_of_our_own(llama: Path, tmp_path: Path) -> None:
    run = fitted(tmp_path, llama, {"class_path": "residency.adapters.Bottleneck"})
    found = residency.export(run)
    base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
    expected = logits(trained(run, llama, Bottleneck(), 2))
    torch.testing.assert_close(logits(attach_exported(base, found["path"])[1]), expected, rtol=0, atol=1e-5)
    assert "attach_exported" in (Path(found["path"]) / "README.md").read_text()


# -- refusals and atomicity -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adapter", "request_", "message"),
    [
        (Full(), {"stage": 0, "merge": False, "dtype": None}, "stage 0 is the pretrained model"),
        (Full(), {"stage": 1, "merge": False, "dtype": "bfloat16"}, "--dtype bfloat16 without --merge"),
        (Bottleneck(), {"stage": 1, "merge": True, "dtype": None}, "export without --merge"),
    ],
)
def test_what_cannot_work_is_refused(adapter: Adapter, request_: dict[str, Any], message: str) -> None:
    with pytest.raises(residency.UserError, match=message):
        check_request(adapter, **request_)
    check_request(Full(), stage=1, merge=True, dtype="bfloat16")


def test_the_command_refuses_and_leaves_nothing(run: Path, tmp_path: Path) -> None:
    result = call("export", run, "--output", tmp_path / "out", "--stage", 3)
    assert result.code == 2
    assert "saved stages: [1, 2]" in result.err
    assert list(tmp_path.iterdir()) == []
    assert residency.export(run, stage=1, output=tmp_path / "out")["stage"] == 1
    with pytest.raises(residency.UserError, match=r"holds an earlier export.*\n.*\n.*--overwrite"):
        residency.export(run, stage=2, output=tmp_path / "out")


def test_a_stage_without_scores_is_refused(run: Path, tmp_path: Path) -> None:
    record = next((run / "stages").glob("2-*")) / "stage.json"
    kept = record.read_text()
    record.unlink()
    try:
        with pytest.raises(residency.UserError, match="was not scored"):
            residency.export(run, output=tmp_path / "out")
        assert not list(tmp_path.iterdir())
    finally:
        record.write_text(kept)


def test_help_names_the_verb() -> None:
    assert "residency export RUN" in call("--help").out
    shown = call("export", "--help").out
    assert all(option in shown for option in ("--stage", "--merge", "--output", "--overwrite", "--dtype"))

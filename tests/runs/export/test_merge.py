"""`residency merge`: against sums by hand, PEFT itself and our own TIES; refusals; the card."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import residency
from residency.core.errors import UserError
from residency.mitigations.merging.ties import ties
from residency.runs.export.merge import ADAPTER_METHODS, MODEL_METHODS, Recipe, merge_exports, merge_tensors
from residency.runs.export.push import check_card
from support.cli import call, read_json, tiny_config, write_yaml

IDS = torch.arange(20, 44).view(2, 12)


@pytest.fixture(scope="module")
def exports(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """{written as: exports of both stages}."""
    folder = tmp_path_factory.mktemp("merge")
    config = write_yaml(folder / "c.yaml", tiny_config(folder / "data", llama))
    assert call("fit", "--config", config, "--run_dir", folder / "run").code == 0
    return {
        kind: [Path(residency.export(folder / "run", stage=k, merge=kind == "models")["path"]) for k in (1, 2)]
        for kind in ("adapters", "models")
    }


def plain(path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def added(llama: Path, exports: list[Path], weights: list[float]) -> Any:
    """The base with sum_i w_i s B_i A_i added to its weights, from the files alone."""
    model = plain(llama)
    for path, weight in zip(exports, weights, strict=True):
        factors, config = load_file(path / "adapter_model.safetensors"), read_json(path / "adapter_config.json")
        for name, a in factors.items():
            if name.endswith("lora_A.weight"):
                b = factors[name.replace("lora_A", "lora_B")]
                target = model.get_parameter(name.removeprefix("base_model.model.").replace(".lora_A", ""))
                target.data += weight * config["lora_alpha"] / config["r"] * (b @ a)
    return model


@pytest.mark.parametrize("method", ["cat", "svd"])
def test_exact_methods_add_the_updates(
    method: str, exports: dict[str, list[Path]], llama: Path, tmp_path: Path
) -> None:
    recipe = Recipe(method=method, weights=[0.7, 0.5], rank=8 if method == "svd" else None)
    found = merge_exports(exports["adapters"], tmp_path / "out", recipe=recipe, base=str(llama))
    merged = PeftModel.from_pretrained(plain(llama), found["path"]).eval()
    expected = logits(added(llama, exports["adapters"], [0.7, 0.5]))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-4)
    assert not torch.allclose(expected, logits(plain(llama)), atol=1e-3)


@pytest.mark.parametrize("method", ADAPTER_METHODS)
def test_every_method_is_pefts(method: str, exports: dict[str, list[Path]], llama: Path, tmp_path: Path) -> None:
    words = ["--method", method, "--weights", 0.6, 0.4, "--density", 0.3, "--seed", 3, "--base", llama]
    done = call("merge", *exports["adapters"], *words, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    model: Any = PeftModel.from_pretrained(plain(llama), exports["adapters"][0], adapter_name="a")
    model.load_adapter(exports["adapters"][1], adapter_name="b")
    density = 0.3 if any(part in method for part in ("ties", "dare", "prune")) else None
    torch.manual_seed(3)
    model.add_weighted_adapter(["a", "b"], [0.6, 0.4], "c", combination_type=method, density=density)
    model.set_adapter("c")
    merged = PeftModel.from_pretrained(plain(llama), tmp_path / "out").eval()
    torch.testing.assert_close(logits(merged), logits(model.eval()), rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", MODEL_METHODS)
def test_whole_models(method: str, exports: dict[str, list[Path]], llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(method=method, weights=[0.5, 0.5], density=0.6, seed=1)
    for name in ("one", "two"):
        merge_exports(exports["models"], tmp_path / name, recipe=recipe, base=str(llama))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one), "what dare drops is a function of the seed"
    first, second = (plain(path) for path in exports["models"])
    if method in ("linear", "task_arithmetic"):
        mean = {name: (p + second.get_parameter(name)) / 2 for name, p in first.named_parameters()}
        for name, p in plain(tmp_path / "one").named_parameters():
            torch.testing.assert_close(p, mean[name], rtol=0, atol=1e-6)
    assert logits(plain(tmp_path / "one")).isfinite().all()


def test_ends_of_the_arc_and_our_own_ties(exports: dict[str, list[Path]], llama: Path, tmp_path: Path) -> None:
    for place, path in enumerate(exports["models"]):
        recipe = Recipe(method="slerp", weights=[1.0 - place, float(place)])
        out = merge_exports(exports["models"], tmp_path / str(place), recipe=recipe, base=str(llama))["path"]
        torch.testing.assert_close(logits(plain(Path(out))), logits(plain(path)), rtol=0, atol=1e-5)
    vectors = [torch.randn(7, 5, generator=torch.Generator().manual_seed(k)) for k in range(3)]
    ours = ties(vectors, density=0.4)
    torch.testing.assert_close(merge_tensors(vectors, Recipe(method="ties", density=0.4), [1.0] * 3), ours)


def test_the_result_is_an_export_with_a_valid_card(exports: dict[str, list[Path]], llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(method="ties")
    out = Path(merge_exports(exports["adapters"], tmp_path / "out", recipe=recipe, base=str(llama))["path"])
    card = check_card(out / "README.md")
    assert "has not been scored" in ModelCard.load(out / "README.md").text
    assert card.data.library_name == "peft"
    facts = read_json(out / "residency.json")
    assert [one["stage"] for one in facts["merged_from"]] == [1, 2]
    assert "would go to me/it" in call("push", out, "--repo", "me/it", "--dry-run").out
    with pytest.raises(UserError, match="--overwrite"):
        merge_exports(exports["adapters"], out, recipe=recipe, base=str(llama))


def test_what_cannot_be_merged_is_refused(
    exports: dict[str, list[Path]], llama: Path, llama_dropout: Path, gpt2: Path, tmp_path: Path
) -> None:
    def refused(folders: list[Path], message: str, *, base: Path | None = llama, **recipe: Any) -> None:
        with pytest.raises(UserError, match=message):
            merge_exports(folders, tmp_path / "no", recipe=Recipe(**recipe), base=base and str(base))
        assert not (tmp_path / "no").exists()

    adapters, models = exports["adapters"], exports["models"]
    refused(adapters[:1], "1 exports", method="linear")
    refused([adapters[0], models[1]], "peft, transformers", method="linear")
    refused(adapters, "slerp", method="slerp")
    refused(models, "svd", method="svd")
    refused(models, "3 weights", method="slerp", weights=[1.0, 0.0, 0.0])
    refused(models, "density", method="ties", density=1.0)
    refused(adapters, "no model of a hub", method="linear", base=None)
    refused(adapters, "other weights", method="linear", base=gpt2)
    refused([tmp_path, *adapters], "no export", method="linear")
    dora = tmp_path / "dora"
    shutil.copytree(adapters[0], dora)
    config = (dora / "adapter_config.json").read_text().replace('"use_dora": false', '"use_dora": true')
    (dora / "adapter_config.json").write_text(config)
    refused([dora, dora], "use_dora", method="linear")

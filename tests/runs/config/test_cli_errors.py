"""What the user can mend: one message (got, why, fix), exit code 2, no traceback, nothing trained or half written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from support.cli import Result, call, tiny_config, write_yaml

Change = Callable[[dict[str, Any]], object]


@pytest.fixture
def config(llama: Path, tmp_path: Path) -> dict[str, Any]:
    """The tiny stream."""
    return tiny_config(tmp_path / "data", llama)


@pytest.fixture
def untrainable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may be trained."""

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model was trained")

    monkeypatch.setattr(Trainer, "fit", refuse)


def assert_refused(result: Result, *parts: str) -> None:
    """One message of three lines with these parts in their order, and nothing else."""
    assert (result.code, result.out) == (2, ""), result.err
    # Which code of others a config names is told once per process, to whichever command comes first.
    told = r"(residency: code that the config names outside of residency: [^\n]+\n)?"
    assert re.fullmatch(told + r"residency: [^\n]+\n  why: [^\n]+\n  fix: [^\n]+\n", result.err), result.err
    assert re.search(".*".join(map(re.escape, parts)), result.err, re.DOTALL), result.err
    assert "Traceback" not in result.err
    assert "jsonargparse" not in result.err


def assert_nothing_written(run: Path) -> None:
    """No record, no state, no temporary file."""
    assert not list(run.rglob("results.json"))
    assert not list(run.rglob("*.tmp"))
    assert not list(run.rglob("*.safetensors"))


def _domain(config: dict[str, Any]) -> dict[str, Any]:
    return config["data"]["domains"]["a"]["init_args"]  # type: ignore[no-any-return]


def _lora(config: dict[str, Any]) -> dict[str, Any]:
    return config["model"]["adapter"]["init_args"]["config"]["init_args"]  # type: ignore[no-any-return]


def _mitigation(name: str, **arguments: Any) -> Change:
    return lambda c: c["model"].update(mitigations={"x": {"class_path": name, "init_args": arguments}})


FILE: dict[str, tuple[Change, tuple[str, ...]]] = {
    "key at the top": (lambda c: c.update(modle={"x": 1}), ("modle.x: 1", "there is no key", "'model'")),
    "an empty trainer": (lambda c: c.update(trainer=None), ("trainer: None", "leave it out", "trainer.KEY")),
    "a list for a section": (lambda c: c.update(trainer=[1]), ("trainer: [1]", "it is a section")),
    "an empty evaluation": (lambda c: c.update(evaluation=None), ("evaluation: None", "evaluation.KEY")),
    "an empty W&B": (lambda c: c.update(wandb=None), ("wandb: None", "wandb.KEY")),
    "key of the Trainer": (lambda c: c["trainer"].update(max_step=3), ("trainer.max_step", "'trainer.max_steps'")),
    "key of a domain": (
        lambda c: _domain(c).update(trian="x"),
        ("data.domains.a.init_args.trian: x (in ", "tiny.yaml)", "did you mean 'train'?"),
    ),
    "key of a template": (
        lambda c: _domain(c)["template"].update(promt="x"),
        ("data.domains.a.init_args.template.promt", "'prompt'"),
    ),
    "key of a mitigation": (
        _mitigation("EWC", strenght=1),
        ("model.mitigations.x.init_args.strenght", "only strength, mode", "'strength'"),
    ),
    "key of a library's class": (
        lambda c: _lora(c).update(lora_alhpa=1),
        ("config.init_args.lora_alhpa", "'lora_alpha'"),
    ),
    "type": (lambda c: c["data"].update(batch_size="many"), ("data.batch_size: many", "an integer")),
    "type, deep": (
        lambda c: _domain(c)["template"].update(max_tokens="x"),
        ("data.domains.a.init_args.template.max_tokens: x", "an integer"),
    ),
    "type of a mitigation": (_mitigation("EWC", strength="big"), ("init_args.strength: big", "a number")),
    "choice": (lambda c: _domain(c).update(kind="labels"), ("kind: labels", "label, generative or null", "'label'")),
    "mitigations as a list": (
        lambda c: c["model"].update(mitigations=[{"class_path": "EWC"}]),
        ("model.mitigations: [{", "a mapping (key: value) or null"),
    ),
    "class": (_mitigation("EWCC"), ("model.mitigations.x.class_path: EWCC", "'EWC'")),
    "class, full path": (
        lambda c: c["model"]["adapter"]["init_args"]["config"].update(class_path="peft.LoRAConfig"),
        ("peft.LoRAConfig", "no attribute", "'peft.LoraConfig'"),
    ),
    "class of another kind": (
        lambda c: c["model"].update(adapter={"class_path": "residency.mitigations.EWC"}),
        ("model.adapter", "subclass of Adapter", "Full, GaLore, IncLoRA"),
    ),
    "class of a package that is not there": (
        lambda c: c["model"].update(adapter={"class_path": "no_package.X"}),
        ("no_package.X", "No module named 'no_package'"),
    ),
    "class that is abstract": (
        lambda c: c["model"].update(adapter={"class_path": "residency.adapters.Adapter"}),
        ("residency.adapters.Adapter", "abstract", "Full, GaLore, IncLoRA"),
    ),
    "argument without a default": (lambda c: _domain(c).pop("train"), ("data.domains.a (Jsonl) has no train",)),
    "no adapter": (lambda c: c["model"].pop("adapter"), ("missing: model.adapter",)),
    "preset that is not there": (lambda c: c["model"].update(adapter="no.yaml"), ("model.adapter: no.yaml", "no file")),
    "template": (lambda c: _domain(c)["template"].update(prompt="x"), ("template.prompt = 'x'", "{prompt}")),
    "strength": (_mitigation("EWC", strength=-1.0), ("EWC with strength=-1.0", "strength must be >= 0")),
    "a library's own refusal": (lambda c: _lora(c).update(layers_pattern="x"), ("LoraConfig: ", "layers_pattern")),
    "capability": (
        lambda c: (c["model"].update(adapter={"class_path": "support.components.Bare"}), _mitigation("EWC")(c)),
        ("model.mitigations.x (EWC) with model.adapter Bare", "EWC needs fixed_coordinates", "replay.yaml"),
    ),
    "order": (lambda c: c["data"].update(order=["a", "z"]), ("data.order is ['a', 'z']", "['a', 'b']")),
    "batch size": (lambda c: c["data"].update(batch_size=0), ("data.batch_size=0", "at least 1")),
    "micro-batches": (lambda c: c["data"].update(micro_batch_size=3), ("data.batch_size=4", "micro-batches of 3")),
    "scorer": (
        lambda c: _domain(c).update(scorers=["nll", "rougel"]),
        ("data.domains.a.scorers", "'rougel'", "rougeL"),
    ),
    "no JSONL": (lambda c: _domain(c).update(train="no.jsonl"), ("train file 'no.jsonl'", "No such file")),
    "accelerator": (
        lambda c: c["trainer"].update(accelerator="abacus"),
        ("trainer: ", "abacus", "trainer.accelerator"),
    ),
    "device": (lambda c: c["trainer"].update(accelerator="mps"), ("trainer: ", "trainer.accelerator")),
    "steps": (lambda c: c["trainer"].update(max_steps=0), ("trainer.max_steps=0", "at least one optimizer step")),
    "checkpoints": (lambda c: c.update(checkpoint_every_n_steps=-1), ("--checkpoint_every_n_steps=-1",)),
    "backbone": (lambda c: c["model"]["backbone"]["init_args"].update(path="/no/model"), ("/no/model",)),
    "targets": (lambda c: _lora(c).update(target_modules=["nope"]), ("PEFT refuses LoraConfig", "nope")),
}


@pytest.mark.usefixtures("untrainable")
@pytest.mark.parametrize("name", FILE)
def test_mistakes_in_a_config(name: str, config: dict[str, Any], tmp_path: Path) -> None:
    change, parts = FILE[name]
    change(config)
    path = write_yaml(tmp_path / "tiny.yaml", config)
    assert_refused(call("fit", "--config", path, "--run_dir", tmp_path / "run"), *parts)
    assert_nothing_written(tmp_path / "run")


WORDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "key": ("--data.batchsize=3", ("--data.batchsize=3", "'data.batch_size'")),
    "key of a named part": (
        "--model.mitigations.x=EWC --model.mitigations.x.strenght=3",
        ("--model.mitigations.x.strenght=3", "'strength'"),
    ),
    "type": ("--seed_everything=x", ("--seed_everything=x", "an integer")),
    "type of a part's part": ("--model.adapter.config.r=x", ("--model.adapter.config.r=x", "an integer")),
    "choice": ("--model.layout=pack", ("--model.layout=pack", "auto, packed or padded", "'packed'")),
    "choice of a named part": (
        "--model.mitigations.x=EWC --model.mitigations.x.mode=sep",
        ("--model.mitigations.x.mode=sep", "separate or online"),
    ),
    "class": ("--model.adapter=Nothing", ("--model.adapter=Nothing", "no class Nothing", "Full, GaLore, IncLoRA")),
    "class or preset": ("--model.adapter=Lora", ("--model.adapter=Lora", "no class Lora", "did you mean 'lora'?")),
    "class of a named part": ("--data.domains.c=Json", ("--data.domains.c=Json", "'Jsonl'")),
    "class name of several": ("--model.optimizer=AdamW", ("--model.optimizer=AdamW", "torch.optim.AdamW", "full path")),
    "class to explain": ("--model.adapter.help=Nope", ("Nope",)),
    "preset": ("--model.adapter no.yaml", ("no.yaml", "no file")),
    "preset of a named part": ("--model.mitigations.x no.yaml", ("cannot read no.yaml",)),
    "value": ("--name", ("--name", "expected one argument")),
    "key of a part in JSON": (
        '--data.domains.c={"class_path":"Jsonl","init_args":{"trian":"x"}}',
        ("--data.domains.c.init_args.trian=x", "'train'"),
    ),
    "config in JSON": ("--config={broken", ("{broken",)),
    "word": ("stray", ("stray", "belongs to no option")),
    "name": ("--name=../x", ("--name=../x", "one folder in runs", "--run_dir")),
    "config": ("--config no.yaml", ("cannot read no.yaml",)),
}


@pytest.mark.usefixtures("untrainable")
@pytest.mark.parametrize("name", WORDS)
def test_mistakes_on_the_command_line(
    name: str, config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words, parts = WORDS[name]
    monkeypatch.chdir(tmp_path)
    assert_refused(call("fit", "--config", write_yaml(tmp_path / "tiny.yaml", config), *words.split()), *parts)
    assert not list(tmp_path.glob("**/x"))
    assert_nothing_written(tmp_path)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("model:\n  adapter: [1,\n  x: }\n", ("bad.yaml, line 3 is not YAML",)),
        ("just a text\n", ("bad.yaml holds str", "keys with values")),
        ("", ("bad.yaml holds nothing",)),
        ("name: \xff\n", ("bad.yaml is not YAML",)),
    ],
    ids=["bracket", "text", "empty", "encoding"],
)
def test_files_that_are_no_config(text: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(text.encode("latin-1"))
    assert_refused(call("fit", "--config", path), *parts)
    assert_refused(call("fit", f"--model.mitigations.x={path}"), "bad.yaml")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("", ("line 1", "no row")),
        ('{"prompt": "p", "completion": "c"}\n{"prompt": 1}\n', ("a-train.jsonl, line 2", "'prompt' is int")),
        ('{"prompt": "p"\n', ("a-train.jsonl, line 1", "is not JSON")),
    ],
    ids=["empty", "row", "JSON"],
)
@pytest.mark.usefixtures("untrainable")
def test_files_that_are_no_rows(text: str, parts: tuple[str, ...], config: dict[str, Any], tmp_path: Path) -> None:
    Path(_domain(config)["train"]).write_text(text)
    path = write_yaml(tmp_path / "tiny.yaml", config)
    assert_refused(call("fit", "--config", path, "--run_dir", tmp_path / "run"), *parts)
    assert_nothing_written(tmp_path / "run")

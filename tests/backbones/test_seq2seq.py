"""An encoder-decoder as backbone, against plain transformers: likelihoods, generation, training, exports, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

from residency.adapters import Adapter, Full, Peft
from residency.adapters.peft import lora
from residency.backbones import CausalLM, Seq2Seq
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Branch, Example
from residency.domains.jsonl import Jsonl
from residency.domains.template import Template
from residency.inspection import Inspection, KLToBase, RepresentationDrift
from residency.mitigations import EWC, Replay
from residency.testing.tiny_models import write_backbone
from residency.testing.tiny_runs import make_module, train
from support.cli import call, read_json, tiny_config, write_yaml
from support.counted import counter
from table import ADAPTERS, MITIGATIONS, OBJECTIVES, SOME_MITIGATIONS

DRAW = torch.Generator().manual_seed(5)


def tokens(count: int) -> tuple[int, ...]:
    return tuple(torch.randint(1, 257, (count,), generator=DRAW).tolist())


def rows() -> list[Example]:
    """Lengths that differ, labels of one prompt, a mask inside of a completion."""
    masked = Branch(tokens=tokens(6), mask=(True, False, False, True, True, True))
    return [
        Example.of(domain="d", row="0", prompt=tokens(30), completion=tokens(4)),
        Example.of(domain="d", row="1", prompt=tokens(3), completion=tokens(9), alternatives=[tokens(2), tokens(5)]),
        Example(domain="d", row="2", prompt=tokens(11), branches=(masked,)),
    ]


def plain_nll(model: Any, example: Example) -> list[torch.Tensor]:
    """Nats of each branch's supervised tokens as transformers has them: `labels`, one row, no padding."""
    found = []
    for branch in example.branches:
        kept = {*branch.supervised}
        labels = torch.tensor([[token if k in kept else -100 for k, token in enumerate(branch.tokens)]])
        written = torch.tensor([[0, *branch.tokens[:-1]]])
        loss = model(input_ids=torch.tensor([example.prompt]), decoder_input_ids=written, labels=labels).loss
        found.append(loss * len(kept))
    return found


def test_likelihoods_are_those_of_transformers(t5: Path) -> None:
    """Padding, and an encoder that is read once for all labels of a prompt, change nothing."""
    backbone, plain = Seq2Seq(path=str(t5)), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    batch = make_batch(rows(), layout="padded")
    with torch.no_grad():
        nll = backbone.target_nll(backbone.load(), batch)
        expected = [total for example in rows_of(batch) for total in plain_nll(plain, example)]
    found = torch.zeros(len(expected)).index_add(0, places(batch), nll)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def rows_of(batch: Any) -> tuple[Example, ...]:
    examples: tuple[Example, ...] = batch.examples
    return examples


def places(batch: Any) -> torch.Tensor:
    """(M,) the number of each target's branch among all branches of the batch."""
    first = torch.tensor([0, *[len(e.branches) for e in batch.examples]]).cumsum(0)
    at: torch.Tensor = first[batch.target_example] + batch.target_branch
    return at


def test_gradients_are_those_of_transformers(t5: Path) -> None:
    """Every weight of encoder and decoder."""
    backbone, plain = Seq2Seq(path=str(t5)), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    model, batch = backbone.load(), make_batch(rows(), layout="padded")
    backbone.nll(model, batch).sum().backward()
    sum(total for example in batch.examples for total in plain_nll(plain, example)).backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert ours.grad is not None, name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_an_end_token_is_written_behind_a_prompt_where_the_tokenizer_does(t5: Path, tmp_path: Path) -> None:
    """FLAN-T5 was trained on prompts that end with it; our tokens have none, since an answer would follow it."""
    folder = shutil.copytree(t5, tmp_path / "ending")
    described = json.loads((folder / "tokenizer.json").read_text())
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "<|end|>", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    example = Example.of(domain="d", row="0", prompt=tokens(7), completion=tokens(3))
    ended = Example.of(domain="d", row="0", prompt=(*example.prompt, 0), completion=example.completion)
    backbone, plain = Seq2Seq(path=str(folder)), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    with torch.no_grad():
        nll = backbone.target_nll(backbone.load(), make_batch([example], layout="padded")).sum()
        torch.testing.assert_close(nll, plain_nll(plain, ended)[0], rtol=1e-5, atol=1e-5)


def test_generation_is_that_of_transformers(t5: Path) -> None:
    """Prompts of unequal lengths side by side write what each writes alone."""
    backbone, plain = Seq2Seq(path=str(t5)), AutoModelForSeq2SeqLM.from_pretrained(t5).eval()
    prompts = [tokens(n) for n in (2, 17, 9)]
    written = backbone.generate(backbone.load(), prompts, max_new_tokens=8)
    for prompt, new in zip(prompts, written, strict=True):
        alone = plain.generate(
            input_ids=torch.tensor([prompt]), max_new_tokens=8, do_sample=False, eos_token_id=0, pad_token_id=0
        )[0, 1:].tolist()
        assert new == (alone[: alone.index(0)] if 0 in alone else alone)
    assert any(written)


def make_built(t5: Path, adapter: Adapter) -> Any:
    """A module before its first stage."""
    module = make_module(t5, adapter, {}, family=Seq2Seq)
    module.build(seed=0)
    return module


@pytest.mark.parametrize("make", [Full, lambda: Peft(config=LoraConfig(r=4, target_modules="all-linear"))])
def test_micro_batches_change_nothing(t5: Path, tmp_path: Path, make: Any) -> None:
    """Rows of unequal length, one at a time or four: the same weights."""
    ends = []
    for micro in (4, 1):
        _, module = train(
            tmp_path / str(micro), t5, make(), {"ewc": EWC(fisher_samples=6), "replay": Replay(ratio=0.5, capacity=8)},
            steps=3, lr=1e-3, family=Seq2Seq, data={"micro_batch_size": micro},
        )  # fmt: skip
        ends.append(module.adapter.state(module.model))
    start = module.adapter.state(make_built(t5, make()).model)
    # AdamW makes full steps of gradients that are nearly zero, whose last digits differ: so not entry by entry.
    for name, whole in ends[0].items():
        assert (ends[1][name] - whole).norm() <= 1e-3 * (whole - start[name]).norm() + 1e-6, name


def outcome(folder: Path, t5: Path, adapter: Adapter, mitigations: dict[str, Any], **options: Any) -> str:
    """`finite` if two stages run and every score is a number, or the refusal."""
    try:
        record, _ = train(folder, t5, adapter, mitigations, steps=2, family=Seq2Seq, **options)
    except UserError as refusal:
        return refusal.got if refusal.why and refusal.fix else "a refusal that does not say why, or what to do"
    scores = torch.tensor([row for s in record["scores"].values() for row in s["R"] if None not in row])
    assert scores.isfinite().all()
    return "finite"


REFUSED_MITIGATIONS = {"migu", "ewc_kfac", "mas"}
KINDS = {"a": "generative", "b": "label"}


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "name", [n if n in SOME_MITIGATIONS else pytest.param(n, marks=pytest.mark.pairs) for n in MITIGATIONS]
)
def test_every_mitigation_runs_or_is_refused(t5: Path, tmp_path: Path, name: str, kind: str) -> None:
    """What reads layers by the tokens of a batch is refused; all others train and score."""
    row = ADAPTERS[kind]
    adapter = row.make()
    if MITIGATIONS[name].make().requires - adapter.provides:
        pytest.skip("needs a capability that this adapter lacks, whatever the backbone")
    found = outcome(tmp_path / "run", t5, adapter, {"m": MITIGATIONS[name].make()}, kinds=KINDS, lr=row.lr)
    assert (found == "finite") == (name not in REFUSED_MITIGATIONS), found


def with_names_of_t5(adapter: Any) -> Any:
    """The row's targets by the names that T5 gives to them."""
    config = getattr(adapter, "config", None)
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "o_proj": "o", "up_proj": "wi_0", "down_proj": "wo"}
    for option in ("target_modules", "feedforward_modules"):
        if isinstance(found := getattr(config, option, None), list | set):
            setattr(config, option, {names.get(name, name) for name in found})
    return adapter


ENCODER_DECODER_ADAPTERS = ["lora", "full", "ia3", "galore", "freeze", "per_domain", "o_lora"]


@pytest.mark.parametrize(
    "name", [n if n in ENCODER_DECODER_ADAPTERS else pytest.param(n, marks=pytest.mark.pairs) for n in ADAPTERS]
)
def test_every_adapter_runs_or_is_refused(t5: Path, tmp_path: Path, name: str) -> None:
    """In one sentence, before anything is trained; the common ones run."""
    row = ADAPTERS[name]
    if row.loading:
        pytest.skip("quantised loading is an option of CausalLM")
    adapter = with_names_of_t5(row.make())
    found = outcome(tmp_path / "run", t5, adapter, {}, kinds=KINDS, lr=row.lr, trainer=row.trainer)
    assert found == "finite" or name not in ENCODER_DECODER_ADAPTERS, found


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_exports_load_in_plain_libraries(t5: Path, tmp_path: Path, kind: str) -> None:
    """A run through the command line; the exported stage answers in transformers or PEFT as it did in the run."""
    config = tiny_config(tmp_path / "data", t5)
    config["model"]["backbone"] = {"class_path": "residency.backbones.Seq2Seq", "init_args": {"path": str(t5)}}
    if kind == "full":
        config["model"]["adapter"] = {"class_path": "residency.adapters.Full"}
    run = tmp_path / "run"
    told = call("fit", "--config", write_yaml(tmp_path / "config.yaml", config), "--run_dir", run)
    assert told.code == 0, told.err
    assert call("export", run, "--output", tmp_path / "out").code == 0
    if kind == "full":
        plain = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "out").eval()
    else:
        base = AutoModelForSeq2SeqLM.from_pretrained(t5)
        assert read_json(tmp_path / "out" / "adapter_config.json")["task_type"] == "SEQ_2_SEQ_LM"
        plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
    assert "AutoModelForSeq2SeqLM" in (tmp_path / "out" / "README.md").read_text()
    recorded = read_json(run / "results.json")["scores"]["nll"]["R"][-1][0]
    backbone = Seq2Seq(path=str(t5))
    data = config["data"]["domains"]["a"]["init_args"]
    reader = Jsonl(template=Template(**data.pop("template")), **data)
    examples = [
        reader.template.encode(backbone.tokenizer, domain="a", row=row, split="test") for row in reader.rows("test")
    ]
    with torch.no_grad():
        nll = torch.stack([plain_nll(plain, example)[0] for example in examples]).sum()
    assert float(nll) / sum(len(e.completion) for e in examples) == pytest.approx(recorded, rel=1e-5)


def test_what_is_no_t5_is_refused(t5: Path, llama: Path, tmp_path: Path) -> None:
    """Each names the class that runs the checkpoint, or what is missing."""
    with pytest.raises(UserError, match="LlamaForCausalLM") as refusal:
        Seq2Seq(path=str(llama)).load()
    assert "CausalLM" in refusal.value.fix
    with pytest.raises(UserError, match="encoder-decoder") as refusal:
        CausalLM(path=str(t5)).load()
    assert "Seq2Seq" in refusal.value.fix
    folder = shutil.copytree(t5, tmp_path / "headless")
    weights = load_file(folder / "model.safetensors")
    del weights["decoder.final_layer_norm.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="final_layer_norm"):
        Seq2Seq(path=str(folder)).load()


def test_a_mitigation_for_decoders_is_refused_at_construction(t5: Path) -> None:
    """Before the model is loaded."""
    with pytest.raises(UserError, match="encoder-decoder"):
        make_module(t5, Full(), {"m": MITIGATIONS["ewc_kfac"].make()}, family=Seq2Seq)
    with pytest.raises(UserError, match="encoder-decoder"):
        make_module(t5, Full(), {}, family=Seq2Seq, objective=OBJECTIVES["grpo"].make())


def test_the_first_form_of_t5_is_exact_too(tmp_path: Path) -> None:
    """One tensor for embedding and head, and the decoder's output scaled before it."""
    folder = write_backbone(tmp_path / "t5", architecture="t5")
    config = json.loads((folder / "config.json").read_text()) | {
        "tie_word_embeddings": True, "scale_decoder_outputs": True, "feed_forward_proj": "relu"
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    T5ForConditionalGeneration(T5Config.from_pretrained(folder)).save_pretrained(folder)
    backbone, plain = Seq2Seq(path=str(folder)), AutoModelForSeq2SeqLM.from_pretrained(folder).eval()
    batch = make_batch(rows(), layout="padded")
    with torch.no_grad():
        nll = backbone.target_nll(backbone.load(), batch)
        expected = [total for example in batch.examples for total in plain_nll(plain, example)]
    found = torch.zeros(len(expected)).index_add(0, places(batch), nll)
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_observers_of_decoders_are_refused() -> None:
    """Before anything is loaded: the folder need not exist."""
    with pytest.raises(UserError, match=r"inspection\.drift"):
        Inspection({"drift": RepresentationDrift()}).checked(Seq2Seq(path="nowhere"))
    Inspection({"kl": KLToBase()}).checked(Seq2Seq(path="nowhere"))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_work_is_what_torch_counts(t5: Path, kind: str, checkpointed: bool) -> None:
    """Forward and backward, labels that share an encoder and what is computed again included, within 5 %."""
    adapter = Full() if kind == "full" else lora(target_modules="all-linear", r=2)
    module = make_module(t5, adapter, {}, family=Seq2Seq, loading={"gradient_checkpointing": checkpointed})
    module.build(seed=0)
    module.model.train()
    module.backbone.work.take()
    batch = make_batch(rows(), layout="padded")
    with counter() as counted:
        module.backbone.nll(module.model, batch).sum().backward()
    tokens, flops = module.backbone.work.take()
    assert tokens == batch.tokens
    assert flops == pytest.approx(counted.get_total_flops(), rel=0.05)

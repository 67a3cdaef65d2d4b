"""A sequence classifier as backbone, against plain transformers: losses, the head, labels that compete, refusals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PromptTuningConfig
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from residency.adapters import Freeze, Full, Peft
from residency.adapters.peft import lora
from residency.backbones import Classifier
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.losses import IMPOSSIBLE
from residency.core.types import Example
from residency.domains.stream_data import StreamData
from residency.inspection import Inspection, RepresentationDrift
from residency.mitigations import SelfDistillation
from residency.objectives import SFT, FullText
from residency.testing.tiny_models import write_domain
from residency.testing.tiny_runs import make_module
from support.classifiers import FAMILIES, alone, built, labelled, met, stream, tokens


@pytest.fixture(params=FAMILIES)
def pretrained(request: pytest.FixtureRequest) -> Path:
    """A pretrained model without the head of a classifier."""
    folder: Path = request.getfixturevalue(request.param)
    return folder


def test_losses_and_gradients_are_those_of_transformers(pretrained: Path, tmp_path: Path) -> None:
    """A padded batch against single rows without padding, and against transformers' own mean over a padded batch."""
    backbone = met(pretrained, tmp_path)
    model, batch = backbone.load(), labelled(backbone)
    model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    nll = backbone.nll(model, batch)
    own = batch.target_branch == 0
    single = [
        plain(input_ids=torch.tensor([e.prompt]), labels=torch.tensor(list(e.completion))).loss for e in batch.examples
    ]
    torch.testing.assert_close(nll[own], torch.stack(single), rtol=1e-5, atol=1e-5)
    width = max(len(e.prompt) for e in batch.examples)
    ids = torch.tensor([[*e.prompt, *[0] * (width - len(e.prompt))] for e in batch.examples])
    labels = torch.tensor([e.completion[0] for e in batch.examples])
    mean = plain(input_ids=ids, attention_mask=(ids != 0).long(), labels=labels).loss
    torch.testing.assert_close(SFT()(lambda b: backbone.logits(model, b), alone(batch), None).loss, mean)
    nll[own].mean().backward()
    mean.backward()
    for (name, ours), (_, theirs) in zip(model.named_parameters(), plain.named_parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None), name
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_the_last_token_is_read_even_if_it_has_the_number_of_padding(llama: Path, tmp_path: Path) -> None:
    """transformers looks for it by number, and would read the token before it."""
    backbone = met(llama, tmp_path)
    model = backbone.load()
    model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain", pad_token_id=200).eval()
    examples = [Example.of(domain="a", row=str(n), prompt=(5, 6, *tokens(n), 0), completion=(0,)) for n in (0, 8)]
    with torch.no_grad():
        found = backbone.logits(model, make_batch(examples, layout="padded"))
        single = torch.cat([plain(input_ids=torch.tensor([e.prompt])).logits for e in examples])
    torch.testing.assert_close(found, single, rtol=1e-5, atol=1e-5)


def test_what_a_tokenizer_puts_around_a_text_is_read(bert: Path, tmp_path: Path) -> None:
    """[CLS] and [SEP]: as plain transformers tokenises, and counted in what fits into the model."""
    folder = shutil.copytree(bert, tmp_path / "around")
    described = json.loads((folder / "tokenizer.json").read_text())
    mark = {"SpecialToken": {"id": "<|end|>", "type_id": 0}}
    described["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [mark, {"Sequence": {"id": "A", "type_id": 0}}, mark],
        "pair": [mark, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [0], "tokens": ["<|end|>"]}},
    }
    (folder / "tokenizer.json").write_text(json.dumps(described))
    backbone = met(folder, tmp_path)
    data = stream(tmp_path)
    examples = data.evaluation_examples("a", "test", backbone.tokenizer)
    model = backbone.load()
    model.save_pretrained(tmp_path / "plain")
    plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "plain").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [tokenizer(f"{row.prompt}>", return_tensors="pt").input_ids for row in data.domains["a"].rows("test")]
    with torch.no_grad():
        found = backbone.logits(model, make_batch([e.alone() for e in examples], layout="padded"))
        torch.testing.assert_close(
            found, torch.cat([plain(input_ids=ids).logits for ids in rows]), rtol=1e-5, atol=1e-5
        )
    assert backbone.longest_text() == 128 - 2 + 1
    assert Classifier(path=str(bert)).longest_text() == 128 + 1


def test_the_head_comes_from_the_seed_and_the_label(bert: Path, tmp_path: Path) -> None:
    """Equal for equal seeds, whatever the order of the domains and whoever else is in the stream."""
    data = stream(tmp_path)
    other = stream(tmp_path, {"c": "label", "a": "label"})
    backbone = Classifier(path=str(bert))
    one = backbone.for_stream(data).seeded(3).load()
    torch.randn(3)
    back = backbone.for_stream(StreamData(domains=data.domains, order=["b", "a"])).seeded(3).load()
    for (name, value), again in zip(one.state_dict().items(), back.state_dict().values(), strict=True):
        assert torch.equal(value, again), name
    mixed = backbone.for_stream(other)
    rows = [backbone.for_stream(data).labels.row("a", "a even"), mixed.labels.row("a", "a even")]
    assert torch.equal(one.classifier.weight[rows[0]], mixed.seeded(3).load().classifier.weight[rows[1]])
    second = backbone.for_stream(data).seeded(4).load()
    assert not torch.equal(one.classifier.weight, second.classifier.weight)
    assert not torch.equal(one.bert.pooler.dense.weight, second.bert.pooler.dense.weight)
    assert torch.equal(one.bert.embeddings.word_embeddings.weight, second.bert.embeddings.word_embeddings.weight)


def test_the_head_of_a_checkpoint_is_used_where_labels_match(bert: Path, tmp_path: Path) -> None:
    """By their text and not by their number; without a common label it is refused, or drawn if that is asked for."""
    trained = met(bert, tmp_path, seed=7).load()
    trained.config.id2label = {0: "b even", 1: "elsewhere", 2: "a even", 3: "b odd one"}
    trained.save_pretrained(tmp_path / "own")
    for path in bert.glob("tokenizer*"):
        shutil.copy(path, tmp_path / "own")
    backbone = met(tmp_path / "own", tmp_path)
    loaded = backbone.load()
    assert backbone.labels.names == ("a even", "a odd one", "b even", "b odd one")
    for row, old in {0: 2, 2: 0, 3: 3}.items():
        assert torch.equal(loaded.classifier.weight[row], trained.classifier.weight[old])
    assert torch.equal(loaded.bert.pooler.dense.weight, trained.bert.pooler.dense.weight)
    assert "3 of 4 rows" in backbone.describe()["remark"]
    described = json.loads((tmp_path / "own" / "config.json").read_text())
    described["id2label"] = {str(k): f"LABEL_{k}" for k in range(4)}
    (tmp_path / "own" / "config.json").write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"'LABEL_0'.*'a even'"):
        met(tmp_path / "own", tmp_path).load()
    drawn = met(tmp_path / "own", tmp_path, new_head=True).load()
    assert torch.equal(drawn.classifier.weight, met(bert, tmp_path).load().classifier.weight)


def test_weights_that_are_no_head_must_be_there(bert: Path, tmp_path: Path) -> None:
    """Only a head may be drawn."""
    from safetensors.torch import load_file, save_file

    folder = shutil.copytree(bert, tmp_path / "torn")
    weights = load_file(folder / "model.safetensors")
    del weights["bert.encoder.layer.1.output.dense.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"layer\.1\.output"):
        met(folder, tmp_path).load()


@pytest.mark.parametrize("head", ["shared", "masked"])
def test_labels_compete_once_their_domain_has_begun(bert: Path, tmp_path: Path, head: Any) -> None:
    """Shared: a head that grows; masked: a head per domain. Probabilities of all others are exactly 0."""
    backbone = met(bert, tmp_path, head=head)
    model, batch = backbone.load(), alone(labelled(backbone))
    rows = {name: [r for r, label in enumerate(backbone.labels.names) if f"{name} " in label] for name in "ab"}
    with torch.no_grad():
        plain = backbone.outputs(model, batch)
        for learned in (0, 1, 2):
            backbone.learned = learned
            p = backbone.logits(model, batch).softmax(-1)
            for k, example in enumerate(batch.examples):
                seen = {"shared": [["a"], ["a", "b"]][learned - 1] if learned else [], "masked": []}[head]
                kept = sorted(row for name in {*seen, example.domain} for row in rows[name])
                expected = torch.zeros(4)
                expected[kept] = plain[k, kept].softmax(-1)
                torch.testing.assert_close(p[k], expected, rtol=0, atol=1e-6)
                assert (p[k] > 0).sum() == len(kept)


def test_equal_labels_of_two_domains_are_one_row_or_two(bert: Path, tmp_path: Path) -> None:
    """Domain-incremental streams share their head; a masked head keeps them apart."""
    folder = tmp_path / "data"
    parts = {}
    for name in ("x", "y"):
        options = write_domain(folder, name, kind="label")["init_args"]
        for split in ("train", "validation", "test"):
            path = Path(options[split])
            path.write_text(path.read_text().replace(f'"{name} ', '"'))
        parts[name] = domains_of(options)
    data = StreamData(domains=parts)
    assert Classifier(path=str(bert)).for_stream(data).labels.names == ("even", "odd one")
    masked = Classifier(path=str(bert), head="masked").for_stream(data)
    assert masked.labels.names == ("x: even", "x: odd one", "y: even", "y: odd one")
    rows = [masked.tokenizer.label_token(name, "even") for name in ("x", "y")]
    assert rows == [0, 2]


def domains_of(options: dict[str, Any]) -> Any:
    from residency.domains.jsonl import Jsonl
    from residency.domains.template import Template

    return Jsonl(template=Template(**options.pop("template")), **options)


@pytest.mark.parametrize("head", ["shared", "masked"])
def test_self_distillation_keeps_what_the_teacher_knew(bert: Path, tmp_path: Path, head: Any) -> None:
    """The teacher's choice among the labels of earlier domains, on rows of the new one; none about the new labels."""
    backbone = met(bert, tmp_path, head=head)
    model, batch = backbone.load(), alone(labelled(backbone))
    with torch.no_grad():
        known = backbone.distilled(model, batch)
        plain = backbone.outputs(model, batch)
        assert known.shape == plain.shape
        torch.testing.assert_close(known.softmax(-1)[:, :2], plain[:, :2].softmax(-1))
        assert (known[:, 2:] == IMPOSSIBLE).all()
        backbone.learned = 3
        assert len(backbone.distilled(model, batch)) == len(plain) * (1 if head == "shared" else 2)
        backbone.learned = 1
        assert not len(backbone.distilled(model, batch))


def test_what_cannot_be_classified_is_refused(bert: Path, t5: Path, tmp_path: Path) -> None:
    """Before a model is loaded, each in one sentence."""
    backbone = Classifier(path=str(bert))
    with pytest.raises(UserError, match="is generative"):
        backbone.for_stream(stream(tmp_path, {"a": "label", "c": "generative"}))
    with pytest.raises(UserError, match="shots"):
        backbone.for_stream(stream(tmp_path, shots=2))
    with pytest.raises(UserError, match="classes"):
        Classifier(path=str(bert), head="masked").for_stream(stream(tmp_path, classes="seen"))
    data = stream(tmp_path)
    data.domains["a"].__dict__["scorers"] = stream(tmp_path, {"a": "generative"}).domains["a"].scorers
    with pytest.raises(UserError, match="exact_match"):
        backbone.for_stream(data)
    with pytest.raises(UserError, match="type t5"):
        met(t5, tmp_path).load()
    with pytest.raises(UserError, match="asked to write"):
        backbone.generate(torch.nn.Linear(1, 1), [[1]], max_new_tokens=2)
    with pytest.raises(UserError, match="sequence classifier"):
        make_module(bert, Full(), {}, family=Classifier, objective=FullText())
    with pytest.raises(UserError, match="sequence classifier") as refusal:
        make_module(bert, lora(), {"m": SelfDistillation(teacher="base")}, family=Classifier)
    assert "trained head" in refusal.value.why
    with pytest.raises(UserError, match=r"inspection\.drift"):
        Inspection({"drift": RepresentationDrift()}).checked(backbone)
    with pytest.raises(UserError, match="PromptTuningConfig"):
        built(bert, tmp_path, Peft(config=PromptTuningConfig(num_virtual_tokens=2)))
    with pytest.raises(UserError, match="leaves the head"):
        built(bert, tmp_path, Freeze(freeze=["classifier"]))


def test_a_label_that_could_not_be_chosen_weighs_nothing(bert: Path, tmp_path: Path) -> None:
    """Label smoothing spreads over the labels that compete, as torch does over a head that has only these."""
    backbone = met(bert, tmp_path, head="masked")
    model, batch = backbone.load(), alone(labelled(backbone))
    with torch.no_grad():
        found = SFT(label_smoothing=0.2)(lambda b: backbone.logits(model, b), batch, None).loss
        plain = backbone.outputs(model, batch)
        own = [plain[k, :2] if e.domain == "a" else plain[k, 2:] for k, e in enumerate(batch.examples)]
        right = torch.tensor([e.completion[0] % 2 for e in batch.examples])
        expected = torch.nn.functional.cross_entropy(torch.stack(own), right, label_smoothing=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)

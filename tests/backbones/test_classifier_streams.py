"""Classifiers over streams: stopped and continued, with every mitigation and adapter, exported to plain libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from peft import LoraConfig, PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from residency.adapters import Adapter, Full, Peft, PerDomain
from residency.adapters.peft import lora
from residency.backbones import Classifier
from residency.core.errors import UserError
from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.mitigations import EWC, Replay
from residency.testing.tiny_models import write_domain
from residency.testing.tiny_runs import train
from support.classifiers import KINDS, built, met
from support.cli import call, read_json, tiny_config, write_yaml
from support.tiny_sweeps import REPLAY, matrices, run_sweep, write_study
from support.tiny_sweeps import alone as alone_of
from table import ADAPTERS, MITIGATIONS, SOME_MITIGATIONS


class StopAt(Callback):
    """Ends the run in its second stage."""

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        """As a signal does."""
        if (module.stage.index, trainer.global_step) == (1, 3):
            raise Stopped("SIGTERM")


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("head", ["shared", "masked"])
def test_a_stream_learns_stops_and_goes_on(bert: Path, tmp_path: Path, head: Any, kind: str) -> None:
    """Rows of later labels are left as they were drawn; a stopped run ends in the same bits."""

    def go(name: str, **options: Any) -> Any:
        adapter = Full() if kind == "full" else lora(target_modules="all-linear", r=4)
        return train(
            tmp_path / name, bert, adapter, {"ewc": EWC(fisher_samples=4), "replay": Replay(ratio=0.5, capacity=8)},
            steps=6, family=Classifier, loading={"head": head}, kinds=KINDS, **options,
        )  # fmt: skip

    record, _ = go("whole")
    with pytest.raises(Stopped):
        go("stopped", callbacks=[StopAt()], every=1)
    again, _ = go("stopped")
    assert again["scores"] == record["scores"]
    states = [
        load_tree(tmp_path / name / "stages" / "2-b" / "state.safetensors")["weights"] for name in ("whole", "stopped")
    ]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert record["task_id_at_test"] == (head == "masked")
    first = load_tree(tmp_path / "whole" / "stages" / "1-a" / "state.safetensors")["weights"]
    (name,) = [n for n in first if "classifier" in n and n.endswith("weight")]
    drawn = met(bert, tmp_path, head=head).load().classifier.weight
    assert torch.equal(first[name][2:], drawn[2:])
    assert not torch.equal(first[name][:2], drawn[:2])
    assert not torch.equal(states[0][name][2:], drawn[2:])
    matrix = torch.tensor(record["scores"]["nll"]["R"])
    assert matrix[0, 0] == pytest.approx(0.69, abs=0.05)  # two labels, a head that knows nothing
    assert matrix[1, 1] > 1.0 if head == "shared" else matrix[1, 1] < 1.0  # those of the first domain compete


@pytest.mark.parametrize("make", [Full, lambda: Peft(config=LoraConfig(r=4, target_modules="all-linear"))])
def test_micro_batches_change_nothing(llama: Path, tmp_path: Path, make: Any) -> None:
    """Rows of unequal length, one at a time or four: the same update."""
    ends = []
    for micro in (4, 1):
        _, module = train(
            tmp_path / str(micro), llama, make(), {"ewc": EWC(fisher_samples=6)},
            steps=3, lr=1e-3, family=Classifier, kinds=KINDS, data={"micro_batch_size": micro},
        )  # fmt: skip
        ends.append(module.adapter.state(module.model))
    start = built(llama, tmp_path, make())
    begin = start.adapter.state(start.model)
    for name, whole in ends[0].items():
        assert (ends[1][name] - whole).norm() <= 1e-3 * (whole - begin[name]).norm() + 1e-6, name


def outcome(folder: Path, backbone: Path, adapter: Adapter, mitigations: dict[str, Any], **options: Any) -> str:
    """`finite` if two stages run and every score is a number, or the refusal."""
    try:
        record, _ = train(folder, backbone, adapter, mitigations, steps=2, family=Classifier, kinds=KINDS, **options)
    except UserError as refusal:
        return refusal.got if refusal.why and refusal.fix else "a refusal that does not say why, or what to do"
    scores = torch.tensor([row for s in record["scores"].values() for row in s["R"]])
    assert scores.isfinite().all()
    assert max(record["scores"]["nll"]["R"][-1]) < 30.0
    return "finite"


REFUSED = {
    "generative_replay", "lamol", "sdft", "on_policy_distillation", "source_shielding",  # let the model write
    "migu", "ewc_kfac", "mas",  # read layers by the tokens of a batch
    "self_distillation_base", "self_distillation_cached", "intruder_reduction",
}  # fmt: skip


@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize(
    "name", [n if n in SOME_MITIGATIONS else pytest.param(n, marks=pytest.mark.pairs) for n in MITIGATIONS]
)
def test_every_mitigation_runs_or_is_refused(bert: Path, tmp_path: Path, name: str, kind: str) -> None:
    """What lets the model write, or reads layers by the tokens of a batch, is refused; all others train and score."""
    row = ADAPTERS[kind]
    adapter = row.make()
    if kind == "lora":
        adapter = lora(target_modules="all-linear", r=4)
    mitigation = MITIGATIONS[name].make()
    if mitigation.requires - adapter.provides:
        pytest.skip("needs a capability that this adapter lacks, whatever the backbone")
    found = outcome(tmp_path / "run", bert, adapter, {"m": mitigation}, lr=row.lr)
    assert (found == "finite") == (name not in REFUSED), found


COMMON_ADAPTERS = ["lora", "full", "galore"]


def with_names_of_bert(adapter: Any) -> Any:
    """The row's targets by the names that BERT gives to them."""
    config = getattr(adapter, "config", None)
    names = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "o_proj": "output.dense", "up_proj": "intermediate"}
    for option in ("target_modules", "feedforward_modules"):
        if isinstance(found := getattr(config, option, None), list | set):
            setattr(config, option, {names.get(name, "value") for name in found})
    return adapter


@pytest.mark.parametrize(
    "name", [n if n in COMMON_ADAPTERS else pytest.param(n, marks=pytest.mark.pairs) for n in ADAPTERS]
)
def test_every_adapter_runs_or_is_refused(bert: Path, tmp_path: Path, name: str) -> None:
    """In one sentence, before anything is trained; the common ones run."""
    row = ADAPTERS[name]
    if row.loading:
        pytest.skip("quantised loading is an option of CausalLM")
    adapter = with_names_of_bert(row.make())
    found = outcome(tmp_path / "run", bert, adapter, {}, lr=row.lr, trainer=row.trainer)
    assert found == "finite" or name not in COMMON_ADAPTERS, found


def test_an_adapter_per_domain_has_a_head_of_its_own(bert: Path, tmp_path: Path) -> None:
    """What the first domain learnt is still there after the second, bit for bit: its labels alone compete."""
    adapter = PerDomain(config=LoraConfig(r=2, target_modules="all-linear"), compare=False)
    record, _ = train(
        tmp_path / "run", bert, adapter, steps=3, family=Classifier, kinds=KINDS, loading={"head": "masked"}
    )
    matrix = record["scores"]["nll"]["R"]
    assert matrix[2][0] == matrix[1][0] != matrix[0][0]


@pytest.mark.parametrize(("family", "kind"), [("bert", "full"), ("roberta", "lora"), ("llama", "lora")])
def test_exports_load_in_plain_libraries(
    request: pytest.FixtureRequest, tmp_path: Path, family: str, kind: str
) -> None:
    """A run through the command line; the exported stage answers in transformers or PEFT as it did in the run."""
    folder: Path = request.getfixturevalue(family)
    config = tiny_config(tmp_path / "data", folder)
    config["data"] |= {
        "classes": "seen",
        "domains": {n: write_domain(tmp_path / "data", n, kind="label") for n in "ab"},
    }
    config["model"]["backbone"] = {"class_path": "residency.backbones.Classifier", "init_args": {"path": str(folder)}}
    if kind == "full":
        config["model"]["adapter"] = {"class_path": "residency.adapters.Full"}
    run = tmp_path / "run"
    told = call("fit", "--config", write_yaml(tmp_path / "config.yaml", config), "--run_dir", run)
    assert told.code == 0, told.err
    assert call("export", run, "--output", tmp_path / "out").code == 0
    names = ["a even", "a odd one", "b even", "b odd one"]
    if kind == "full":
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out").eval()
        assert plain.config.id2label == dict(enumerate(names))
    else:
        base = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=4)
        assert read_json(tmp_path / "out" / "adapter_config.json")["task_type"] == "SEQ_CLS"
        plain = PeftModel.from_pretrained(base, tmp_path / "out").eval()
        assert f"id2label={dict(enumerate(names))!r}" in (tmp_path / "out" / "README.md").read_text()
    if kind == "lora":
        told = call("export", run, "--merge", "--output", tmp_path / "merged")
        assert told.code == 0, told.err
        merged = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged").eval()
        assert merged.config.id2label == dict(enumerate(names))
        ids = torch.tensor([[5, 6, 7, 8]])
        with torch.no_grad():
            torch.testing.assert_close(merged(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-5)
    assert "AutoModelForSequenceClassification" in (tmp_path / "out" / "README.md").read_text()
    assert read_json(tmp_path / "out" / "residency.json")["labels"] == names
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    scores = read_json(run / "results.json")["scores"]
    for column, name in enumerate("ab"):
        path = config["data"]["domains"][name]["init_args"]["test"]
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        with torch.no_grad():
            ids = [tokenizer(row["prompt"] + ">", return_tensors="pt").input_ids for row in rows]
            logits = torch.cat([plain(input_ids=each).logits for each in ids])
        right = torch.tensor([names.index(row["completion"]) for row in rows])
        loss = torch.nn.functional.cross_entropy(logits, right)
        assert scores["nll"]["R"][-1][column] == pytest.approx(float(loss), rel=1e-5)
        found = (logits.argmax(-1) == right).double().mean()
        assert scores["accuracy"]["R"][-1][column] == pytest.approx(float(found))


@pytest.mark.slow
@pytest.mark.parametrize("head", ["shared", "masked"])
def test_cells_of_a_study_are_their_runs_alone(bert: Path, tmp_path: Path, head: str) -> None:
    """Orders, seeds and references over one head: shared stages and scores are those of each run by itself."""
    path = write_study(
        tmp_path, bert, domains="ab", axes={"mitigation": {"none": {}, "replay": REPLAY}},
        orders=[["a", "b"], ["b", "a"]], seeds=[0, 1], references=["frozen", "independent", "joint"],
    )  # fmt: skip
    base = yaml.safe_load((tmp_path / "base.yaml").read_text())
    options = {"path": str(bert), "head": head}
    base["model"]["backbone"] = {"class_path": "residency.backbones.Classifier", "init_args": options}
    base["data"]["domains"] = {name: write_domain(tmp_path / "data", name, kind="label") for name in "ab"}
    write_yaml(tmp_path / "base.yaml", base)
    code, out = run_sweep(path, tmp_path / "out")
    assert code == 0, out
    found = matrices(tmp_path / "out")
    for cell, scores in found.items():
        assert scores == alone_of(tmp_path / "out", cell, tmp_path), cell
    rows = {cell: scores["nll"]["R"][0] for cell, scores in found.items()}
    assert rows["none-a_b-s0"] == rows["none-b_a-s0"][::-1] == rows["replay-a_b-s0"]
    assert rows["none-a_b-s0"] != rows["none-a_b-s1"], "the head is drawn from the seed"

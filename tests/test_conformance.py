"""Every property on every adapter, every mitigation, and every compatible pair."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters import Adapter
from residency.adapters.peft_tools.wrapping import expected_remarks
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.core.tensors import snapshot
from residency.core.types import Example, Row, RowKind
from residency.mitigations import Mitigation
from residency.objectives.sft import token_nll
from support.comparisons import differing
from support.pair_invariants import Pairs
from support.stages_without_trainer import stage
from support.tiny_runs import domains, make_module, train
from table import ADAPTERS, MITIGATIONS, OBJECTIVES, READERS, SCORERS, SOME_ADAPTERS, SOME_MITIGATIONS

adapters = pytest.mark.parametrize("name", ADAPTERS)
# Adapter by adapter: what the pairs of one share is made once per process. `make test` takes every mitigation on some
# adapters and some mitigations on every adapter, `make test-pairs` all that is left.
pairs = pytest.mark.parametrize(
    ("adapter", "mitigation"),
    [
        pytest.param(a, m, marks=() if a in SOME_ADAPTERS or m in SOME_MITIGATIONS else pytest.mark.pairs)
        for a in ADAPTERS
        for m in MITIGATIONS
    ],
)

EXAMPLES = [
    Example.of(domain="x", row=str(i), prompt=tuple(range(5 + i, 9 + 2 * i)), completion=(40 + i, 50 + i, 0))
    for i in range(3)
]
LAST = "3-c"
# Through Trainer, files and evaluation as well: one for each way in which an adapter and a mitigation can meet.
WHOLE = [
    ("lora_dropout", "replay"),
    ("inc_lora", "replay"),
    ("full", "ewc"),
    ("sinkhorn", "ewc_online"),
    ("qlora", "weight_mixing"),
    ("lora", "sdft"),
    ("osf", "early_stopping"),
    ("full", "gpm"),
]
# What two domains cannot show about a pair, a third does not either.
SHORT: dict[str, Any] = {"kinds": {"a": "generative", "b": "label"}, "steps": 3}


def logits(module: Any) -> torch.Tensor:
    """Logits of fixed examples, in evaluation mode."""
    module.model.eval()
    with torch.inference_mode():
        return module.forward(make_batch(EXAMPLES, layout=module.layout)).clone()


def plain_logits(model: Any) -> torch.Tensor:
    """The same from a model of transformers or PEFT that knows nothing of `residency`."""
    model.eval()
    batch = make_batch(EXAMPLES, layout="padded")
    with torch.inference_mode():
        out = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    width = batch.input_ids.shape[1]
    # Virtual tokens stand in front of the others.
    return out[:, out.shape[1] - width :][batch.target_at // width, batch.target_at % width]


def built(backbone: Path, name: str, mitigations: dict[str, Mitigation] | None = None, seed: int = 0) -> Any:
    module = make_module(backbone, ADAPTERS[name].make(), mitigations or {}, **ADAPTERS[name].options)
    module.build(seed=seed)
    return module


def pretrained(backbone: Path, name: str) -> torch.Tensor:
    """Logits of the backbone of a row, loaded as the row loads it, without its adapter."""
    module = make_module(backbone, ADAPTERS["full"].make(), {}, loading=ADAPTERS[name].loading)
    module.model = module.backbone.load()
    module.layout = "padded"
    return logits(module)


def everything(module: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, cloned."""
    return snapshot(dict(module.model.named_parameters()) | dict(module.model.named_buffers()))


class Watch(Callback):
    """What moves in each stage, against what is declared."""

    def __init__(self) -> None:
        self.stages: list[dict[str, set[str]]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = everything(pl_module)
        self.declared = {*pl_module.adapter.trainable(pl_module.model)}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        after = everything(pl_module)
        moved = {key for key, old in self.before.items() if not torch.equal(old, after[key])}
        still = {key for key in self.declared - moved if self.before[key].abs().sum() > 0}
        grad = {key for key, p in pl_module.model.named_parameters() if p.requires_grad}
        self.stages.append({"moved": moved, "declared": self.declared, "still": still, "grad": grad})


@dataclass(frozen=True)
class Trained:
    """A stream of three tiny domains that was trained once and is looked at by many tests."""

    record: dict[str, Any]
    module: Any
    folder: Path
    stages: list[dict[str, set[str]]]

    @property
    def state(self) -> dict[str, torch.Tensor]:
        """As stored after the last stage."""
        last = max((self.folder / "stages").iterdir(), key=lambda path: path.name)
        weights: dict[str, torch.Tensor] = load_tree(last / "state.safetensors")["weights"]
        return weights


@pytest.fixture(scope="session")
def plain(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Row -> its stream without mitigations; every process trains each at most once. Do not change the module."""
    known: dict[tuple[str, bool], Trained] = {}

    def get(name: str, *, short: bool = False) -> Trained:
        if (name, short) not in known:
            folder, watch = tmp_path_factory.mktemp("plain") / "run", Watch()
            record, module = run(name, llama, folder, callbacks=[watch], **(SHORT if short else {}))
            known[name, short] = Trained(record, module, folder, watch.stages)
        return known[name, short]

    return get


def run(name: str, backbone: Path, folder: Path, mitigations: dict[str, Mitigation] | None = None, **more: Any) -> Any:
    """Train a row's stream."""
    row = ADAPTERS[name]
    return train(folder, backbone, row.make(), mitigations, trainer=row.trainer, **{**row.options, **more})


# -- adapters -------------------------------------------------------------------------------------------------------


@adapters
def test_identity_at_the_start(name: str, llama: Path) -> None:
    module = built(llama, name)
    module.layout = "padded"
    if ADAPTERS[name].identity == "exact":
        assert torch.equal(logits(module), pretrained(llama, name))
    elif ADAPTERS[name].identity == "close":
        torch.testing.assert_close(logits(module), pretrained(llama, name), rtol=0, atol=1e-6)
    else:
        assert not torch.allclose(logits(module), pretrained(llama, name), rtol=0, atol=1e-6)
        assert "reference" in module.adapter.provides, "row 0 could not be scored"


@adapters
def test_lanes_change_rounding_only(name: str, llama: Path) -> None:
    """Whether or not an adapter may be computed in parts, asking for parts changes no value and no gradient."""
    module = built(llama, name)
    module.begin_stage(stage(0), EXAMPLES)
    leaves = [*module.adapter.trainable(module.model).values()]
    module.model.train()
    found = []
    for lanes in (1, 3):
        module.backbone.lanes = lanes
        torch.manual_seed(0)
        out = module.forward(make_batch(EXAMPLES, layout=module.layout))
        gradients = torch.autograd.grad(out.logsumexp(-1).sum(), leaves, allow_unused=True)
        found.append([out.detach(), *(g if g is not None else torch.zeros(0) for g in gradients)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


@adapters
def test_a_loss_without_logits_is_the_same(name: str, llama: Path) -> None:
    """Whether or not the head is left out, and in lanes or not."""
    module = built(llama, name)
    module.begin_stage(stage(0), EXAMPLES)
    leaves = [*module.adapter.trainable(module.model).values()]
    batch = make_batch(EXAMPLES, layout=module.layout)
    module.model.train()
    found = []
    for direct, lanes in ((False, 1), (True, 1), (True, 3)):
        module.backbone.lanes = lanes
        torch.manual_seed(0)
        nll = module.backbone.nll(module.model, batch) if direct else token_nll(module.forward(batch), batch.targets)
        gradients = torch.autograd.grad(nll.square().sum(), leaves, allow_unused=True)
        found.append([nll.detach(), *(g if g is not None else torch.zeros(0) for g in gradients)])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            # As a whole: what is divided by a small norm (DeLoRA) amplifies the rounding of single entries.
            assert float((one - two).norm()) <= 2e-4 * float(one.norm()) + 1e-6


@adapters
def test_attach_is_idempotent_and_seeded(name: str, llama: Path) -> None:
    module, same, other = (built(llama, name, seed=seed) for seed in (0, 0, 1))
    again = module.adapter.attach(module.model)
    assert again is module.model
    first, second = module.adapter.state(module.model), same.adapter.state(same.model)
    assert all(torch.equal(first[key], second[key]) for key in first)
    if name.startswith("lora"):
        third = other.adapter.state(other.model)
        assert any(not torch.equal(first[key], third[key]) for key in first), "the seed must reach the adapter"


@adapters
def test_exactly_the_declared_parameters_move(name: str, plain: Any) -> None:
    stages = plain(name).stages
    assert len(stages) == 3
    for moves in stages:
        assert moves["moved"] <= moves["declared"], "frozen tensors moved, weight decay included"
        assert moves["declared"] == moves["grad"]
        unused = {key for key in moves["still"] if not any(part in key for part in ADAPTERS[name].still)}
        assert not unused, "declared as trainable, and nothing moved them"


@adapters
def test_state_restores_a_fresh_model(name: str, llama: Path, plain: Any) -> None:
    trained = plain(name)
    fresh = built(llama, name)
    fresh.adapter.load_state(fresh.model, trained.state)
    assert torch.equal(logits(fresh), logits(trained.module))


@adapters
def test_a_foreign_state_is_refused(name: str, llama: Path, plain: Any) -> None:
    module = built(llama, name)
    state = plain(name).state
    state.pop(next(iter(state)))
    with pytest.raises(UserError, match="does not fit"):
        module.adapter.load_state(module.model, state)


@adapters
def test_a_stopped_run_goes_on_bit_for_bit(name: str, llama: Path, plain: Any, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if (module.stage.index, trainer.global_step) == (1, 3):
                raise Stopped("SIGKILL")

    with pytest.raises(Stopped):
        run(name, llama, tmp_path / "run", callbacks=[Stop()])
    assert list((tmp_path / "run" / "stages").glob("2-*/checkpoint.safetensors")), "nothing to go on from"
    record, _ = run(name, llama, tmp_path / "run")
    whole = plain(name)
    assert record["scores"] == whole.record["scores"]
    state = load_tree(tmp_path / "run" / "stages" / LAST / "state.safetensors")["weights"]
    assert {*state} == {*whole.state}
    assert all(torch.equal(state[key], tensor) for key, tensor in whole.state.items())


@adapters
def test_reference_is_the_pretrained_model(name: str, llama: Path, plain: Any) -> None:
    trained = plain(name).module
    if "reference" not in trained.adapter.provides:
        with pytest.raises(UserError, match="reference"):
            trained.adapter.reference(trained.model)
        return
    base = built(llama, name)
    tuned = logits(trained)
    with trained.adapter.reference(trained.model):
        off = logits(trained)
    base.model, base.layout = base.backbone.load(), trained.layout
    assert torch.equal(off, logits(base))
    assert torch.equal(logits(trained), tuned), "leaving the context restores the adapter"
    assert not torch.equal(tuned, off)


@adapters
def test_weights_round_trip(name: str, llama: Path, plain: Any) -> None:
    module, state = built(llama, name), plain(name).state
    adapter, model = module.adapter, module.model
    adapter.load_state(model, state)
    if "averageable" not in adapter.provides:
        with pytest.raises(UserError, match="averageable"):
            adapter.weights(model, state)
        return
    before = logits(module)
    adapter.load_weights(model, adapter.weights(model, state))
    torch.testing.assert_close(logits(module), before, rtol=0, atol=max(1e-4, ADAPTERS[name].average))


@adapters
def test_export_loads_with_the_plain_library(name: str, llama: Path, plain: Any, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    trained = plain(name).module
    if "exportable" not in trained.adapter.provides and ADAPTERS[name].loads_with != "residency":
        with pytest.raises(UserError, match="exportable"):
            trained.adapter.export(trained.model, tmp_path / "export")
        return
    trained.adapter.export(trained.model, tmp_path / "export")
    if ADAPTERS[name].loads_with == "transformers":
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    elif ADAPTERS[name].loads_with == "residency":
        from residency.adapters.export_format import attach_exported

        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        loaded: Any = attach_exported(base, tmp_path / "export")[1]
    else:
        from peft import PeftModel

        base = make_module(llama, ADAPTERS[name].make(), {}, loading=ADAPTERS[name].loading).backbone.load()
        with expected_remarks():
            loaded = PeftModel.from_pretrained(base, tmp_path / "export")
    torch.testing.assert_close(plain_logits(loaded), logits(trained), rtol=0, atol=2e-4)


@adapters
def test_merging_keeps_the_function(name: str, llama: Path, plain: Any) -> None:
    module = built(llama, name)
    module.adapter.load_state(module.model, plain(name).state)
    if "mergeable" not in module.adapter.provides:
        with pytest.raises(UserError, match="mergeable"):
            module.adapter.merge(module.model)
        return
    before = logits(module)
    merged = module.adapter.merge(module.model)
    pristine = {key for key, _ in module.backbone.load().named_parameters()}
    assert {key for key, _ in merged.named_parameters()} == pristine, "a merged model has the backbone's own weights"
    torch.testing.assert_close(plain_logits(merged), before, rtol=0, atol=ADAPTERS[name].merge)


# -- pairs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bench(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    return Pairs(llama, tmp_path_factory.mktemp("pairs"))


@pairs
def test_pair_keeps_every_invariant(adapter: str, mitigation: str, bench: Pairs) -> None:
    bench.check(adapter, mitigation)


@adapters
def test_a_copied_model_trains_as_a_fresh_one(name: str, bench: Pairs) -> None:
    """Pairs train copies of a model that was attached once."""
    if name == "osf":
        # It decomposes anew in every stage, which differs in its last bits from call to call; training magnifies them.
        modules = bench.module(name, {}, fresh=True), bench.module(name, {})
        starts = [dict(m.adapter.weights(m.model, m.adapter.state(m.model))) for m in modules]
        torch.testing.assert_close(*starts, rtol=1e-4, atol=1e-5)
        return
    fresh, copied = bench.train(name, bench.module(name, {}, fresh=True)), bench.plain(name)
    assert not differing(fresh.final, copied.final)


@pytest.mark.parametrize("name", MITIGATIONS)
def test_a_mitigation_draws_from_the_seed_only(name: str, bench: Pairs) -> None:
    finals = []
    for seed in range(2):
        torch.manual_seed(seed)
        module = bench.module("lora_dropout", {name: MITIGATIONS[name].make()})
        finals.append(bench.train("lora_dropout", module).final)
    assert not differing(*finals)


@pytest.mark.parametrize(("adapter", "mitigation"), WHOLE)
def test_pair_through_a_whole_stream(adapter: str, mitigation: str, llama: Path, plain: Any, tmp_path: Path) -> None:
    class Stop(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
            if (module.stage.index, trainer.global_step) == (1, 3):
                raise Stopped("SIGTERM")

    def go(folder: str, **options: Any) -> Any:
        made = {mitigation: MITIGATIONS[mitigation].make()}
        return run(adapter, llama, tmp_path / folder, made, **SHORT, **options)[0]["scores"]

    whole = go("whole")
    with pytest.raises(Stopped):
        go("stopped", callbacks=[Stop()], every=1)
    assert go("stopped") == whole
    states = [load_tree(tmp_path / name / "stages" / "2-b" / "state.safetensors") for name in ("whole", "stopped")]
    assert not differing(*({key: tree[key] for key in ("weights", "mitigations")} for tree in states))
    without = plain(adapter, short=True).record["scores"]
    made = MITIGATIONS[mitigation].make()
    shared = 1 if made.touches_training(0) or made.changes_weights(0) else 2
    assert whole["nll"]["R"][:shared] == without["nll"]["R"][:shared], "the first stage is shared"
    assert whole["nll"]["R"] != without["nll"]["R"], "the mitigation did nothing"


@pytest.mark.parametrize("name", MITIGATIONS)
def test_mitigation_declares_everything(name: str) -> None:
    mitigation = MITIGATIONS[name].make()
    assert isinstance(mitigation.first_domain, int)
    assert mitigation.alternative
    assert mitigation.touches_training(1) or mitigation.changes_weights(1), "it does nothing"
    off = MITIGATIONS[name].off()
    touched = [index for index in range(3) if off.touches_training(index) or off.changes_weights(index)]
    assert not touched, "at strength 0 a study shares its stages with runs without it"
    restored = MITIGATIONS[name].make()
    restored.load_state_dict(copy.deepcopy(mitigation.state_dict()))
    with pytest.raises(KeyError, match="declared"):
        restored.load_state_dict({"unheard_of": torch.zeros(1)})


# -- seeds, evaluation, objectives, readers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_dropout", "full"])
def test_seed_decides_everything(name: str, llama_dropout: Path, tmp_path: Path) -> None:
    records = [
        run(name, llama_dropout, tmp_path / str(i), seed=seed)[0]["scores"]["nll"]["R"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert records[0] == records[1]
    assert records[0][1:] != records[2][1:]


@adapters
def test_evaluation_changes_nothing(name: str, llama: Path, plain: Any, tmp_path: Path) -> None:
    from residency.domains.stream_data import StreamData
    from residency.engine.scoring.evaluation import EvaluationSettings, evaluate

    module = built(llama, name)
    module.adapter.load_state(module.model, plain(name).state)
    data = StreamData(domains=domains(tmp_path))
    module.model.train()
    before, random = everything(module), torch.get_rng_state()
    evaluate(module, data, split="test", settings=EvaluationSettings())
    after = everything(module)
    assert {*before} == {*after}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(random, torch.get_rng_state())
    assert module.model.training


@pytest.mark.parametrize("name", SCORERS)
def test_a_scorer_tells_good_from_bad(name: str) -> None:
    """Row by row, in any company and order; in the direction that it declares; under the name of its row."""
    line, scorer = SCORERS[name], SCORERS[name].make()
    kind: RowKind = "pair" if line.rejected else "completion"
    row = Row(id="1", prompt=line.prompt, completion=line.completion, rejected=line.rejected, kind=kind)
    scorer.check([row])
    good, bad = scorer([row, row], [line.good, line.bad])
    assert good == pytest.approx(line.best)
    assert (good > bad) is scorer.higher_is_better
    assert good != bad
    assert list(scorer([row, row, row], [line.bad, line.good, line.bad])) == [bad, good, bad]
    assert list(scorer([row], [line.good])) == [good]
    assert scorer([], []) == []
    assert scorer.name == name
    assert scorer.info().unit
    assert scorer == SCORERS[name].make()
    json.dumps([scorer.options(), scorer.versions()])
    assert "missing" not in scorer.versions().values()


def test_every_score_is_a_column_of_the_record(llama: Path, tmp_path: Path) -> None:
    """Through model, matrix and summary, without an edit anywhere: all scorers of the table at once."""
    readers = domains(tmp_path / "data", {"a": "label", "b": "generative"})
    special = ("numeric", "sql_valid", "sql_execution", "preference_accuracy", "reward_accuracy")
    rows = {name: row for name, row in SCORERS.items() if name not in special}
    readers["a"].scorers = readers["b"].scorers = {name: row.make() for name, row in rows.items()}
    record, _ = run("full", llama, tmp_path / "run", data={"domains": readers}, steps=2)
    assert [*record["scores"]] == [*rows]
    for name, entry in record["scores"].items():
        labels = rows[name].make().labels != "none"
        assert all((row[0] is not None) and (row[1] is not None or labels) for row in entry["R"]), name
        assert entry["unit"] == rows[name].make().info().unit
    frame = pl.read_parquet(tmp_path / "run" / "stages" / "2-b" / "scores.parquet")
    last = record["scores"]["bits_per_byte"]["R"][-1]
    for column, value in zip("ab", last, strict=True):
        part = frame.filter((pl.col("scorer") == "bits_per_byte") & (pl.col("column") == column))
        assert (part["value"] * part["weight"]).sum() / part["weight"].sum() == pytest.approx(value)


def test_every_plug_in_has_a_row() -> None:
    """A class without a row would be tested by nothing."""
    from residency import adapters, domains, mitigations, objectives
    from residency.domains import packaged
    from residency.scorers.find import scorer_classes

    rows: list[Adapter | Mitigation] = [row.make() for row in MITIGATIONS.values()]
    assert {type(row).__name__ for row in rows} == {*mitigations.__all__} - {"Mitigation"}
    assert {type(row.make()).__name__ for row in ADAPTERS.values()} == {*adapters.__all__} - {"Adapter"}
    assert {type(row.make()).__name__ for row in OBJECTIVES.values()} == {*objectives.__all__} - {"Objective"}
    # What a study makes out of other domains is no reader.
    readers = {*domains.__all__, *packaged.__all__} - {"Domain", "Template", "Chat", "Joint"}
    assert {reader.__name__ for reader in READERS.values()} == readers
    assert {type(row.make()).__name__ for row in SCORERS.values()} == {*scorer_classes()}

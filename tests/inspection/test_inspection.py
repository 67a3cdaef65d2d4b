"""Observers: what they find is what a direct computation gives, and looking changes nothing."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.likelihoods import completion_nll
from residency.engine.trainers import Trainers
from residency.inspection import (
    AnswerCalibration,
    BackboneDrift,
    GradientNorms,
    Inspection,
    KLToBase,
    Observer,
    RepresentationDrift,
    StageSnapshot,
    WeightDriftByLayer,
    WithinStage,
)
from residency.inspection.drift_metrics import kl_tokens
from residency.inspection.gradient_metrics import GradientStability, stability_improvement
from residency.runs.folder import RunFolder
from residency.runs.stream import StreamSettings, train_stream
from residency.testing.tiny_runs import domains, make_module
from support.peft_configs import CONFIGS
from table import ADAPTERS

FEW_TUNERS = ("lora", "dora", "oft", "adaption_prompt", "prefix_tuning", "trainable_tokens")


def observers() -> dict[str, Observer]:
    return {
        "weights": WeightDriftByLayer(),
        "backbone": BackboneDrift(),
        "kl": KLToBase(tokens=200, top=32),
        "representations": RepresentationDrift(tokens=60),
        "calibration": AnswerCalibration(tokens=200),
        "gradients": GradientNorms(),
        "within": WithinStage(every=2, rows=3),
    }


def stream(folder: Path) -> StreamData:
    return StreamData(domains=domains(folder.parent / "data", {"a": "generative", "b": "label"}), batch_size=4)


def run(
    folder: Path, backbone: Path, adapter: str, watched: Mapping[str, Observer] | None, **options: Any
) -> tuple[dict[str, Any], ContinualModule, StreamData]:
    module = make_module(backbone, ADAPTERS[adapter].make(), {}, **ADAPTERS[adapter].options)
    callbacks = options.pop("callbacks", [])
    base = {"max_steps": 4, "accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False, **options}
    trainers = Trainers(lambda: {**base, "callbacks": list(callbacks)})
    data = stream(folder)
    settings = StreamSettings(cell="tiny", checkpoint_every_n_steps=2)
    parts = {"module": module, "data": data, "trainers": trainers, "folder": RunFolder(folder), "settings": settings}
    inspection = None if watched is None else Inspection(watched)
    return train_stream(**parts, inspection=inspection), module, data


def stage_record(folder: Path, stage: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "stages" / stage / "stage.json").read_text())
    return content


def stored(folder: Path, stage: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = RunFolder(folder).load_state(folder / "stages" / stage)["weights"]
    return weights


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Path, dict[str, Any], ContinualModule]:
    folder = tmp_path_factory.mktemp("lora") / "run"
    record, module, _ = run(folder, llama, "lora", observers())
    return folder, record, module


@pytest.fixture(scope="module")
def full_run(tmp_path_factory: pytest.TempPathFactory, llama: Path) -> tuple[Path, dict[str, Any], ContinualModule]:
    folder = tmp_path_factory.mktemp("full") / "run"
    record, module, _ = run(folder, llama, "full", observers())
    return folder, record, module


# -- looking changes nothing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_scores_and_states_are_those_of_a_run_that_nobody_looks_at(
    adapter: str, tmp_path: Path, llama: Path, request: pytest.FixtureRequest
) -> None:
    folder, record, _ = request.getfixturevalue(f"{adapter}_run")
    plain, _, _ = run(tmp_path / "run", llama, adapter, None)
    assert plain["scores"] == record["scores"]
    for stage in ("1-a", "2-b"):
        first, second = stored(folder, stage), stored(tmp_path / "run", stage)
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert "inside" not in plain
    assert all("inside" not in stage_record(tmp_path / "run", name) for name in ("0-base", "1-a", "2-b"))
    rest = {key: value for key, value in record.items() if key != "inside"}
    assert {*plain} == {*rest}


def test_off_costs_nothing(llama: Path) -> None:
    """Without observers nothing of the module is even read."""
    inspection = Inspection()
    nothing: Any = object()
    assert inspection.after_stage(nothing, nothing, k=1, seed=0, states=nothing, facts=nothing) == {}
    assert inspection.callbacks(nothing, nothing) == []
    assert inspection.during() == {}


# -- findings ---------------------------------------------------------------------------------------------------------


def test_weight_drift_of_lora_is_that_of_the_formed_updates(
    lora_run: tuple[Path, dict[str, Any], ContinualModule],
) -> None:
    folder, record, module = lora_run
    found = record["inside"][2]["weights"]
    layers = stage_record(folder, "2-b")["inside"]["weights"]["layers"]
    first, second = (module.adapter.weights(module.model, stored(folder, s)) for s in ("1-a", "2-b"))
    names = [name for name in second if "lora_A" in name]
    assert sorted(layers) == sorted(names)
    moved = size = inner = square_first = square_step = 0.0
    for name in names:
        frozen = module.adapter.adapted_weight(module.model, name)
        now, before = second[name], first[name]
        assert layers[name]["frobenius"] == pytest.approx(float(now.norm() / frozen.norm()), rel=1e-4)
        spectral = torch.linalg.matrix_norm(now, 2) / torch.linalg.matrix_norm(frozen, 2)
        assert layers[name]["norm"] == pytest.approx(float(now.norm()), rel=1e-4)
        assert layers[name]["spectral"] == pytest.approx(float(spectral), rel=1e-4)
        step = now - before
        cosine = float((step * before).sum() / (step.norm() * before.norm()))
        assert layers[name]["cosine"] == pytest.approx(cosine, abs=1e-4)
        moved, size = moved + float(now.square().sum()), size + float(frozen.square().sum())
        inner += float((step * before).sum())
        square_first, square_step = (
            square_first + float(before.square().sum()),
            square_step + float(step.square().sum()),
        )
    assert found["frobenius"] == pytest.approx(math.sqrt(moved / size), rel=1e-4)
    assert found["cosine"] == pytest.approx(inner / math.sqrt(square_first * square_step), abs=1e-4)
    assert len(found["by_block"]) == 2
    assert 1 <= found["stable_rank"] <= 4
    assert record["inside"][1]["weights"]["cosine"] is None
    assert "layers" not in found


def test_weight_drift_of_full_training(full_run: tuple[Path, dict[str, Any], ContinualModule]) -> None:
    folder, record, module = full_run
    start = {name: p.detach() for name, p in module.backbone.load().named_parameters()}
    last = stored(folder, "2-b")
    moved = sum(float((last[n] - start[n]).double().square().sum()) for n in last)
    size = sum(float(start[n].double().square().sum()) for n in last)
    found = record["inside"][2]
    assert found["weights"]["frobenius"] == pytest.approx(math.sqrt(moved / size), rel=1e-4)
    # All that moves is the backbone itself.
    assert found["backbone"]["percent"] == pytest.approx(100 * found["weights"]["frobenius"], rel=1e-4)


def test_a_frozen_backbone_has_not_moved_at_all(
    lora_run: tuple[Path, dict[str, Any], ContinualModule], tmp_path: Path
) -> None:
    _, record, module = lora_run
    assert [row["backbone"] for row in record["inside"][1:]] == [{"percent": 0.0, "unmatched": 0}] * 2
    layer = next(m for m in module.model.modules() if hasattr(m, "base_layer"))
    look = StageSnapshot(module=module, data=StreamData(domains=domains(tmp_path)), k=2, seed=0, states=dict)
    with torch.no_grad():
        layer.base_layer.weight[0, 0] += 1.0  # type: ignore[union-attr, operator, index]
        assert BackboneDrift().after(look)["percent"] > 0
        layer.base_layer.weight[0, 0] -= 1.0  # type: ignore[union-attr, operator, index]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_kl_to_the_base(adapter: str, request: pytest.FixtureRequest) -> None:
    folder, record, module = request.getfixturevalue(f"{adapter}_run")
    base = module.backbone.load()
    look = StageSnapshot(module=module, data=stream(folder), k=2, seed=0, states=dict)  # type: ignore[arg-type]
    with torch.no_grad():
        exact = KLToBase(tokens=200, top=1000).after(look)
        expected: dict[str, list[Tensor]] = {}
        for column, batch in look.batches(tokens=200):
            kl = kl_tokens(module.backbone.logits(base, batch), module.backbone.logits(module.model, batch))
            expected.setdefault(column, []).append(kl)
    for column, values in expected.items():
        assert exact["columns"][column] == pytest.approx(float(torch.cat(values).mean()), rel=1e-6)
    found = record["inside"][2]["kl"]
    assert set(found["columns"]) == {"a", "b"}
    assert 0 < found["mean"] <= exact["mean"] + 1e-9
    assert "kl" not in record["inside"][0]


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_kl_since_the_stage_began(adapter: str, request: pytest.FixtureRequest) -> None:
    folder, _, module = request.getfixturevalue(f"{adapter}_run")
    earlier = copy.deepcopy(module.model)
    module.adapter.load_state(earlier, stored(folder, "1-a"))
    kept = {name: tensor.clone() for name, tensor in module.adapter.state(module.model).items()}
    look = StageSnapshot(module=module, data=stream(folder), k=2, seed=0, states=lambda _: stored(folder, "1-a"))  # type: ignore[arg-type]
    with torch.no_grad():
        found = KLToBase(tokens=200, top=1000, since="stage").after(look)
        expected: dict[str, list[Tensor]] = {}
        for column, batch in look.batches(tokens=200):
            kl = kl_tokens(module.backbone.logits(earlier, batch), module.backbone.logits(module.model, batch))
            expected.setdefault(column, []).append(kl)
        first = replace(look, k=1)
        start = [KLToBase(tokens=200, since=since).after(first) for since in ("stage", "pretrained")]
    for column, values in expected.items():
        assert found["columns"][column] == pytest.approx(float(torch.cat(values).mean()), rel=1e-6)
    assert start[0] == start[1], "the first stage begins with the pretrained model"
    assert all(torch.equal(kept[name], tensor) for name, tensor in module.adapter.state(module.model).items())


@pytest.mark.parametrize("adapter", ["per_domain", "inc_lora"])
def test_kl_since_the_stage_began_where_stages_add_parts(adapter: str, tmp_path: Path, llama: Path) -> None:
    record, _, _ = run(tmp_path / "run", llama, adapter, {"kl": KLToBase(tokens=200, since="stage")})
    found = record["inside"][2]["kl"]["columns"]
    assert found["b"] > 0
    assert (found["a"] == 0) is (adapter == "per_domain"), "a part of its own is not touched by a later stage"
    plain, _, _ = run(tmp_path / "plain", llama, adapter, None)
    assert plain["scores"] == record["scores"]
    first, second = stored(tmp_path / "run", "2-b"), stored(tmp_path / "plain", "2-b")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_representations_and_calibration(adapter: str, request: pytest.FixtureRequest) -> None:
    _, record, module = request.getfixturevalue(f"{adapter}_run")
    rows = record["inside"]
    drift = rows[2]["representations"]
    assert len(drift["by_block"]) == module.model.config.num_hidden_layers == 2  # type: ignore[union-attr]
    assert all(0 < d < 1.5 for d in drift["by_block"])
    assert drift["tokens"] == 60
    # Before training too; the tokens scored there are those of later rows.
    tokens = [{c: v["tokens"] for c, v in row["calibration"]["columns"].items()} for row in rows]
    assert tokens[0] == tokens[1] == tokens[2]
    assert rows[2]["calibration"]["columns"]["b"]["nll"] < rows[0]["calibration"]["columns"]["b"]["nll"]


def test_nothing_has_drifted_where_nothing_was_trained(llama: Path, tmp_path: Path) -> None:
    module = make_module(llama, ADAPTERS["lora"].make(), {})
    module.build(seed=0)
    start = {name: tensor.clone() for name, tensor in module.adapter.state(module.model).items()}
    parts = {"module": module, "data": stream(tmp_path / "run"), "k": 1, "seed": 0}
    found = Inspection(observers()).after_stage(**parts, states=lambda k: start, facts={})["inside"]  # type: ignore[arg-type]
    assert found["weights"]["frobenius"] == found["weights"]["spectral"] == 0
    assert found["kl"]["mean"] == pytest.approx(0, abs=1e-9)
    assert found["representations"]["mean"] == pytest.approx(0, abs=1e-6)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # of torch, once per process, for SHiRA
@pytest.mark.parametrize(
    "adapter",
    [pytest.param(n, marks=pytest.mark.pairs if n in CONFIGS and n not in FEW_TUNERS else ()) for n in ADAPTERS],
)
def test_every_adapter_can_be_looked_into(adapter: str, llama: Path, tmp_path: Path) -> None:
    module = make_module(llama, ADAPTERS[adapter].make(), {}, **ADAPTERS[adapter].options)
    module.build(seed=0)
    draw = torch.Generator().manual_seed(1)
    start = {name: tensor.clone() for name, tensor in module.adapter.state(module.model).items()}
    moved = {
        n: t + 0.05 * torch.randn(t.shape, generator=draw) if t.is_floating_point() else t for n, t in start.items()
    }
    module.adapter.load_state(module.model, moved)
    module.model.train()
    parts = {"module": module, "data": stream(tmp_path / "run"), "k": 1, "seed": 0, "facts": {}}
    found = Inspection(observers()).after_stage(**parts, states=lambda k: start)["inside"]  # type: ignore[arg-type]
    json.dumps(found, allow_nan=False)
    assert found["weights"]["norm"] > 0
    # Rotations of OFT, coefficients of FourierFT and others start at 0: nothing to be relative to.
    products = module.adapter.low_rank(module.model, start)
    from_nothing = not products and not any(tensor.any() for tensor in start.values())
    assert (found["weights"]["frobenius"] is None) == from_nothing
    # Who is told the domain answers as the base does as long as it has learned none.
    as_base = module.adapter.task_id_at_test and adapter.startswith("per_domain")
    assert (found["kl"]["mean"] == 0) == as_base
    # New embeddings of tokens that no probe has show at the tied head only.
    assert found["representations"]["mean"] > 0 or as_base or adapter == "trainable_tokens"
    assert module.model.training
    if adapter == "adaption_prompt":
        # It puts the attention of a block into a module of its own: nothing can be compared, and that is said.
        assert found["backbone"] == {"percent": None, "unmatched": 8}
    elif "reference" in module.adapter.provides:
        assert found["backbone"] == {"percent": 0.0, "unmatched": 0}
    else:
        # The pretrained weights themselves move, or were rewritten at the start (PiSSA).
        assert found["backbone"]["unmatched"] == 0


class _Routed:
    """Serves rows one way or the other, as an adapter with a part per domain does."""

    def __init__(self) -> None:
        self.entered: list[str] = []

    def serve(self, model: Any, column: str, examples: Any, prompt_nll: Any) -> Any:
        assert prompt_nll(examples).shape == (len(examples),)
        return [(self._part("even"), examples[::2]), (self._part("odd"), examples[1::2])]

    @contextmanager
    def _part(self, name: str) -> Iterator[None]:
        self.entered.append(name)
        yield


def test_rows_are_read_as_scoring_serves_them(
    lora_run: tuple[Path, dict[str, Any], ContinualModule], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _, module = lora_run
    look = StageSnapshot(module=module, data=stream(folder), k=2, seed=0, states=dict)  # type: ignore[arg-type]
    with torch.no_grad():
        plain = [obs.after(look) for obs in (KLToBase(tokens=200), RepresentationDrift(tokens=60))]
        routed = _Routed()
        monkeypatch.setattr(module.adapter, "route", routed.serve)
        again = [obs.after(look) for obs in (KLToBase(tokens=200), RepresentationDrift(tokens=60))]
    assert set(routed.entered) == {"even", "odd"}
    assert again[0]["mean"] == pytest.approx(plain[0]["mean"], rel=1e-4)
    assert again[1]["by_block"] == pytest.approx(plain[1]["by_block"], rel=1e-3)


# -- gradients --------------------------------------------------------------------------------------------------------


class _Stop(Callback):
    """Fails at the end of a step of the second stage, once."""

    def __init__(self) -> None:
        self.armed = True

    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if self.armed and module.stage.index == 1 and trainer.global_step == 3:
            self.armed = False
            raise RuntimeError("stop here")


def test_a_run_that_goes_on_finds_the_same(
    tmp_path: Path, llama: Path, lora_run: tuple[Path, dict[str, Any], ContinualModule]
) -> None:
    stop = _Stop()
    with pytest.raises(RuntimeError, match="stop here"):
        run(tmp_path / "run", llama, "lora", observers(), callbacks=[stop])
    record, _, _ = run(tmp_path / "run", llama, "lora", observers(), callbacks=[stop])
    assert record["inside"] == lora_run[1]["inside"]
    assert record["inside"][2]["gradients"]["steps"] == 4


class _Norms(Callback):
    def __init__(self) -> None:
        self.norms: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        leaves = module.adapter.trainable(module.model).values()
        squares = [float(p.grad.square().sum()) for p in leaves if p.grad is not None]
        self.norms.append(math.sqrt(sum(squares)))


def test_gradient_norms_are_those_before_clipping(tmp_path: Path, llama: Path) -> None:
    found = {}
    for clip in (1e-3, None):
        norms = _Norms()
        record, _, _ = run(
            tmp_path / str(clip), llama, "lora", {"g": GradientNorms()}, callbacks=[norms], gradient_clip_val=clip
        )
        found[clip] = record["inside"][1]["g"]
        assert found[clip]["largest"] == pytest.approx(max(norms.norms[:4]), rel=1e-4)
        assert found[clip]["largest"] > 1e-2
    assert (found[1e-3]["clipper"], found[None]["clipper"]) == ("norm 0.001", "none")
    clipped, free = (GradientStability(**found[clip]) for clip in (1e-3, None))
    with pytest.raises(ValueError, match="clipper"):
        stability_improvement(clipped, free)


# -- cost -------------------------------------------------------------------------------------------------------------


def test_old_domains_while_a_new_one_is_learnt(lora_run: tuple[Path, dict[str, Any], ContinualModule]) -> None:
    """The last point is the state that the stage leaves; gap and area are those of the curve."""
    folder, record, module = lora_run
    found = {stage: stage_record(folder, stage)["inside"]["within"] for stage in ("1-a", "2-b")}
    assert {stage: {*own["curve"]} for stage, own in found.items()} == {"1-a": {"a"}, "2-b": {"a", "b"}}
    for own in found.values():
        assert all([step for step, _ in points] == [0, 2, 4] for points in own["curve"].values())
    data = stream(folder)
    split = "validation" if data.domains["a"].rows("validation") else "test"
    rows = data.evaluation_examples("a", split, module.backbone.tokenizer, competing=0)[:3]
    module.model.eval()
    last = found["2-b"]["curve"]["a"]
    assert last[-1][1] == pytest.approx(float(completion_nll(module, rows).mean()), abs=1e-5)
    assert found["1-a"]["curve"]["a"][-1][1] == pytest.approx(last[0][1], abs=1e-5), "where the next stage begins"
    columns = found["2-b"]["columns"]
    losses = [nats for _, nats in last]
    assert columns["a"]["stability_gap"] == pytest.approx(losses[0] - max(losses), abs=1e-5)
    new = [nats for _, nats in found["2-b"]["curve"]["b"]]
    assert columns["b"]["area"] == pytest.approx(-(new[0] + 2 * new[1] + new[2]) / 4, rel=1e-5)
    assert "curve" not in record["inside"][2]["within"], "details stay in the stage's own record"


def test_what_the_optimizer_keeps_is_always_recorded(lora_run: tuple[Path, dict[str, Any], ContinualModule]) -> None:
    _, record, module = lora_run
    leaves = module.adapter.trainable(module.model).values()
    # AdamW: two moments in float32, and a step counter per tensor.
    expected = sum(8 * leaf.numel() + 4 for leaf in leaves)
    cost = record["cost"]
    assert cost["optimizer_state_bytes"] == expected
    # Against torch's counter: tests/engine/test_costs.py. An input embedding is looked up, no product.
    most = (4 * cost["total_parameters"] + 2 * cost["trainable_parameters"]) * cost["train_tokens"]
    assert 0 < cost["training_flops"] < most
    assert cost["train_tokens"] >= cost["batch_tokens"] > 0
    assert cost["evaluation_tokens"] > 0
    assert cost["evaluation_flops"] > 0

"""Estimates of memory against what is kept, stored and allocated."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Adapter, Full, GaLore
from residency.adapters.peft import lora
from residency.backbones.outline import quantised_bits
from residency.backbones.quantisation import Quantisation
from residency.core.assets.cache import packaged_model
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.core.tensors import size_in_bytes
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.estimate import StageEstimate, estimate_stage, largest_that_fits
from residency.engine.memory import Blocks, Held, Row, activation_bytes, estimate_memory
from residency.engine.module import ContinualModule
from residency.engine.stage import begin_stage, finish_stage, train_stage
from residency.engine.stage_outline import Device, outlined
from residency.engine.trainers import Trainers
from residency.metrics.cost import optimizer_state_bytes
from residency.mitigations import EWC, MAS, SI, Mitigation, SelfDistillation
from residency.testing.tiny_models import write_backbone
from residency.testing.tiny_runs import domains, make_module, train
from support.allocator import held_bytes, watched_peak

Case = tuple[Callable[[], Adapter], Mapping[str, Callable[[], Mitigation]], dict[str, Any]]

LORA: Callable[[], Adapter] = lambda: lora(r=8, target_modules="all-linear")  # noqa: E731
CASES: dict[str, Case] = {
    "lora": (LORA, {}, {}),
    "full": (Full, {}, {}),
    "qlora": (LORA, {}, {"quantisation": Quantisation()}),
    "galore": (lambda: GaLore(rank=16), {}, {}),
    "ewc": (LORA, {"ewc": lambda: EWC(strength=1.0)}, {}),
    "self-distillation": (LORA, {"old": SelfDistillation}, {}),
}
ALONE = Device(kind="cpu", precision="32-true", ranks=1)
STEPS = 2


def build(case: str, backbone: Path) -> ContinualModule:
    adapter, mitigations, loading = CASES[case]
    made = {name: make() for name, make in mitigations.items()}
    return make_module(backbone, adapter(), made, loading=loading, lr=1e-4)


def stages(data: StreamData, batch: int) -> list[Stage]:
    return [
        Stage(index=k, domain=d, seed=0, kind=data.domains[d].kind, steps=STEPS, batch_size=batch, stages=3)
        for k, d in enumerate(data.order)
    ]


def estimated(module: ContinualModule, data: StreamData, stage: Stage) -> StageEstimate:
    return estimate_stage(module, data, stage, outlined(module, ALONE), ALONE, micro=stage.batch_size)


@cache
def wide(folder: Path) -> Path:
    """4 layers of 128: large enough that activations are more than what surrounds them."""
    return write_backbone(folder / "wide", layers=4, width=128)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wide(tmp_path_factory.mktemp("memory"))


# -- without a profiler: parts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("case", "way"), [("lora", "node"), ("full", "modules"), ("qlora", "modules")])
def test_activations_are_what_a_backward_pass_will_read(case: str, way: str, backbone: Path, tmp_path: Path) -> None:
    module, data = build(case, backbone), StreamData(domains=domains(tmp_path), batch_size=16)
    found = outlined(module, ALONE)
    module = build(case, backbone)
    module.build(seed=0)
    rows = list(data.examples(stages(data, 16)[0], module.backbone.tokenizer))[:16]
    batch = module.objective.collate(rows, layout="packed")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module.backbone.nll(module.model.train(), batch)
    for p in module.model.parameters():
        kept.pop(p.untyped_storage().data_ptr(), None)
    row = Row(tokens=batch.tokens, read=len(batch.target_at.unique()), targets=len(batch.targets))
    assert out.requires_grad
    assert found.way == way
    assert activation_bytes(found.blocks, row, way=found.way) == pytest.approx(sum(kept.values()), rel=0.1)


@pytest.mark.parametrize("case", ["lora", "full", "galore"])
def test_weights_gradients_and_optimizer_are_exact(case: str, backbone: Path, tmp_path: Path) -> None:
    module, data = build(case, backbone), StreamData(domains=domains(tmp_path), batch_size=4)
    stage = stages(data, 4)[0]
    memory = estimated(module, data, stage).memory
    built = build(case, backbone)
    built.build(seed=0)
    begin_stage(built, data, stage)
    optimizer: Any = built.adapter.optimizer(built.model, built.optimizer_factory)
    leaves = list(built.adapter.trainable(built.model).values())
    for leaf in leaves:
        leaf.grad = torch.randn_like(leaf)
    optimizer.step()
    assert memory.weights == held_bytes([*built.model.parameters(), *built.model.buffers()])
    assert memory.gradients == held_bytes([leaf.grad for leaf in leaves if leaf.grad is not None])
    assert memory.optimizer == pytest.approx(optimizer_state_bytes(optimizer), rel=1e-3)


@pytest.mark.parametrize("make", [EWC, MAS, SI, SelfDistillation])
def test_what_mitigations_remember(make: Callable[[], Mitigation], llama: Path, tmp_path: Path) -> None:
    """In the second of three stages; within 1 %, and a few numbers that do not depend on the parameters."""
    record, _ = train(tmp_path / "run", llama, LORA(), {"x": make()}, steps=2)
    (path,) = (tmp_path / "run" / "stages").glob("2-*/state.safetensors")
    held = load_tree(path)["facts"]["mitigation_state_bytes"]["x"]
    assert held == pytest.approx(make().remembers(record["cost"]["trainable_parameters"], 1), rel=0.01, abs=600)


def test_bits_of_quantised_weights() -> None:
    assert quantised_bits(Quantisation(kind="nf4", double=True)) == pytest.approx(4.127, abs=1e-3)
    assert quantised_bits(Quantisation(kind="nf4", double=False)) == 4.5


BLOCKS = Blocks(layers=2, hidden=8, feed_forward=16, queries=8, keys=4, heads=2, vocabulary=32)


def test_the_peak_is_where_most_is_alive() -> None:
    row = Row(tokens=10, read=10, targets=10)
    light = Held(weights=100, gradients=1, optimizer=2, largest=1)
    found = estimate_memory(BLOCKS, row, light, way="modules")
    # 2 layers of 4 D + 5 Q + 4 I + H + 2 and 2 D + 2 d beside them, at 10 tokens of 4 bytes.
    assert found.activations == 4 * 10 * (2 * (4 * 8 + 5 * 8 + 4 * 16 + 2 + 2) + 2 * 8 + 2 * 4)
    assert found.peak == found.forward == 103 + found.activations + found.head
    copies = Held(weights=100, gradients=10_000, optimizer=20_000, largest=1, copies=4)
    assert (found := estimate_memory(BLOCKS, row, copies, way="modules")).peak == found.step == 70_100


def test_checkpointing_keeps_the_borders_of_layers() -> None:
    row = Row(tokens=10, read=2, targets=2)
    deep = Blocks(layers=40, hidden=8, feed_forward=16, queries=8, keys=4, heads=2, vocabulary=32)
    whole, borders = (activation_bytes(deep, row, way=way) for way in ("modules", "checkpointed"))
    assert borders < whole / 5


# -- micro-batches -----------------------------------------------------------------------------------------------------


def test_the_largest_micro_batch_that_fits(backbone: Path, tmp_path: Path) -> None:
    module, data = build("lora", backbone), StreamData(domains=domains(tmp_path), batch_size=12)
    stage, found = stages(data, 12)[0], outlined(module, ALONE)

    def estimate(micro: int) -> StageEstimate:
        return estimate_stage(module, data, stage, found, ALONE, micro=micro)

    peaks = {micro: estimate(micro).memory.peak for micro in (1, 2, 3, 4, 6, 12)}
    assert sorted(peaks.values()) == list(peaks.values())
    for micro, peak in peaks.items():
        fit = largest_that_fits(12, estimate, ranks=1, limit=round(peak / 0.9) + 1)
        assert fit is not None
        assert fit.micro_batch == micro
    assert largest_that_fits(12, estimate, ranks=1, limit=peaks[1] // 2) is None
    half = largest_that_fits(12, estimate, ranks=2, limit=10 * peaks[12])
    assert half is not None
    assert half.micro_batch == 6


# -- against the allocator ---------------------------------------------------------------------------------------------


def measured(module: ContinualModule, data: StreamData, stage: Stage, folder: Path) -> int:
    """Peak of training a stage and of what follows, all that is held included."""
    held = held_bytes([*module.model.parameters(), *module.model.buffers()])
    held += sum(size_in_bytes(m.state_dict()) for m in module.mitigations.values())
    gradients = held_bytes([p.grad for p in module.model.parameters() if p.grad is not None])
    trainers = Trainers(lambda: {"accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False})
    history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None)
    options: dict[str, Any] = {"folder": folder, "history": history, "observers": [], "checkpoint_every_n_steps": 0}
    with watched_peak() as training:
        facts = train_stage(module=module, data=data, trainers=trainers, stage=stage, **options)
    after = held_bytes([p.grad for p in module.model.parameters() if p.grad is not None])
    with watched_peak() as finish:
        finish_stage(module, facts, device=torch.device("cpu"))
    return held + max(gradients + training.highest, after + finish.highest)


def compare(case: str, backbone: Path, folder: Path, *, batch: int, tolerance: float) -> None:
    data = StreamData(domains=domains(folder / "data"), batch_size=batch)
    plan, module = build(case, backbone), build(case, backbone)
    module.build(seed=0)
    for stage in stages(data, batch)[:2]:
        told = estimated(plan, data, stage).memory.peak
        found = measured(module, data, stage, folder / str(stage.index))
        print(f"{case}, stage {stage.index + 1}: estimated {told / 1e6:.1f} MB, allocated {found / 1e6:.1f} MB")
        assert told == pytest.approx(found, rel=tolerance)


@pytest.mark.parametrize("case", ["lora"])
def test_the_estimate_is_what_the_allocator_hands_out(case: str, backbone: Path, tmp_path: Path) -> None:
    compare(case, backbone, tmp_path, batch=16, tolerance=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_a_small_model(case: str, backbone: Path, tmp_path: Path) -> None:
    compare(case, backbone, tmp_path, batch=16, tolerance=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_on_the_packaged_model(case: str, tmp_path: Path) -> None:
    try:
        folder = packaged_model()
    except UserError:
        pytest.skip("run `residency assets` first: the packaged model is not in the assets cache")
    compare(case, folder, tmp_path, batch=32, tolerance=0.15)

"""QLoRA on a CPU: what NF4 keeps, which gradients arrive, what stays frozen; 8-bit optimizers resume exactly."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import bitsandbytes.functional as quantised
import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters import Full, Peft
from residency.backbones import CausalLM, Quantisation
from residency.core.errors import UserError
from residency.core.signals import Stopped
from residency.core.tensors import snapshot
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.settings import EvaluationSettings
from residency.engine.trainers import Trainers
from residency.objectives import SFT
from residency.runs.folder import RunFolder
from residency.runs.stream import StreamSettings, train_stream
from residency.testing.tiny_runs import domains, make_module, train
from support.peft_configs import CONFIGS
from support.tuned_models import attach, backbone, learn, logits
from table import ADAPTERS

# The 16 levels of NF4 (QLoRA, appendix E).
LOWER = (-1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0)
UPPER = (0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0)
LEVELS = torch.tensor([*LOWER, *UPPER])
NESTED = pytest.mark.parametrize("double", [False, True])


def round_trip(weight: torch.Tensor, *, double: bool) -> torch.Tensor:
    codes, state = quantised.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=double)
    return quantised.dequantize_4bit(codes, state)


def four_bit(model: Any) -> dict[str, torch.Tensor]:
    return {name: p for name, p in model.named_parameters() if not p.is_floating_point()}


def _plain(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


def qlora() -> Peft:
    return Peft(config=CONFIGS["lora"]())


# -- NF4 ------------------------------------------------------------------------------------------------------------


@NESTED
def test_the_error_of_nf4_on_normal_weights(double: bool) -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 1024)
    error = round_trip(weight, double=double) - weight
    assert float(error.abs().mean()) == pytest.approx(0.0729 if double else 0.0728, abs=1e-4)
    assert float(error.square().mean().sqrt() / weight.square().mean().sqrt()) == pytest.approx(0.0920, abs=1e-4)


def test_no_weight_moves_further_than_half_a_gap() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 64)
    error = (round_trip(weight, double=False) - weight).view(-1, 64)
    bound = weight.view(-1, 64).abs().amax(1) * float(LEVELS.diff().max()) / 2
    assert bool((error.abs().amax(1) <= bound * (1 + 1e-5)).all())
    levels = round_trip(weight, double=False).view(-1, 64) / weight.view(-1, 64).abs().amax(1, keepdim=True)
    assert float((levels[..., None] - LEVELS).abs().amin(-1).max()) < 1e-6


def test_a_second_round_trip_is_exact_with_single_quantisation_only() -> None:
    torch.manual_seed(0)
    once = {double: round_trip(torch.randn(256, 256), double=double) for double in (False, True)}
    again = {double: round_trip(weight, double=double) for double, weight in once.items()}
    assert torch.equal(again[False], once[False])
    moved = float((again[True] - once[True]).abs().max())
    assert 0 < moved < 5e-3


@NESTED
def test_bits_per_weight(double: bool) -> None:
    layer = bnb.nn.Linear4bit(4096, 256, bias=False, quant_type="nf4", compress_statistics=double)
    layer.weight = bnb.nn.Params4bit(
        torch.randn(256, 4096), requires_grad=False, quant_type="nf4", compress_statistics=double
    )
    layer = layer.to("cpu")
    state = layer.weight.quant_state
    stored = 8 * layer.weight.numel() + 8 * state.absmax.numel() * state.absmax.element_size()
    if double:
        stored += 32 * state.state2.absmax.numel()
    assert stored / (256 * 4096) == pytest.approx(4.127 if double else 4.5, abs=5e-4)


# -- LoRA on top ----------------------------------------------------------------------------------------------------


def test_gradients_of_the_first_layer_survive_a_validation_pass(llama: Path, tmp_path: Path) -> None:
    """On CPUs with AVX512-BF16 an evaluation would repack the weights into a form without autograd."""
    module = make_module(llama, qlora(), {}, loading={"quantisation": Quantisation()})
    module.build(seed=0)
    data = StreamData(domains=domains(tmp_path))
    codes = snapshot(four_bit(module.model))
    found = []
    for _ in range(2):
        module.model.zero_grad()
        learn(module.model, steps=1, lr=0.0)
        found.append({n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None})
        evaluate(module, data, split="test", settings=EvaluationSettings())
    first = [name for name in found[0] if "layers.0." in name and "lora_B" in name]
    assert len(first) == 7
    assert all(float(found[0][name].norm()) > 0 for name in first)
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(torch.equal(tensor, codes[name]) for name, tensor in four_bit(module.model).items()), "nothing repacked"


def test_no_layer_may_repack_on_a_cpu_that_could(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    assert bnb.nn.Linear4bit(64, 64).support_avx512bf16_for_cpu, "bitsandbytes would repack here"
    model = backbone(llama, quantised=True).load()
    flags = [m.support_avx512bf16_for_cpu for m in model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert flags == [False] * 14


def test_codes_are_frozen_and_adapters_off_are_the_quantised_base(llama: Path, tmp_path: Path) -> None:
    pristine = backbone(llama, quantised=True).load()
    codes = snapshot(four_bit(pristine))
    assert len(codes) == 14, "every linear layer of the blocks"
    options: dict[str, Any] = {"loading": {"quantisation": Quantisation()}}
    _, module = train(tmp_path / "run", llama, qlora(), **options)
    trainable = module.adapter.trainable(module.model)
    assert not {*trainable} & {*four_bit(module.model)}
    assert all(p.dtype == torch.float32 and bool(torch.isfinite(p).all()) for p in trainable.values())
    stored = {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): p
        for name, p in four_bit(module.model).items()
    }
    assert {*stored} == {*codes}
    assert all(torch.equal(stored[name], tensor) for name, tensor in codes.items())
    with module.adapter.reference(module.model):
        assert torch.equal(logits(module.model), logits(pristine))
    assert not torch.equal(logits(pristine), logits(backbone(llama).load())), "the reference is the quantised base"


def test_merging_is_done_on_a_dequantised_copy(llama: Path) -> None:
    """Into the codes themselves it would change the function; the merge tax of a dequantised copy is rounding."""
    adapter = qlora()
    model = attach(llama, adapter, quantised=True)
    learn(model)
    tuned = logits(model)
    merged = adapter.merge(model)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}
    tax = float((logits(merged) - tuned).abs().max())
    other = attach(llama, adapter, quantised=True)
    learn(other)
    with pytest.warns(UserWarning, match="rounding errors"):
        into_codes = float((logits(other.merge_and_unload()) - tuned).abs().max())
    assert tax < 1e-5
    assert into_codes > 1e3 * tax


@pytest.mark.parametrize("adapter", [Full(), ADAPTERS["osf"].make(), Peft(config=CONFIGS["pissa"]())])
def test_what_cannot_stand_on_codes_names_what_can(adapter: Any, llama: Path) -> None:
    with pytest.raises(UserError, match=r"quantised(.|\n)*model\.backbone\.quantisation to null(.|\n)*lora\.yaml"):
        attach(llama, adapter, quantised=True)


def test_eight_bit_weights_train_too(llama: Path) -> None:
    model = CausalLM(path=str(llama), quantisation=Quantisation(kind="int8")).load()
    off = logits(model)
    adapter = qlora()
    model = adapter.attach(model)
    assert torch.equal(logits(model), off)
    learn(model)
    with adapter.reference(model):
        assert torch.equal(logits(model), off)


# -- 8-bit and paged optimizers -------------------------------------------------------------------------------------


class _Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 3):
            raise Stopped("SIGKILL")


class _Dtypes(Callback):
    def __init__(self) -> None:
        self.seen: set[torch.dtype] = set()

    def on_train_end(self, trainer: Trainer, module: Any) -> None:
        states = trainer.optimizers[0].state.values()
        self.seen |= {value.dtype for state in states for value in state.values() if torch.is_tensor(value)}


def run(folder: Path, llama: Path, optimizer: Any, *callbacks: Callback) -> tuple[dict[str, Any], ContinualModule]:
    """Two tiny domains with an optimizer of the user's."""
    module = ContinualModule(
        backbone=backbone(llama, quantised=True), adapter=qlora(), objective=SFT(), optimizer=optimizer
    )
    stream = StreamData(domains=domains(folder.parent / "data", {"a": "generative", "b": "label"}), batch_size=4)
    options = {"max_steps": 4, "accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False}
    trainers = Trainers(lambda: {**options, "callbacks": list(callbacks)})
    settings = StreamSettings(cell="tiny", seed=0, checkpoint_every_n_steps=2)
    record = train_stream(module=module, data=stream, trainers=trainers, folder=RunFolder(folder), settings=settings)
    return record, module


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize(("name", "lr"), [("AdamW8bit", 2e-2), ("PagedAdamW8bit", 2e-2), ("Lion8bit", 3e-3)])
def test_an_8_bit_optimizer_trains_and_resumes_exactly(name: str, lr: float, llama: Path, tmp_path: Path) -> None:
    optimizer = partial(getattr(bnb.optim, name), lr=lr, weight_decay=0.1, min_8bit_size=64)
    dtypes = _Dtypes()
    whole, first = run(tmp_path / "whole", llama, optimizer, dtypes)
    assert torch.uint8 in dtypes.seen, "moments are stored in 8 bits"
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", llama, optimizer, _Stop())
    resumed, second = run(tmp_path / "stopped", llama, optimizer)
    assert resumed["scores"] == whole["scores"]
    states = [module.adapter.state(module.model) for module in (first, second)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    matrix = whole["scores"]["nll"]["R"]
    assert matrix[1][0] < matrix[0][0]


def test_the_state_of_an_8_bit_optimizer_is_about_a_quarter(llama: Path) -> None:
    bytes_of = {}
    for name in ("AdamW", "AdamW8bit"):
        cls = getattr(bnb.optim, name)
        weight = torch.nn.Parameter(torch.randn(256, 256))
        stepper = cls([weight], lr=1e-3)
        weight.square().sum().backward()
        stepper.step()
        moments = [v for k, v in stepper.state[weight].items() if k.startswith(("state", "absmax"))]
        bytes_of[name] = sum(t.numel() * t.element_size() for t in moments)
    assert bytes_of["AdamW"] == 2 * 4 * 256 * 256
    assert bytes_of["AdamW8bit"] < 0.26 * bytes_of["AdamW"]


def test_the_preset_is_nf4_twice_quantised_with_lora(llama: Path) -> None:
    from residency.runs.cli import parse

    root = Path(__file__).parents[2]
    words = ["--config", str(root / "configs/quickstart.yaml"), "--config", str(root / "configs/backbone/qlora.yaml")]
    module = parse(
        ["fit", *words, f"--model.backbone.path={llama}", "--model.optimizer=bitsandbytes.optim.Lion8bit"]
    ).model
    module.build(seed=0)
    assert module.backbone.quantisation == Quantisation(kind="nf4", double=True)
    states = [m.weight.quant_state for m in module.model.modules() if isinstance(m, bnb.nn.Linear4bit)]
    assert len(states) == 14
    assert {(s.quant_type, s.nested) for s in states} == {("nf4", True)}
    assert type(module.optimizer_factory(list(module.adapter.trainable(module.model).values()))).__name__ == "Lion8bit"


def test_a_quantised_base_and_full_fine_tuning_end_in_one_sentence(llama: Path, tmp_path: Path) -> None:
    from support.cli import call, tiny_config, write_yaml

    config = write_yaml(tmp_path / "run.yaml", tiny_config(tmp_path / "data", llama))
    words = ["--config", config, "--run_dir", tmp_path / "run", "--model.backbone.quantisation.kind=nf4"]
    root = Path(__file__).parents[2] / "configs" / "adapter"
    for adapter in ("Full", root / "osf.yaml", root / "hra.yaml"):
        result = call("fit", *words, f"--model.adapter={adapter}")
        assert result.code == 2
        assert "quantised backbone" in result.err
        assert "lora.yaml" in result.err
        assert "Traceback" not in result.err
    assert not (tmp_path / "run" / "results.json").exists()

"""Sinkhorn mixing: properties (a) to (j) of the specification, the arms, files of our own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from residency.adapters import Adapter, Full, GaLore, Peft, PerDomain, SinkhornResidual
from residency.adapters.algebra.sinkhorn import (
    Mixer,
    Mixing,
    birkhoff,
    initial_logits,
    mix,
    mixing_matrix,
    residual,
    sinkhorn,
)
from residency.adapters.export_format import attach_exported
from residency.adapters.peft import lora
from residency.adapters.sinkhorn import mixers
from residency.backbones import CausalLM, Quantisation
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.row_scores import means
from residency.engine.scoring.settings import EvaluationSettings
from residency.testing.tiny_runs import domains, train

IDS = torch.arange(20, 44).view(2, 12)
KINDS: tuple[Mixing, ...] = ("exact", "sinkhorn", "unconstrained")
TWO = {"a": "generative", "b": "label"}


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


def disturb(model: nn.Module) -> nn.Module:
    """As if it had been trained: everything that moves, gates open."""
    draw = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            p.data += torch.full((), 0.5) if name.endswith(".gate") else 0.1 * torch.randn(p.shape, generator=draw)
    return model


def fresh_lora() -> PerDomain:
    """The arm `frozen`: a LoRA of its own for every domain, chosen by name when it is scored."""
    return PerDomain(config=LoraConfig(r=2, target_modules=["q_proj", "v_proj"]), compare=False)


# -- mixing matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [2, 3, 4])
def test_doubly_stochastic(streams: int) -> None:
    """(a), (b): entries, sums, spectral norm."""
    draw = torch.Generator().manual_seed(streams)
    count = len(initial_logits(kind="exact", streams=streams))
    for _ in range(50):
        m = birkhoff(3 * torch.randn(count, generator=draw), streams=streams)
        assert m.min() >= 0
        assert residual(m) <= 1e-6
        torch.testing.assert_close(torch.linalg.matrix_norm(m, ord=2), torch.ones(()), rtol=0, atol=1e-6)
        # What 20 iterations leave grows with the spread of the logits: up to 1 % at 1, measured 4 % at 3.
        for spread, left in ((1.0, 1e-2), (3.0, 5e-2)):
            m = sinkhorn(spread * torch.randn(streams, streams, generator=draw), iterations=20)
            assert m.min() >= 0
            assert (m.sum(0) - 1).abs().max() <= 1e-5, "the axis that is normalised last"
            assert (m.sum(1) - 1).abs().max() <= left
            assert torch.linalg.matrix_norm(m, ord=2) <= 1 + 1e-2
    bad = max(float(residual(sinkhorn(3 * torch.randn(4, 4, generator=draw), iterations=1))) for _ in range(50))
    assert bad > 0.1, "one iteration gives no bound: the iterations matter"


def test_exact_mixing_reaches_every_permutation() -> None:
    seen = {tuple(birkhoff(100.0 * torch.eye(6)[i], streams=3).argmax(1).tolist()) for i in range(6)}
    assert len(seen) == 6
    torch.testing.assert_close(birkhoff(torch.zeros(24), streams=4), torch.full((4, 4), 0.25))


def parts(kind: Mixing = "exact", gate: float = 0.5) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(3)
    torch.manual_seed(4)
    read = nn.init.orthogonal_(torch.empty(16, 8))
    return {
        "read": read,
        "write": torch.randn(8, 16, generator=draw),
        "matrix": mixing_matrix(5 * initial_logits(kind=kind, streams=4), kind=kind, streams=4),
        "gate": torch.tensor(gate),
        "log_alpha": torch.tensor(0.3),
    }


@pytest.mark.parametrize("kind", KINDS)
def test_gate_zero_and_the_identity_give_the_input(kind: Mixing) -> None:
    h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5))
    assert torch.equal(mix(h, **parts(kind, gate=0.0)), h)
    assert torch.equal(mix(h, **{**parts(kind), "matrix": torch.eye(4)}), h)
    assert not torch.equal(mix(h, **parts(kind)), h)


def test_permuting_streams_changes_nothing() -> None:
    """(i): streams have no order; permute reads and writes, conjugate the matrix."""
    h = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(5))
    given = parts()
    order = torch.tensor([2, 0, 3, 1])
    read = given["read"].unflatten(1, (4, 2))[:, order].flatten(1)
    write = given["write"].unflatten(0, (4, 2))[order].flatten(0, 1)
    moved = {**given, "read": read, "write": write, "matrix": given["matrix"][order][:, order]}
    torch.testing.assert_close(mix(h, **moved), mix(h, **given), rtol=0, atol=1e-5)
    wrong = {**moved, "matrix": given["matrix"][order]}
    assert (mix(h, **wrong) - mix(h, **given)).abs().max() > 1e-2


@pytest.mark.parametrize(("alpha", "norm"), [(0.5, 1.0), (1.0, 1.0), (1.355, 1.71), (3.0, 5.0)])
def test_the_constraint_bounds_the_matrix_and_not_the_map(alpha: float, norm: float) -> None:
    """Two streams that change places: doubly stochastic, and h -> h' has norm max(1, 2 alpha - 1)."""
    read = torch.nn.init.orthogonal_(torch.empty(6, 4))
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    parts = {"read": read, "write": read.T, "gate": torch.ones(()), "log_alpha": torch.tensor(alpha).log()}
    image = mix(torch.eye(6), matrix=swap, **parts)
    assert torch.linalg.matrix_norm(swap, ord=2) == pytest.approx(1.0)
    assert float(torch.linalg.matrix_norm(image, ord=2)) == pytest.approx(norm, abs=1e-5)


def test_arms_share_all_draws_but_those_of_their_matrix() -> None:
    """Whatever is drawn behind one mixer, another one or a LoRA, is the same in every arm."""
    drawn = {}
    for kind in KINDS:
        torch.manual_seed(3)
        first, second = (Mixer(12, kind=kind, streams=3, rank=2, iterations=20) for _ in range(2))
        drawn[kind] = torch.cat([first.read.flatten(), second.read.flatten(), torch.randn(5)])
    assert all(torch.equal(own, drawn["exact"]) for own in drawn.values())
    matrices = {}
    for kind in ("sinkhorn", "unconstrained"):
        torch.manual_seed(3)
        matrices[kind] = Mixer(12, kind=kind, streams=3, rank=2, iterations=20).matrix()  # type: ignore[arg-type]
    torch.testing.assert_close(matrices["sinkhorn"], matrices["unconstrained"])


def test_the_unconstrained_arm_starts_where_the_other_does() -> None:
    torch.manual_seed(0)
    constrained = mixing_matrix(initial_logits(kind="sinkhorn", streams=4), kind="sinkhorn", streams=4)
    torch.manual_seed(0)
    free = mixing_matrix(initial_logits(kind="unconstrained", streams=4), kind="unconstrained", streams=4)
    assert torch.equal(constrained, free)


# -- the adapter ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_identity_at_the_start_and_base_when_disabled(
    kind: Mixing, architecture: str, request: pytest.FixtureRequest
) -> None:
    """(c), (j), bit for bit; alone and around a LoRA."""
    backbone = CausalLM(path=str(request.getfixturevalue(architecture)))
    reference = logits(backbone.load())
    for inner in (None, lora(target_modules="all-linear", r=2, fan_in_fan_out=architecture == "gpt2")):
        adapter = SinkhornResidual(inner=inner, mixing=kind, rank=2)
        model = adapter.attach(backbone.load()).eval()
        assert torch.equal(logits(model), reference)
        tuned = logits(disturb(model))
        assert not torch.equal(tuned, reference)
        with adapter.reference(model):
            assert torch.equal(logits(model), reference)
        assert torch.equal(logits(model), tuned)
        assert adapter.attach(model) is model


@pytest.mark.parametrize("kind", KINDS)
def test_where_gradients_arrive(kind: Mixing, llama: Path) -> None:
    """(h): the gate has a gradient while it is zero, the structure as soon as it is not."""
    model = SinkhornResidual(mixing=kind, rank=2).attach(CausalLM(path=str(llama)).load())
    for opened in (False, True):
        for mixer in mixers(model):
            mixer.gate.data.fill_(0.3 if opened else 0.0)
        model.zero_grad()
        model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
        for mixer in mixers(model):
            assert float(mixer.gate.grad.abs()) > 0
            for structure in (mixer.logits, mixer.read, mixer.write):
                assert (float(structure.grad.abs().max()) > 0) is opened


def test_learning_rates_decay_and_what_is_frozen(llama: Path) -> None:
    backbone = CausalLM(path=str(llama))

    def factory(groups: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, lr=0.01, weight_decay=0.1)

    for inner, first in ((lora(r=2, target_modules="all-linear"), [(0.01, 0.1)]), (None, [])):
        adapter = SinkhornResidual(inner=inner, rank=2, structural_lr_ratio=0.2, gate_lr_ratio=3.0)
        model = adapter.attach(backbone.load())
        optimizer = adapter.optimizer(model, factory)
        assert [(g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [*first, (0.002, 0.0), (0.03, 0.0)]
        stepped = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(stepped) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    fixed = SinkhornResidual(rank=2, train_projections=False)
    names = {*fixed.trainable(fixed.attach(backbone.load()))}
    assert {name.rpartition(".")[2] for name in names} == {"logits", "gate", "log_alpha"}


def test_the_gate_stays_between_zero_and_one(llama: Path, tmp_path: Path) -> None:
    adapter = SinkhornResidual(mixing="sinkhorn", rank=2, gate_lr_ratio=300.0)
    _, module = train(tmp_path / "run", llama, adapter, kinds=TWO)
    gates = torch.stack([mixer.gate for mixer in mixers(module.model)])
    assert bool(((gates >= 0) & (gates <= 1)).all())
    assert bool((gates == 1).any() | (gates == 0).any()), "without the clamp steps of 3 would have left the interval"
    numbers = adapter.metrics_to_log(module.model, module.stage)
    assert {"gate", "spectral_norm", "residual"} <= {*numbers}
    assert numbers["spectral_norm"] <= 1 + 1e-2


# -- arms -----------------------------------------------------------------------------------------------------------


def matrix(record: dict[str, Any]) -> list[list[float]]:
    return record["scores"]["nll"]["R"]  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def arms(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any], Any]]:
    """Frozen, modular, and modular whose structure does not move."""
    made: dict[str, Adapter] = {
        "frozen": fresh_lora(),
        "modular": SinkhornResidual(inner=fresh_lora(), rank=2, structural_lr_ratio=1.0, gate_lr_ratio=10.0),
        "still": SinkhornResidual(inner=fresh_lora(), rank=2, structural_lr_ratio=0.0),
    }
    found = {}
    for name, adapter in made.items():
        folder = tmp_path_factory.mktemp(name) / "run"
        found[name] = (folder, *train(folder, llama, adapter, kinds=TWO, trainer={"gradient_clip_val": 0.01}))
    return found


def test_frozen_base_and_fresh_lora_do_not_drift(arms: dict[str, Any]) -> None:
    """(d), exactly; the mixing that goes on learning does."""
    frozen, modular = matrix(arms["frozen"][1]), matrix(arms["modular"][1])
    assert frozen[2][0] == frozen[1][0]
    assert modular[2][0] != modular[1][0]
    assert SinkhornResidual(inner=fresh_lora()).task_id_at_test
    assert not SinkhornResidual(inner=lora(r=2)).task_id_at_test


def test_a_structure_that_does_not_move_is_the_frozen_arm(arms: dict[str, Any]) -> None:
    """(e), bit for bit, with a clipper that looks at the norm of all gradients."""
    _, frozen, one = arms["frozen"]
    _, still, other = arms["still"]
    assert frozen["scores"] == still["scores"]
    states = one.adapter.state(one.model), other.adapter.state(other.model)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_drift_is_that_of_the_saved_adapter_under_the_final_mixing(arms: dict[str, Any], llama: Path) -> None:
    """(f): what stage 2 scores on domain a is adapter a, as stage 1 saved it, under the mixing of stage 2."""
    folder, record, module = arms["modular"]
    first, last = (load_tree(folder / "stages" / s / "state.safetensors")["weights"] for s in ("1-a", "2-b"))
    saved = {name: t for name, t in first.items() if ".domain1." in name}
    assert saved
    assert all(torch.equal(saved[name], last[name]) for name in saved), "the old adapter did not move"
    mixing = {name for name in first if "residency_mixing" in name}
    assert any(not torch.equal(first[name], last[name]) for name in mixing)
    with torch.no_grad():
        for name, p in module.model.named_parameters():
            if name in saved:
                p.zero_().add_(saved[name])
    from residency.domains.stream_data import StreamData

    data = StreamData(domains=domains(folder.parent / "data", TWO))
    again = means(evaluate(module, data, split="test", settings=EvaluationSettings(), columns=["a"]))
    assert again["nll"]["a"] == matrix(record)[2][0]


def test_shared_arm_averages_updates_and_mixing(llama: Path) -> None:
    adapter = SinkhornResidual(inner=lora(r=2, target_modules="all-linear"), rank=2)
    model = disturb(adapter.attach(CausalLM(path=str(llama)).load()))
    assert adapter.provides == {"fixed_coordinates", "averageable", "reference"}
    assert SinkhornResidual(inner=fresh_lora()).provides == {"reference"}
    before = logits(model)
    state = {name: t.clone() for name, t in adapter.state(model).items()}
    weights = adapter.weights(model, state)
    assert {*weights} == {name for name in state if "lora_B" not in name}
    adapter.load_weights(model, weights)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=1e-4)


# -- files and refusals ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [None, "lora"])
def test_files_of_our_own(inner: str | None, gpt2: Path, tmp_path: Path) -> None:
    part = None if inner is None else lora(r=2, target_modules="all-linear", fan_in_fan_out=True)
    adapter = SinkhornResidual(inner=part, mixing="sinkhorn", streams=3, rank=2, iterations=5)
    model = disturb(adapter.attach(CausalLM(path=str(gpt2)).load())).eval()
    adapter.export(model, tmp_path)
    again, loaded = attach_exported(AutoModelForCausalLM.from_pretrained(gpt2, dtype=torch.float32), tmp_path)
    torch.testing.assert_close(logits(loaded.eval()), logits(model), rtol=0, atol=1e-5)
    assert isinstance(again, SinkhornResidual)
    assert again.shape == adapter.shape


def test_what_cannot_work_is_refused(llama: Path, tmp_path: Path) -> None:
    base = CausalLM(path=str(llama)).load()
    with pytest.raises(UserError, match="exact mixing takes 2 to 5 streams"):
        SinkhornResidual(streams=6)
    with pytest.raises(UserError, match="streams x rank = 64, hidden size 32"):
        SinkhornResidual(rank=16).attach(base)
    with pytest.raises(UserError, match="GaLore steps inside the backward pass"):
        SinkhornResidual(inner=GaLore(layerwise=True))
    adapter = SinkhornResidual(inner=Full(), rank=2)
    with pytest.raises(UserError, match="export of SinkhornResidual around Full"):
        adapter.export(adapter.attach(base), tmp_path)
    narrow, wide = (SinkhornResidual(rank=r) for r in (2, 3))
    state = narrow.state(narrow.attach(CausalLM(path=str(llama)).load()))
    with pytest.raises(UserError, match="does not fit SinkhornResidual"):
        wide.load_state(wide.attach(CausalLM(path=str(llama)).load()), state)


def test_on_a_quantised_base(llama: Path) -> None:
    backbone = CausalLM(path=str(llama), quantisation=Quantisation())
    reference = logits(backbone.load())
    adapter = SinkhornResidual(inner=Peft(config=LoraConfig(r=2, target_modules="all-linear")), rank=2)
    model = adapter.attach(backbone.load()).eval()
    assert torch.equal(logits(model), reference)
    disturb(model)
    with adapter.reference(model):
        assert torch.equal(logits(model), reference)

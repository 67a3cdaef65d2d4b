"""Every property on every adapter, every mitigation, and every compatible pair."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Adapter
from residency.batching import make_batch
from residency.errors import UserError
from residency.mitigations import Mitigation
from residency.mitigations.base import HOOKS, overrides
from residency.storage import load_tree, save_tree
from residency.tensors import snapshot
from residency.types import Example
from running import make_module, train
from table import ADAPTERS, MITIGATIONS, OBJECTIVES, READERS

adapters = pytest.mark.parametrize("name", ADAPTERS)
pairs = pytest.mark.parametrize(("adapter", "mitigation"), [(a, m) for a in ADAPTERS for m in MITIGATIONS])

EXAMPLES = [
    Example(domain="x", row=str(i), prompt=tuple(range(5 + i, 9 + 2 * i)), completion=(40 + i, 50 + i, 0))
    for i in range(3)
]


def logits(module: Any) -> torch.Tensor:
    """Logits of fixed examples, in evaluation mode."""
    module.model.eval()
    with torch.inference_mode():
        return module.forward(make_batch(EXAMPLES, layout=module.layout)).clone()


def built(backbone: Path, name: str, mitigations: dict[str, Mitigation] | None = None, seed: int = 0) -> Any:
    module = make_module(backbone, ADAPTERS[name].make(), mitigations or {})
    module.build(seed=seed)
    return module


def everything(module: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, cloned."""
    return snapshot(dict(module.model.named_parameters()) | dict(module.model.named_buffers()))


# -- adapters -------------------------------------------------------------------------------------------------------


@adapters
def test_identity_at_the_start(name: str, llama: Path) -> None:
    plain = make_module(llama, ADAPTERS["full"].make(), {})
    plain.build(seed=0)
    module = built(llama, name)
    if ADAPTERS[name].identity == "exact":
        assert torch.equal(logits(module), logits(plain))
    else:
        torch.testing.assert_close(logits(module), logits(plain), rtol=0, atol=2e-4)


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
def test_exactly_the_declared_parameters_move(name: str, llama: Path, tmp_path: Path) -> None:
    module = built(llama, name)
    before, declared = everything(module), {*module.adapter.trainable(module.model)}
    _, trained = train(tmp_path / "run", llama, ADAPTERS[name].make(), steps=4)
    after = everything(trained)
    moved = {key for key in before if not torch.equal(before[key], after[key])}
    assert moved <= declared, "frozen tensors moved, weight decay included"
    unused = {key for key in declared - moved if before[key].abs().sum() > 0}
    assert not unused, "declared as trainable, and nothing moved them"
    assert declared == {key for key, p in trained.model.named_parameters() if p.requires_grad}


@adapters
def test_state_restores_a_fresh_model(name: str, llama: Path, tmp_path: Path) -> None:
    _, trained = train(tmp_path / "run", llama, ADAPTERS[name].make())
    save_tree(tmp_path / "state.safetensors", {"weights": trained.adapter.state(trained.model)})
    fresh = built(llama, name)
    fresh.adapter.load_state(fresh.model, load_tree(tmp_path / "state.safetensors")["weights"])
    assert torch.equal(logits(fresh), logits(trained))


@adapters
def test_a_foreign_state_is_refused(name: str, llama: Path) -> None:
    module = built(llama, name)
    state = dict(module.adapter.state(module.model))
    state.pop(next(iter(state)))
    with pytest.raises(UserError, match="does not fit"):
        module.adapter.load_state(module.model, state)


@adapters
def test_reference_is_the_pretrained_model(name: str, llama: Path, tmp_path: Path) -> None:
    plain = built(llama, "full")
    _, trained = train(tmp_path / "run", llama, ADAPTERS[name].make())
    if "reference" not in trained.adapter.provides:
        with pytest.raises(UserError, match="reference"):
            trained.adapter.reference(trained.model)
        return
    tuned = logits(trained)
    with trained.adapter.reference(trained.model):
        assert torch.equal(logits(trained), logits(plain))
    assert torch.equal(logits(trained), tuned), "leaving the context restores the adapter"
    assert not torch.equal(tuned, logits(plain))


@adapters
def test_weights_round_trip(name: str, llama: Path, tmp_path: Path) -> None:
    _, trained = train(tmp_path / "run", llama, ADAPTERS[name].make())
    adapter, model = trained.adapter, trained.model
    state = snapshot(adapter.state(model))
    if "averageable" not in adapter.provides:
        with pytest.raises(UserError, match="averageable"):
            adapter.weights(model, state)
        return
    before = logits(trained)
    adapter.load_weights(model, adapter.weights(model, state))
    torch.testing.assert_close(logits(trained), before, rtol=0, atol=max(1e-4, ADAPTERS[name].average))


@adapters
def test_export_loads_with_the_plain_library(name: str, llama: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    _, trained = train(tmp_path / "run", llama, ADAPTERS[name].make())
    trained.adapter.export(trained.model, tmp_path / "export")
    if ADAPTERS[name].loads_with == "transformers":
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "export", dtype=torch.float32)
    elif ADAPTERS[name].loads_with == "residency":
        from residency.adapters.own_format import attach_exported

        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        plain: Any = attach_exported(base, tmp_path / "export")[1]
    else:
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(llama, dtype=torch.float32)
        plain = PeftModel.from_pretrained(base, tmp_path / "export")
    plain.eval()
    batch = make_batch(EXAMPLES, layout="padded")
    with torch.inference_mode():
        out = plain(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    width = batch.input_ids.shape[1]
    torch.testing.assert_close(
        out[batch.target_at // width, batch.target_at % width], logits(trained), rtol=0, atol=2e-4
    )


# -- pairs ----------------------------------------------------------------------------------------------------------


@pairs
def test_pair_trains_or_is_refused_with_a_sentence(adapter: str, mitigation: str, llama: Path, tmp_path: Path) -> None:
    make = ADAPTERS[adapter].make
    missing = MITIGATIONS[mitigation].make().requires - make().provides
    if missing:
        with pytest.raises(UserError, match=f"needs {sorted(missing)[0]}.*\n.*use "):
            make_module(llama, make(), {mitigation: MITIGATIONS[mitigation].make()})
        return
    record, module = train(tmp_path / "run", llama, make(), {mitigation: MITIGATIONS[mitigation].make()})
    plain, _ = train(tmp_path / "plain", llama, make())
    assert record["scores"]["nll"]["R"][:2] == plain["scores"]["nll"]["R"][:2], "the first stage is shared"
    assert record["scores"]["nll"]["R"] != plain["scores"]["nll"]["R"], "the mitigation did nothing"
    assert all(torch.isfinite(p).all() for p in module.model.parameters())


@pairs
def test_strength_zero_is_off(adapter: str, mitigation: str, llama: Path, tmp_path: Path) -> None:
    make, off = ADAPTERS[adapter].make, MITIGATIONS[mitigation].off
    if off().requires - make().provides:
        pytest.skip("refused at construction, which another test shows")
    with_it, module = train(tmp_path / "off", llama, make(), {mitigation: off()})
    without, plain = train(tmp_path / "plain", llama, make())
    assert with_it["scores"] == without["scores"]
    states = module.adapter.state(module.model), plain.adapter.state(plain.model)
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


@pytest.mark.parametrize("name", MITIGATIONS)
def test_mitigation_declares_everything(name: str) -> None:
    mitigation = MITIGATIONS[name].make()
    assert isinstance(mitigation.first_domain, int)
    assert mitigation.instead
    assert any(overrides(mitigation, hook) for hook in HOOKS)
    restored = MITIGATIONS[name].make()
    restored.load_state_dict(copy.deepcopy(mitigation.state_dict()))
    with pytest.raises(KeyError, match="declared"):
        restored.load_state_dict({"unheard_of": torch.zeros(1)})


# -- seeds, evaluation, objectives, readers -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora_dropout", "full"])
def test_seed_decides_everything(name: str, llama_dropout: Path, tmp_path: Path) -> None:
    make: Any = ADAPTERS[name].make
    records = [
        train(tmp_path / str(i), llama_dropout, make(), seed=seed)[0]["scores"]["nll"]["R"]
        for i, seed in enumerate((0, 0, 1))
    ]
    assert records[0] == records[1]
    assert records[0][1:] != records[2][1:]


@adapters
def test_evaluation_changes_nothing(name: str, llama: Path, tmp_path: Path) -> None:
    from residency.data import StreamData
    from residency.evaluation import EvaluationSettings, evaluate
    from running import domains

    module = built(llama, name)
    data = StreamData(domains=domains(tmp_path))
    module.model.train()
    before, random = everything(module), torch.get_rng_state()
    evaluate(module, data, split="test", settings=EvaluationSettings())
    after = everything(module)
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(random, torch.get_rng_state())
    assert module.model.training


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objective_ignores_the_layout(name: str, llama: Path) -> None:
    module = built(llama, "lora")
    objective = OBJECTIVES[name]()
    losses = [
        objective(module.forward, objective.collate(EXAMPLES, layout=layout), None).loss
        for layout in ("packed", "padded")
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)


def test_every_plug_in_has_a_row() -> None:
    """A class without a row would be tested by nothing."""
    from residency import adapters as adapter_classes
    from residency import mitigations, objectives
    from residency.domains import packaged

    rows: list[Adapter | Mitigation] = [row.make() for row in MITIGATIONS.values()]
    assert {type(row).__name__ for row in rows} == {*mitigations.__all__} - {"Mitigation"}
    assert {type(row.make()).__name__ for row in ADAPTERS.values()} == {*adapter_classes.__all__} - {"Adapter"}
    assert {make().__class__.__name__ for make in OBJECTIVES.values()} == {*objectives.__all__} - {"Objective"}
    assert {reader.__name__ for reader in READERS.values()} == {"Jsonl", *packaged.__all__}

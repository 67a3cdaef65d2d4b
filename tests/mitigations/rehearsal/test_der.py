"""Dark experience replay: distances that vanish where nothing has changed, and what it is without them."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.adapters.peft import lora
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, save_tree
from residency.core.types import Example, GlobalBatch, Outputs, Stage
from residency.mitigations import DER
from residency.mitigations.rehearsal.der import stored_kl, stored_mse, top_log_probs
from residency.testing.tiny_runs import make_module, train


def make_examples(domain: str, rows: int) -> list[Example]:
    return [
        Example.of(domain=domain, row=str(i), prompt=(7 * i + 3, 1), completion=(i + 5, *range(i % 3), 0))
        for i in range(rows)
    ]


def make_stage(index: int = 1, domain: str = "new") -> Stage:
    return Stage(index=index, domain=domain, stages=3, seed=0, steps=4, batch_size=4)


@pytest.fixture
def module(llama: Path) -> Any:
    built = make_module(llama, lora(target_modules=["q_proj", "v_proj"], r=2), {})
    built.build(seed=0)
    built.stage = make_stage()
    return built


def after_a_domain(module: Any, **options: Any) -> DER:
    der = DER(**options)
    module.dataset = make_examples("old", 9)
    der.on_domain_end(module, make_stage(0, "old"))
    return der


def shaken(module: Any) -> Any:
    """The module with other weights."""
    torch.manual_seed(1)
    for leaf in module.adapter.trainable(module.model).values():
        torch.nn.init.normal_(leaf, std=0.3)
    return module


def terms(der: DER, module: Any) -> dict[str, torch.Tensor]:
    batch = make_batch(make_examples("new", 4), layout=module.layout)
    return dict(der.loss_terms(module, batch, Outputs(loss=torch.zeros(()), logits=None, log={})))


# --- the distances ----------------------------------------------------------------------------------------------------


def test_what_is_stored_are_the_largest_log_probabilities() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.6, 0.3], [0.5, 0.2, 0.3]])) + 7.0
    values, tokens = top_log_probs(logits, 2)
    torch.testing.assert_close(values.exp(), torch.tensor([[0.6, 0.3], [0.5, 0.3]]))
    assert tokens.tolist() == [[1, 2], [0, 2]]
    assert top_log_probs(logits, 50)[0].shape == (2, 3)


@pytest.mark.parametrize("distance", [stored_mse, stored_kl])
@settings(deadline=None, database=None, max_examples=60)
@given(seed=st.integers(0, 1000), k=st.integers(1, 9), shift=st.floats(-5, 5))
def test_a_distance_is_zero_at_itself_and_does_not_see_a_shift(distance: Any, seed: int, k: int, shift: float) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits, other = torch.randn(4, 9, generator=draw), torch.randn(4, 9, generator=draw)
    stored = top_log_probs(logits, k)
    assert abs(float(distance(logits, *stored))) < 1e-6
    assert float(distance(other, *stored)) > 0
    torch.testing.assert_close(distance(other + shift, *stored), distance(other, *stored), rtol=1e-3, atol=1e-5)


def test_distances_in_closed_form() -> None:
    """MSE of two known rows; KL with all tokens against torch, and with a bucket against the bucketed distributions."""
    old, new = torch.tensor([[0.5, 0.3, 0.2]]).log(), torch.tensor([[0.2, 0.3, 0.5]]).log()
    wanted = (math.log(0.5 / 0.2) ** 2 + 0.0) / 2
    assert math.isclose(float(stored_mse(new, *top_log_probs(old, 2))), wanted, rel_tol=1e-5)
    full = torch.nn.functional.kl_div(new, old, log_target=True, reduction="sum")
    torch.testing.assert_close(stored_kl(new, *top_log_probs(old, 3)), full, rtol=1e-4, atol=1e-5)
    bucketed = 0.5 * math.log(0.5 / 0.2) + 0.5 * math.log(0.5 / 0.8)
    assert math.isclose(float(stored_kl(new, *top_log_probs(old, 1))), bucketed, rel_tol=1e-5)


# --- the terms --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("distance", ["mse", "kl"])
def test_a_model_that_has_not_changed_pays_nothing(distance: Any, module: Any) -> None:
    der = after_a_domain(shaken(module), alpha=0.5, beta=0.0, top_k=8, distance=distance)
    module.model.eval()
    found = terms(der, module)
    assert {*found} == {"stored"}
    assert abs(found["stored"].item()) < 1e-9
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf.mul_(1.5)
    assert terms(der, module)["stored"].item() > 1e-6


def test_the_stored_term_is_the_distance_of_a_draw(module: Any) -> None:
    """All nine examples drawn: α times the distance over their tokens, as if nothing had been packed or drawn."""
    der = after_a_domain(module, alpha=0.5, beta=0.0, top_k=4, draws=50)
    whole = make_batch(make_examples("old", 9), layout=module.layout)
    stored = top_log_probs(module.forward(whole).detach(), 4)
    now = shaken(module).forward(whole)
    torch.testing.assert_close(terms(der, module)["stored"], 0.5 * stored_mse(now, *stored), rtol=1e-4, atol=1e-6)


def test_without_alpha_it_is_experience_replay(module: Any) -> None:
    """DER++ at α = 0: β times the objective's own loss on a draw from the reservoir, and nothing else."""
    der = after_a_domain(module, alpha=0.0, beta=0.7, draws=50)
    found = terms(der, module)
    loss = module.objective(module.forward, make_batch(make_examples("old", 9), layout=module.layout), None).loss
    assert {*found} == {"replay"}
    torch.testing.assert_close(found["replay"], 0.7 * loss, rtol=1e-5, atol=1e-6)
    leaves = list(module.adapter.trainable(module.model).values())
    ours, wanted = (torch.autograd.grad(x, leaves) for x in (found["replay"], 0.7 * loss))
    for gradient, expected in zip(ours, wanted, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_the_two_terms_are_on_two_draws(module: Any) -> None:
    der = after_a_domain(module, draws=3)
    batch = make_batch(make_examples("new", 4), layout=module.layout)
    draws = {
        purpose: [e.row for e, _ in der._own(module, batch, der.items(), purpose)[0]]
        for purpose in ("stored", "replay")
    }
    assert draws["stored"] != draws["replay"]
    assert [e.row for e, _ in der._own(module, batch, der.items(), "stored")[0]] == draws["stored"]


def test_the_parts_of_a_step_share_one_draw(module: Any) -> None:
    der = after_a_domain(module, draws=3)
    examples = tuple(make_examples("new", 4))
    whole = [e.row for e, _ in der._own(module, make_batch(examples, layout=module.layout), der.items(), "stored")[0]]
    found = []
    for slots in ((0, 1), (2, 3)):
        part = make_batch([examples[i] for i in slots], layout=module.layout)
        part = replace(part, part_of=GlobalBatch(examples=examples, slots=slots, parts=2))
        found += [e.row for e, _ in der._own(module, part, der.items(), "stored")[0]]
    assert found == whole


def test_off_is_nothing(module: Any) -> None:
    der = after_a_domain(module, alpha=0.0, beta=0.0)
    assert terms(der, module) == {}
    assert not der.touches_training(1)
    assert DER().touches_training(1)
    assert not DER().touches_training(0)
    assert terms(DER(), module) == {}, "nothing to replay yet"


# --- the reservoir ----------------------------------------------------------------------------------------------------


def test_what_was_said_stays_with_its_example(module: Any, tmp_path: Path) -> None:
    """Two domains through a small reservoir, a file in between, other weights for the second: each example has what the
    model of its own domain said."""
    said = {}
    der = DER(capacity=5, top_k=3)
    for index, name in enumerate(("a", "b")):
        if index:
            shaken(module)
        module.model.eval()
        for e in make_examples(name, 8):
            said[e] = top_log_probs(module.forward(make_batch([e], layout=module.layout)).detach(), 3)
        module.dataset = make_examples(name, 8)
        der.on_domain_end(module, make_stage(index, name))
        save_tree(tmp_path / "state.safetensors", der.state_dict())
        der = DER(capacity=5, top_k=3)
        der.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    items = der.items()
    assert len(items) == 5
    assert {e.domain for e, _ in items} == {"a", "b"}
    for example, read in items:
        assert read is not None
        torch.testing.assert_close(read[0], said[example][0], rtol=1e-4, atol=1e-4)
        assert torch.equal(read[1], said[example][1])
    assert der.metrics_to_log(module) == {"examples": 5, "bytes": der.state_bytes()}


def test_terms_are_logged_and_change_the_stage(llama: Path, tmp_path: Path) -> None:
    import json

    kinds = {"a": "generative", "b": "label"}
    adapter = {"target_modules": ["q_proj"], "r": 2}
    trainer = {"log_every_n_steps": 1}
    train(tmp_path / "run", llama, lora(**adapter), {"der": DER(capacity=6, top_k=4)}, kinds=kinds, trainer=trainer)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    first, second = ([line for line in lines if line["stage"] == k] for k in (1, 2))
    assert not any("loss/der/stored" in line for line in first)
    for line in second:
        total = line["loss/task"] + line["loss/der/stored"] + line["loss/der/replay"]
        assert math.isclose(line["loss"], total, rel_tol=1e-5)
        assert line["der/examples"] == 6
    assert second[-1]["loss/der/stored"] > second[0]["loss/der/stored"] >= 0


@pytest.mark.parametrize(
    "options", [{"alpha": -0.1}, {"beta": math.nan}, {"capacity": 0}, {"top_k": 0}, {"draws": 0}], ids=str
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        DER(**options)

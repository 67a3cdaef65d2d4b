"""What every adapter keeps: identity, seeds, declared parameters, states, exports, and what it promises to provide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from residency.adapters import Adapter
from residency.adapters.export_format import attach_exported
from residency.adapters.peft_tools.wrapping import expected_remarks
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.losses import token_nll
from residency.core.signals import Stopped
from residency.core.tensor_files import load_tree
from residency.core.types import Batch, Stage
from residency.domains.stream_data import StreamData
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.settings import EvaluationSettings
from residency.runs.export.hub_base import name_base
from residency.testing.cases import Case, made
from residency.testing.comparisons import differing
from residency.testing.hub_cache import offline_hub
from residency.testing.rows import AdapterRow
from residency.testing.shared_runs import EXAMPLES, everything, logits, plain_logits
from residency.testing.tiny_runs import domains, make_module

__all__ = ["PROPERTIES"]

AdapterCase = Case[AdapterRow]


def identity_at_the_start(case: AdapterCase) -> None:
    """The attached model is the pretrained one, as far as the row says."""
    made(case.row.make, Adapter, case.name)
    module = case.runs.built(case.name)
    module.layout = "padded"
    pretrained = case.runs.pretrained(case.name, "padded")
    if case.row.identity == "exact":
        assert torch.equal(logits(module), pretrained), "attaching changed logits: is it identity='close'?"
    elif case.row.identity == "close":
        torch.testing.assert_close(logits(module), pretrained, rtol=0, atol=1e-6)
    else:
        same = torch.allclose(logits(module), pretrained, rtol=0, atol=1e-6)
        assert not same, "the attached model equals the pretrained one: is it identity='exact'?"
        assert "reference" in module.adapter.provides, "row 0 could not be scored: it must provide 'reference'"


def lanes_change_rounding_only(case: AdapterCase) -> None:
    """Whether or not an adapter may be computed in parts, asking for parts changes no value and no gradient."""
    module, leaves, batch = _begun(case)
    found = []
    for lanes in (1, 3):
        module.backbone.lanes = lanes
        torch.manual_seed(0)
        out = module.forward(batch)
        gradients = torch.autograd.grad(out.logsumexp(-1).sum(), leaves, allow_unused=True)
        found.append([out.detach(), *(g if g is not None else torch.zeros(0) for g in gradients)])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)


def a_loss_without_logits_is_the_same(case: AdapterCase) -> None:
    """Whether or not the head is left out, and in lanes or not."""
    module, leaves, batch = _begun(case)
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
            apart = float((one - two).norm())
            assert apart <= 2e-4 * float(one.norm()) + 1e-6, "leaving the head out changes the loss or its gradient"


def attach_is_idempotent_and_seeded(case: AdapterCase) -> None:
    """To attach twice is to attach once; the start follows from the seed."""
    module, same, other = (case.runs.built(case.name, seed=seed) for seed in (0, 0, 1))
    assert module.adapter.attach(module.model) is module.model, "attaching again must return the attached model"
    first = module.adapter.state(module.model)
    assert not differing(first, same.adapter.state(same.model)), "one seed gave two starts"
    if case.row.seeded:
        assert differing(first, other.adapter.state(other.model)), "the seed must reach the adapter"


def exactly_the_declared_parameters_move(case: AdapterCase) -> None:
    """`trainable` is what requires a gradient and what training moves."""
    stages = case.runs.plain(case.name).stages
    assert len(stages) == (3 if not case.runs.stream(case.name) else 2)
    for moves in stages:
        assert moves.moved <= moves.declared, f"frozen tensors moved: {sorted(moves.moved - moves.declared)[:3]}"
        assert moves.declared == moves.grad, "what is declared as trainable is not what requires a gradient"
        unused = {key for key in moves.still if not any(part in key for part in case.row.still)}
        assert not unused, f"declared as trainable, and nothing moved them: {sorted(unused)[:3]}"


def state_restores_a_fresh_model(case: AdapterCase) -> None:
    """`load_state(state)` gives the same function, bit for bit."""
    trained = case.runs.plain(case.name)
    fresh = case.runs.built(case.name)
    fresh.adapter.load_state(fresh.model, trained.state)
    assert torch.equal(logits(fresh), logits(trained.module)), "what `state` returns is not all that was learnt"


def a_foreign_state_is_refused(case: AdapterCase) -> None:
    """A tensor is missing."""
    module, state = case.runs.built(case.name), case.runs.plain(case.name).state
    state.pop(next(iter(state)))
    with pytest.raises(UserError, match="does not fit"):
        module.adapter.load_state(module.model, state)


class _Stop(Callback):
    def on_train_batch_end(self, trainer: Trainer, module: Any, *args: Any) -> None:
        if (module.stage.index, trainer.global_step) == (1, 3):
            raise Stopped("SIGKILL")


def a_stopped_run_goes_on_bit_for_bit(case: AdapterCase) -> None:
    """Stopped inside of the second stage and continued: scores and weights of the whole run."""
    folder, stream = case.folder / "run", case.runs.stream(case.name)
    with pytest.raises(Stopped):
        case.runs.run(case.name, folder, callbacks=[_Stop()], **stream)
    assert list((folder / "stages").glob("2-*/checkpoint.safetensors")), "nothing to go on from"
    record, _ = case.runs.run(case.name, folder, **stream)
    whole = case.runs.plain(case.name)
    assert record["scores"] == whole.record["scores"]
    last = max((folder / "stages").glob("*/state.safetensors"))
    assert last.parent.name == ("2-b" if stream else "3-c")
    found = differing(load_tree(last)["weights"], whole.state)
    assert not found, f"{found[0]} differs from the uninterrupted run"


def reference_is_the_pretrained_model(case: AdapterCase) -> None:
    """`reference` switches everything that was learnt off and on again; or it says that it cannot."""
    trained = case.runs.plain(case.name).module
    if "reference" not in trained.adapter.provides:
        with pytest.raises(UserError, match="reference"):
            trained.adapter.reference(trained.model)
        return
    tuned = logits(trained)
    with trained.adapter.reference(trained.model):
        off = logits(trained)
    base = case.runs.pretrained(case.name, trained.layout)
    assert torch.equal(off, base), "inside of `reference` the model is not the pretrained one"
    assert torch.equal(logits(trained), tuned), "leaving the context restores the adapter"
    assert not torch.equal(tuned, off), "nothing was learnt"


def weights_round_trip(case: AdapterCase) -> None:
    """`load_weights(weights(state))` is the same function; or it says that it cannot be averaged."""
    module, state = case.runs.built(case.name), case.runs.plain(case.name).state
    adapter, model = module.adapter, module.model
    adapter.load_state(model, state)
    if "averageable" not in adapter.provides:
        with pytest.raises(UserError, match="averageable"):
            adapter.weights(model, state)
        return
    before = logits(module)
    adapter.load_weights(model, adapter.weights(model, state))
    torch.testing.assert_close(logits(module), before, rtol=0, atol=max(1e-4, case.row.average))


def export_loads_with_the_plain_library(case: AdapterCase) -> None:
    """What is exported is read by the library that the row names and is the same function."""
    trained, folder = case.runs.plain(case.name).module, case.folder / "export"
    if "exportable" not in trained.adapter.provides and case.row.loads_with != "residency":
        with pytest.raises(UserError, match="exportable"):
            trained.adapter.export(trained.model, folder)
        return
    trained.adapter.export(trained.model, folder)
    torch.testing.assert_close(plain_logits(_exported(case, folder)), logits(trained), rtol=0, atol=2e-4)


def merging_keeps_the_function(case: AdapterCase) -> None:
    """A merged model has the backbone's parameters and the adapter's function; or it says that it cannot."""
    module = case.runs.built(case.name)
    module.adapter.load_state(module.model, case.runs.plain(case.name).state)
    if "mergeable" not in module.adapter.provides:
        with pytest.raises(UserError, match="mergeable"):
            module.adapter.merge(module.model)
        return
    before = logits(module)
    merged = module.adapter.merge(module.model)
    pristine = {key for key, _ in module.backbone.load().named_parameters()}
    assert {key for key, _ in merged.named_parameters()} == pristine, "a merged model has the backbone's own weights"
    torch.testing.assert_close(plain_logits(merged), before, rtol=0, atol=case.row.merge)


def a_copied_model_trains_as_a_fresh_one(case: AdapterCase) -> None:
    """Pairs train copies of a model that was attached once."""
    pairs, name = case.runs.pairs, case.name
    if not case.row.repeats:
        # It decomposes anew in every stage, which differs in its last bits from call to call; training magnifies them.
        modules = pairs.module(name, {}, fresh=True), pairs.module(name, {})
        starts = [dict(m.adapter.weights(m.model, m.adapter.state(m.model))) for m in modules]
        torch.testing.assert_close(*starts, rtol=1e-4, atol=1e-5)
        return
    fresh, copied = pairs.train(name, pairs.module(name, {}, fresh=True)), pairs.plain(name)
    found = differing(fresh.final, copied.final)
    assert not found, f"{found[0]} differs between a copied and a fresh model"


def evaluation_changes_nothing(case: AdapterCase) -> None:
    """Neither the model nor a random generator."""
    module = case.runs.built(case.name)
    module.adapter.load_state(module.model, case.runs.plain(case.name).state)
    data = StreamData(domains=domains(case.folder))
    module.model.train()
    before, random = everything(module), torch.get_rng_state()
    evaluate(module, data, split="test", settings=EvaluationSettings())
    found = differing(before, everything(module))
    assert not found, f"scoring changed {found[0]}"
    assert torch.equal(random, torch.get_rng_state()), "scoring drew from the global generator"
    assert module.model.training, "scoring left the model in evaluation mode"


PROPERTIES = (
    identity_at_the_start,
    lanes_change_rounding_only,
    a_loss_without_logits_is_the_same,
    attach_is_idempotent_and_seeded,
    exactly_the_declared_parameters_move,
    state_restores_a_fresh_model,
    a_foreign_state_is_refused,
    a_stopped_run_goes_on_bit_for_bit,
    reference_is_the_pretrained_model,
    weights_round_trip,
    export_loads_with_the_plain_library,
    merging_keeps_the_function,
    evaluation_changes_nothing,
    a_copied_model_trains_as_a_fresh_one,
)


def _begun(case: AdapterCase) -> tuple[Any, list[Tensor], Batch]:
    """A module in its first stage, its trainable parameters, and a batch."""
    module = case.runs.built(case.name)
    module.begin_stage(Stage(index=0, domain="d0", stages=3, seed=0, steps=4, batch_size=4), EXAMPLES)
    module.model.train()
    leaves: list[Tensor] = [*module.adapter.trainable(module.model).values()]
    return module, leaves, make_batch(EXAMPLES, layout=module.layout)


def _exported(case: AdapterCase, folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    if case.row.loads_with == "transformers":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if case.row.loads_with == "residency":
        base = AutoModelForCausalLM.from_pretrained(case.runs.backbone, dtype=torch.float32)
        return attach_exported(base, folder)[1]
    from peft import AutoPeftModelForCausalLM, PeftModel

    with offline_hub(case.runs.backbone, case.folder / "hub") as hub, expected_remarks():
        name_base(folder, hub)
        if "quantisation" in case.row.loading:
            # On some CPUs bitsandbytes repacks 4-bit weights when a model is evaluated, and not of so few rows.
            backbone = make_module(case.runs.backbone, case.row.make(), {}, loading=case.row.loading).backbone
            return PeftModel.from_pretrained(backbone.load(), folder)
        # Found by the id that the export names, as on any other machine.
        return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

"""Closed forms, limits and refusals of single objectives; what every one keeps is in `residency.testing`."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Branch, Example
from residency.objectives import Objective
from residency.objectives.kto import KTO
from residency.objectives.pair_losses import REFERENCE_FREE
from residency.objectives.preference import Preference
from residency.objectives.row_weighted import FLOW, STM
from residency.objectives.sft import SFT
from residency.objectives.token_weighted import ASFT, DFT, EAFT, TALR
from residency.testing import objective_properties as properties
from residency.testing.objective_rows import examples_of
from table import OBJECTIVES

COMPLETIONS, PAIRS, UNPAIRED = (examples_of(kind)[:4] for kind in ("completion", "pair", "unpaired"))
ANSWERS = [example.completion for example in COMPLETIONS]
TURNS = [
    replace(
        COMPLETIONS[0], branches=(Branch(tokens=(7, 8, 9, 10, 11, 0), mask=(True, False, True, False, True, True)),)
    )
]


def learner(backbone: Path, name: str, **options: Any) -> Any:
    """A module of LoRA at the start of a stage."""
    return properties.learner(backbone, OBJECTIVES[name].make, **options)


AT_START = {
    "preference_sigmoid": math.log(2),
    "preference_cdpo": math.log(2),
    "preference_robust": math.log(2),
    "preference_hinge": 1.0,
    "preference_ipo": 25.0,
    "kto": 0.525,
}


@pytest.mark.parametrize("name", AT_START)
def test_dropout_is_off_and_the_start_is_the_reference(name: str, llama_dropout: Path) -> None:
    module = learner(llama_dropout, name, dropout=0.5, moved=False)
    (batch,) = properties.batches(module, 4)
    batch = module.objective.prepare(module, batch)
    found = module.objective(module.trained_forward, batch, module.reference_forward)
    assert float(found.loss.detach()) == pytest.approx(AT_START[name], abs=1e-5)
    if name != "kto":
        assert float(found.log["rewards/accuracies"]) == pytest.approx(0.5, abs=0.5)
        assert float(found.log["rewards/margins"]) == pytest.approx(0.0, abs=1e-5)


def test_the_gradient_of_dpo_at_the_start(llama: Path) -> None:
    """-β/2 (∇ℓ_chosen - ∇ℓ_rejected), the mean over pairs."""
    module = learner(llama, "preference_sigmoid", moved=False)
    _, gradient = properties.step(module)
    leaves = module.adapter.trainable(module.model)

    def slope(branch: int) -> Tensor:
        alone = [replace(e, branches=(e.branches[branch],)) for e in PAIRS]
        total = -module.backbone.nll(module.model, make_batch(alone, layout="padded")).sum()
        found = torch.autograd.grad(total, [leaves[name] for name in sorted(leaves)])
        return torch.cat([g.flatten() for g in found])

    expected = -0.05 * (slope(0) - slope(1)) / 4
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


def test_asft_is_dft_and_self_distillation(llama: Path) -> None:
    from residency.mitigations.distillation.divergences import distillation_loss

    module = learner(llama, "asft")
    (batch,) = properties.batches(module, 4)
    together = ASFT(strength=0.3)(module.forward, batch, module.reference_forward).loss
    logits = module.forward(batch)
    kept = distillation_loss(logits, module.reference_forward(batch), temperature=1.0)
    torch.testing.assert_close(together, DFT()(module.forward, batch, None).loss + 0.3 * kept)


@pytest.mark.parametrize(
    "make",
    [
        partial(EAFT, alpha=0.0),
        partial(TALR, tau=math.inf),
        partial(FLOW, tau=math.inf),
        partial(STM, threshold=math.inf),
    ],
)
def test_limits_are_plain_supervision(make: Callable[[], Objective], llama: Path) -> None:
    module = learner(llama, "sft")
    plain, gradient = properties.step(module)
    module.objective = make()
    module.dataset = module.objective.begin_stage(module, [*COMPLETIONS[1:], *TURNS], module.stage)
    loss, its = properties.step(module)
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(its, gradient)


def test_full_text_learns_every_token_but_the_first(llama: Path) -> None:
    module = learner(llama, "full_text")
    loss, _ = properties.step(module)
    count, total = 0, torch.zeros(())
    for e in (module.dataset[i] for i in range(4)):
        ids = torch.tensor([[*e.prompt, *e.completion]])
        logits = module.model(input_ids=ids).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += ids.numel() - 1
    torch.testing.assert_close(loss, (total / count).detach(), rtol=1e-5, atol=1e-6)


def test_masked_tokens_have_no_gradient(llama: Path) -> None:
    module = learner(llama, "sft")
    with_mask, without = TURNS[0], COMPLETIONS[0]
    batch = make_batch([with_mask], layout="packed")
    assert len(batch.targets) == 4 != len(with_mask.completion)
    assert module.objective.units(with_mask) == 4
    assert module.objective.units(without) == len(ANSWERS[0])


def test_stm_replaces_rows_without_a_token_left(llama: Path) -> None:
    module = learner(llama, "sft", moved=False)
    batch = make_batch(COMPLETIONS, layout="packed")
    with torch.no_grad():
        nll = module.backbone.nll(module.model, batch)
    best = [float(nll[batch.target_example == i].min()) for i in range(4)]
    threshold = math.exp(sorted(best)[1] + 1e-4)  # two rows keep a token
    data = STM(threshold=threshold).begin_stage(module, COMPLETIONS, module.stage)
    kept = {data[i].row for i in range(4)}
    assert kept == {str(i) for i in range(4) if math.exp(best[i]) <= threshold}
    assert all(any(data[i].branches[0].mask) or not data[i].branches[0].mask for i in range(4))
    with pytest.raises(UserError, match="no token"):
        STM(threshold=1.0001).begin_stage(module, COMPLETIONS, module.stage)


def test_the_reference_is_asked_once_and_stays(llama: Path) -> None:
    """Whatever the policy does, the values on the rows are those of the start; each row keeps its own."""
    module = learner(llama, "preference_sigmoid", moved=False)
    own = [branch.reference for i in range(4) for branch in module.dataset[i].branches]
    alone = [make_batch([replace(e, branches=(b,))], layout="padded") for e in PAIRS for b in e.branches]
    with torch.no_grad():
        fresh = [-float(module.backbone.nll(module.model, one).sum()) for one in alone]
    assert own == pytest.approx(fresh, abs=1e-4)
    properties.shift(module, 5)
    again = module.objective.begin_stage(module, module.dataset, module.stage)
    assert [branch.reference for i in range(4) for branch in again[i].branches] == own


def test_a_row_without_a_reference_is_refused(llama: Path) -> None:
    module = learner(llama, "preference_sigmoid")
    batch = module.objective.collate(PAIRS, layout=module.layout)
    with pytest.raises(UserError, match="without a reference"):
        module.objective(module.trained_forward, batch, module.reference_forward)
    module.objective = Preference(reference="pretrained")
    torch.testing.assert_close(
        module.objective(module.trained_forward, batch, module.reference_forward).loss,
        module.objective(
            module.trained_forward,
            module.objective.collate(
                [module.objective.begin_stage(module, PAIRS, module.stage)[i] for i in range(4)], layout=module.layout
            ),
            module.reference_forward,
        ).loss,
        rtol=1e-5,
        atol=1e-5,
    )


def test_kto_looks_at_the_rows_before(llama: Path) -> None:
    """Its baseline is the mean log-ratio of each prompt with the answer of the row before it, at least 0."""
    module = learner(llama, "kto")
    (batch,) = properties.batches(module, 4)
    module.objective.prepare(module, batch)
    mixed = [replace(COMPLETIONS[i], branches=(Branch(tokens=ANSWERS[i - 1]),)) for i in range(4)]
    laid_out = make_batch(mixed, layout="padded")
    ratios = []
    for when in ("now", "stage_start"):
        with module.as_it_was(when):
            ratios.append(-module.backbone.nll(module.model, laid_out).sum() / 4)
    expected = max(0.0, float(ratios[0] - ratios[1]))
    assert float(module.objective.state_dict()["baseline"]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (partial(SFT, label_smoothing=1.0), "label_smoothing"),
        (partial(ASFT, strength=-1.0), "strength"),
        (partial(EAFT, k=1), "k=1"),
        (partial(TALR, floor=2.0), "floor"),
        (partial(FLOW, tau=0.0), "tau"),
        (partial(STM, threshold=1.0), "threshold"),
        (partial(Preference, beta=0.0), "beta"),
        (partial(Preference, loss="aot"), "there is no such loss"),
        (partial(Preference, smoothing=0.1), "leave the smoothing out"),
        (partial(Preference, loss="robust", smoothing=0.5), "below"),
        *[(partial(Preference, loss=loss, reference="stage_start"), "no reference") for loss in sorted(REFERENCE_FREE)],
        (partial(KTO, beta=0.0), "beta"),
    ],
)
def test_arguments_that_make_no_sense(make: Callable[[], Objective], words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


@pytest.mark.parametrize(
    ("make", "examples", "words"),
    [
        (Preference, COMPLETIONS, "no pair"),
        (Preference, UNPAIRED, "no pair"),
        (
            Preference,
            [replace(e, branches=(e.branches[0], replace(e.branches[0], role="rejected"))) for e in PAIRS],
            "equal",
        ),
        (KTO, COMPLETIONS, "wanted or not"),
        (KTO, PAIRS, "wanted or not"),
    ],
)
def test_rows_of_another_kind_are_refused(
    make: Callable[[], Objective], examples: Sequence[Example], words: str, llama: Path
) -> None:
    module = learner(llama, "sft")
    with pytest.raises(UserError, match=words):
        make().begin_stage(module, examples, module.stage)

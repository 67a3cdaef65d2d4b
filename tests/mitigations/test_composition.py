"""Two mitigations at once keep what each of them promises, in either order, or are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from residency.adapters import Full
from residency.adapters.algebra.dual_gpm import Memory, project, without
from residency.core.errors import UserError
from residency.core.types import Branch, Example, Stage
from residency.mitigations import (
    AGEM,
    EMA,
    EWC,
    GEM,
    GPM,
    L2SP,
    MAS,
    OGD,
    SI,
    EarlyStopping,
    FisherMerge,
    GenerativeReplay,
    Mitigation,
    Replay,
    SourceShielding,
    WeightMixing,
)
from residency.mitigations.constraints.gradient_projection import inner, project_agem
from residency.mitigations.distillation.sdft import Rewritten
from residency.mitigations.rehearsal.memory import Mixture, Source, mixed_in, source_of
from residency.objectives.dataset import own_rows
from residency.testing.tiny_runs import make_module, train
from support.two_stages import ADAPTERS

# --- shares of a batch ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratios", "slots", "counts"),
    [((0.25, 0.25), 32, (16, 8, 8)), ((0.25, 0.125), 32, (20, 8, 4)), ((0.1, 0.1, 0.05), 100, (75, 10, 10, 5))],
)
def test_ratios_add(ratios: Sequence[float], slots: int, counts: tuple[int, ...]) -> None:
    found = [source_of(place, ratios) for place in range(slots)]
    assert (found.count(None), *(found.count(i) for i in range(len(ratios)))) == counts
    for i, ratio in enumerate(ratios):
        for end in range(slots + 1):
            assert abs(found[:end].count(i) - ratio * end) <= 1, "evenly spread"


def test_two_rehearsals_in_written_order() -> None:
    """Nobody's slot is taken by another: 0 1 0 2 0 1 0 2, and not 0 2 0 2."""
    assert [source_of(place, (0.25, 0.25)) for place in range(8)] == [None, 0, None, 1, None, 0, None, 1]


def _examples(domain: str, count: int) -> list[Example]:
    return [Example.of(domain=domain, row=str(i), prompt=(1,), completion=(2, 0)) for i in range(count)]


def test_a_mixture_has_draws_of_its_own_for_every_source() -> None:
    stage = Stage(index=1, domain="new", stages=2, seed=0, steps=16, batch_size=4)
    old = [f"old{i}" for i in range(2)]
    data: Any = _examples("new", 64)
    for name in old:
        data = mixed_in(data, Source(name=name, memory=_examples(name, 50), ratio=0.25), stage=stage)
    rows = {name: [e.row for e in data if e.domain == name] for name in ("new", *old)}
    assert {name: len(found) for name, found in rows.items()} == {"new": 32, "old0": 16, "old1": 16}
    assert rows["old0"] != rows["old1"], "one seed for both would draw the same numbers"
    alone = Mixture(current=_examples("new", 64), sources=data.sources[:1], stage=stage)
    assert [alone[i].domain for i in range(8)] == [*["new"] * 3, "old0"] * 2


def test_a_domain_as_a_whole_is_seen_through_a_mixture() -> None:
    """Labels, medians and balance of a stage do not hang on which places rehearsals take, nor on rewritten answers."""
    stage = Stage(index=1, domain="new", stages=2, seed=0, steps=2, batch_size=4)
    current = _examples("new", 8)
    other = replace(current[0], branches=(Branch(tokens=(3, 0)),))
    data: Any = Rewritten(current, lambda: {("new", "0"): other})
    for name in ("old0", "old1"):
        data = mixed_in(data, Source(name=name, memory=_examples(name, 5), ratio=0.25), stage=stage)
    assert sum(e.domain == "new" for e in data) == 4
    assert own_rows(data, "new") == [other, *current[1:]]
    assert own_rows(current, "new") == current


# --- the intersection of projections ----------------------------------------------------------------------------------


def _memory(*columns: Sequence[float], free: bool = False) -> Memory:
    basis, _ = torch.linalg.qr(torch.tensor(columns, dtype=torch.float64).T)
    if free:
        basis = torch.linalg.svd(basis, full_matrices=True)[0][:, basis.shape[1] :]
    return Memory(basis, free)


@pytest.mark.parametrize("free", [False, True])
@pytest.mark.parametrize(
    ("span", "step", "expected"),
    [([(1, 1, 0)], (1, 2, 3), (0, 0, 3)), ([(1, 1, 1, 1), (0, 1, 0, 1)], (1, 2, 3, 4), (0, -1, 0, 1))],
)
def test_a_projection_onto_the_intersection(span: Any, step: Any, expected: Any, free: bool) -> None:
    """Column 0 is frozen. One projection after the other gives (0, .5, 3) or (-1, 1, 3): neither holds both."""
    memory = _memory(*span, free=free)
    frozen = torch.zeros(len(step), dtype=torch.bool)
    frozen[0] = True
    masked = torch.tensor(step, dtype=torch.float64)[:, None] * ~frozen[:, None]
    for forbidden in (frozen, torch.eye(len(step), dtype=torch.float64)[:, :1]):
        found = project(masked, without(memory, [forbidden]))
        torch.testing.assert_close(found[:, 0], torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def _constrained(llama: Path, mitigations: dict[str, Mitigation]) -> tuple[Any, dict[str, Tensor], dict[str, Tensor]]:
    """A module in its second stage with a GPM memory and frozen columns; weights before and after one update."""
    module = make_module(llama, Full(), mitigations)
    module.build(seed=0)
    module.stage = Stage(index=1, domain="b", stages=3, seed=0, steps=1, batch_size=4)
    draw = torch.Generator().manual_seed(0)
    for mitigation in module.mitigations.values():
        if isinstance(mitigation, GPM):
            layers = [
                n.removesuffix(".weight") for n, p in module.adapter.trainable(module.model).items() if "proj" in n
            ]
            sizes = {layer: module.model.get_submodule(layer).in_features for layer in layers}
            basis = {layer: torch.linalg.qr(torch.randn(n, 5, generator=draw))[0] for layer, n in sizes.items()}
            mitigation.state["basis"] = basis
            mitigation.state["free"] = {layer: torch.tensor(False) for layer in basis}
        elif isinstance(mitigation, SourceShielding):
            modules = [(n, m.in_features) for n, m in module.model.named_modules() if "proj" in n]
            mitigation.state["frozen"] = {n: torch.rand(size, generator=draw) < 0.5 for n, size in modules}
    leaves = module.adapter.trainable(module.model)
    before = {name: leaf.detach().clone() for name, leaf in leaves.items()}
    after = {name: leaf + 0.01 * torch.randn(leaf.shape, generator=draw) for name, leaf in before.items()}
    return module, before, after


@pytest.mark.parametrize("order", [("gpm", "ssu"), ("ssu", "gpm")])
def test_shielded_columns_and_a_protected_span_both_hold(order: tuple[str, str], llama: Path) -> None:
    """Folded one after the other 17 % of W's step lay on the span, or frozen columns moved by 5e-2."""
    made = {"gpm": GPM(), "ssu": SourceShielding()}
    module, before, after = _constrained(llama, {name: made[name] for name in order})
    final = after
    for mitigation in module._active["transform_update"]:
        final = mitigation.transform_update(module, before, final)
    basis, frozen = made["gpm"].state["basis"], made["ssu"].state["frozen"]
    assert isinstance(basis, dict)
    assert isinstance(frozen, dict)
    for layer, span in basis.items():
        name = f"{layer}.weight"
        assert torch.equal(final[name][:, frozen[layer]], before[name][:, frozen[layer]])
        step = (final[name] - before[name]).double()
        assert step.norm() > 0.1 * (after[name] - before[name]).norm()
        assert (step @ span.double()).norm() < 1e-4 * step.norm()


class Pull(Mitigation):
    """Adds to every update, as decoupled L2-SP does."""

    def transform_update(self, module: Any, before: Any, after: Any) -> Any:
        return {name: tensor + 0.01 for name, tensor in after.items()}


def test_what_adds_to_an_update_comes_before_what_projects_it(llama: Path) -> None:
    """Decoupled L2-SP after GPM put 6.4 % of the step back on the protected span."""
    gpm = GPM()
    module, before, after = _constrained(llama, {"gpm": gpm, "pull": Pull()})
    for mitigation in module._active["transform_update"]:
        after = mitigation.transform_update(module, before, after)
    basis = gpm.state["basis"]
    assert isinstance(basis, dict)
    for layer, span in basis.items():
        step = (after[f"{layer}.weight"] - before[f"{layer}.weight"]).double()
        assert (step @ span.double()).norm() < 1e-4 * step.norm()


# --- coordinates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [lambda: EWC(strength=1000.0, fisher_samples=6), lambda: MAS(strength=10.0, samples=6), lambda: SI(strength=10.0)],
)
@pytest.mark.parametrize("adapter", ["lora", "full"])
def test_a_mixture_that_changes_nothing_changes_no_penalty(
    make: Any, adapter: str, llama: Path, tmp_path: Path
) -> None:
    """α = 0.999999, three stages: LoRA's factors were made anew in another gauge, and EWC's penalty grew by 48."""
    found: list[list[float]] = []
    for more in ({}, {"mix": WeightMixing(alpha=0.999999)}):
        folder = tmp_path / str(len(found)) / "run"
        train(folder, llama, ADAPTERS[adapter](), {"x": make(), **more}, steps=2)
        lines = [json.loads(line) for line in (folder / "history.jsonl").read_text().splitlines()]
        found.append([line["loss/x/penalty"] for line in lines if line["stage"] == 3])
    assert found[0][-1] > 0
    assert found[1] == pytest.approx(found[0], rel=1e-2, abs=1e-6)


# --- the end of a stage -----------------------------------------------------------------------------------------------


def test_a_fisher_merge_takes_what_it_is_given(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Merged so far 0, trained 4, mixed by halves to 2: with equal information 1. Read from the model it would be 2."""
    merge = FisherMerge()
    module = make_module(llama, Full(), {"mix": WeightMixing(alpha=0.5), "merge": merge})
    module.build(seed=0)
    leaves = module.adapter.trainable(module.model)
    ones = {name: torch.ones_like(leaf) for name, leaf in leaves.items()}
    merge.state.update(precision=ones, merged={name: torch.zeros_like(leaf) for name, leaf in leaves.items()})
    monkeypatch.setattr(merge, "_fisher", lambda module: ones)
    with torch.no_grad():
        for leaf in leaves.values():
            leaf.fill_(4.0)
    mixed = {name: torch.full_like(leaf, 2.0) for name, leaf in leaves.items()}
    final = merge.transform_weights(module, {}, mixed)
    assert all(torch.equal(final[name], torch.ones_like(leaf)) for name, leaf in leaves.items())


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "word"),
    [
        (lambda: Replay(ratio=0.6), lambda: GenerativeReplay(ratio=0.5), "add to 1.1"),
        (lambda: Replay(ratio=0.2, every=2), lambda: Replay(ratio=0.2), "every"),
        (lambda: OGD(), lambda: GPM(), "orthogonal"),
        (lambda: OGD(), lambda: SourceShielding(), "orthogonal"),
        (lambda: GEM(), lambda: AGEM(), "half-spaces"),
        (lambda: EarlyStopping(every=1), lambda: EMA(decay=0.9), "last step"),
    ],
)
def test_what_cannot_be_composed_is_refused_in_either_order(first: Any, second: Any, word: str, llama: Path) -> None:
    for parts in ({"x": first(), "y": second()}, {"y": second(), "x": first()}):
        with pytest.raises(UserError) as error:
            make_module(llama, Full(), parts)
        assert word in str(error.value)
        assert "model.mitigations" in str(error.value)


def test_what_is_off_excludes_nothing(llama: Path) -> None:
    make_module(llama, Full(), {"x": OGD(strength=0.0), "y": GPM(), "z": L2SP()})


# --- precision --------------------------------------------------------------------------------------------------------


def test_inner_products_of_half_precision_are_finite() -> None:
    """Σ 300² over 4 numbers is above 65504: infinite in float16, and the projection NaN."""
    g, r = ({"w": torch.full((4,), value, dtype=torch.float16)} for value in (-300.0, 300.0))
    assert float(inner(g, r)) == -360000.0
    assert project_agem(g, r)["w"].abs().max() == 0

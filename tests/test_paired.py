"""The harness of the pairs can fail: every invariant, broken once, is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Adapter
from residency.core.errors import UserError
from residency.core.types import Batch, Outputs, Stage, Tensors
from residency.mitigations import Mitigation
from residency.testing import MitigationRow
from residency.testing.pairs import Pairs
from table import ADAPTERS, MITIGATIONS


class Scaled(Mitigation):
    """Updates of later domains are halved: keeps every invariant."""

    def __init__(self, factor: float = 0.5) -> None:
        super().__init__()
        self.factor = factor

    def transform_update(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        if module.stage.index == 0 or self.factor == 1:
            return after
        return {name: torch.lerp(before[name], after[name], self.factor) for name in after}


class Forgetful(Scaled):
    """Counts steps where no checkpoint sees it."""

    steps = 0

    def transform_update(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        self.steps += 1
        self.factor = 1 / (1 + self.steps)
        return super().transform_update(module, before, after)


class Drawing(Scaled):
    """Asks the global generator at the start of a domain."""

    def on_domain_start(self, module: Any, stage: Stage) -> None:
        self.factor = float(torch.rand(()))


class Thawing(Scaled):
    """Moves what is frozen."""

    def transform_update(self, module: Any, before: Tensors, after: Tensors) -> Tensors:
        next(p for p in module.model.parameters() if not p.requires_grad).data.mul_(1.001)
        return super().transform_update(module, before, after)


class Ending(Scaled):
    """Changes weights where it may only look."""

    def on_domain_end(self, module: Any, stage: Stage) -> None:
        next(iter(module.adapter.trainable(module.model).values())).data.mul_(1.001)


class Hooking(Scaled):
    """Counts what passes through the model, evaluation included."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", torch.zeros(()))

    def on_domain_start(self, module: Any, stage: Stage) -> None:
        module.model.register_forward_hook(lambda *_: self.state.update(seen=self.state["seen"] + 1))


class Early(Scaled):
    """Acts in the first stage and says that it does not."""

    def loss_terms(self, module: Any, batch: Batch, outputs: Outputs) -> Mapping[str, torch.Tensor]:
        return {"more": outputs.loss}


class Diverging(Scaled):
    """Has a loss that is no number."""

    def loss_terms(self, module: Any, batch: Batch, outputs: Outputs) -> Mapping[str, torch.Tensor]:
        return {"more": outputs.loss * torch.nan}


def _row(make: Callable[[], Mitigation], off: Callable[[], Mitigation] = lambda: Scaled(1.0)) -> MitigationRow:
    return MitigationRow(make=make, off=off)


def _misses(adapter: Adapter) -> str:
    return "needs two hands"


BROKEN: dict[str, tuple[MitigationRow, str]] = {
    "off": (_row(Scaled, lambda: Scaled(0.9)), "off: .* differs from a run without it"),
    "idle": (_row(lambda: Scaled(1.0)), "acts: 0 tensors differ"),
    "not_idle": (replace(_row(Scaled), idle=("ia3",)), "acts: .* tensors differ"),
    "early": (_row(Early), "acts: it says that it leaves the first stage alone"),
    "diverging": (_row(Diverging), "loss/diverging/more is nan"),
    "thawing": (_row(Thawing), "frozen: training moved"),
    "ending": (_row(Ending), "frozen: what follows training moved"),
    "forgetful": (_row(Forgetful), "resume: /?weights/.* differs from the uninterrupted run"),
    "hooking": (_row(Hooking), "evaluate: scoring changed /hooking/seen"),
    "drawing": (_row(Drawing), "seed: preparing the domain drew"),
    "refused": (replace(_row(Scaled), refuses=_misses), "refused: it was not, although needs two hands"),
}


@pytest.fixture(scope="module")
def bench(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Pairs:
    rows = {name: row for name, (row, _) in BROKEN.items()}
    mitigations = {**rows, "scaled": _row(Scaled), **MITIGATIONS}
    return Pairs(llama, tmp_path_factory.mktemp("pairs"), adapters=ADAPTERS, mitigations=mitigations)


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_named(name: str, bench: Pairs) -> None:
    with pytest.raises((AssertionError, UserError), match=BROKEN[name][1]):
        bench.check("ia3", name)


def test_one_that_is_not_off_spoils_no_other(bench: Pairs) -> None:
    bench.check("ia3", "scaled")
    assert bench._all_off["ia3",], "the run of all of them together must have seen it"


def test_a_pair_that_is_not_refused_is_seen(bench: Pairs, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.check("per_domain", "ewc")
    monkeypatch.setattr("residency.engine.compatibility.check_mitigations", lambda *_: None)
    with pytest.raises(AssertionError, match="refused: it was not, although needs fixed_coordinates"):
        bench.check("per_domain", "ewc")

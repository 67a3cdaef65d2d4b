"""Every pair of mitigations through three stages: what each promises is measured; and the table of what composes.

    PYTHONPATH=tests python -m support.mitigation_pairs

writes `experiments/mitigations/composition.md`; `tests/mitigations/test_all_pairs.py` compares and measures again.
"""

from __future__ import annotations

import sys
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor

from residency.core.tensors import snapshot
from residency.core.types import Stage
from residency.domains.stream_data import StreamData
from residency.engine.checkpointing import History
from residency.engine.module import ContinualModule
from residency.engine.stage import finish_stage, train_stage
from residency.mitigations import GPM, MIGU, OGD, FisherMerge, Mitigation, SourceShielding
from residency.mitigations.composition import refusal
from residency.mitigations.constraints.linear_maps import linear_maps
from residency.mitigations.rehearsal.memory import Mixture
from residency.testing.fit_without_trainer import Fits
from residency.testing.pairs import Pairs
from residency.testing.tiny_runs import domains
from table import ADAPTERS, MITIGATIONS

__all__ = ["FILE", "NAMES", "PAIRS", "ThreeStages", "rendered"]

FILE = Path(__file__).parents[2] / "experiments" / "mitigations" / "composition.md"


def _one_per_class() -> list[str]:
    found: dict[type, str] = {}
    for name, row in MITIGATIONS.items():
        found.setdefault(type(row.make()), name)
    return list(found.values())


NAMES = _one_per_class()
PAIRS = list(combinations(NAMES, 2))


class Promises(Callback):
    """Looks at every step of a stage: what a mitigation keeps out of it must not be in it."""

    def __init__(self, parts: dict[str, Mitigation]) -> None:
        self.parts = parts
        self.broken: list[str] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.before = self.start = snapshot(pl_module.adapter.trainable(pl_module.model))
        self._shares(pl_module)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        after = snapshot(pl_module.adapter.trainable(pl_module.model))
        step = {name: (after[name] - self.before[name]).double() for name in after}
        for mitigation in self.parts.values():
            if isinstance(mitigation, GPM):
                self._span(mitigation, pl_module, step)
            elif isinstance(mitigation, OGD):
                self._directions(mitigation, step)
            elif isinstance(mitigation, SourceShielding):
                self._columns(mitigation, pl_module, after)
            elif isinstance(mitigation, MIGU) and pl_module.stage.index >= mitigation.first_domain:
                self._rows(mitigation, pl_module, step)
        self.before = after

    def _shares(self, module: Any) -> None:
        if not isinstance(mixture := module.dataset, Mixture):
            return
        for source in mixture.sources:
            count = sum(mixture.source(i) is source for i in range(len(mixture)))
            every = (self.parts[source.name].rehearsal() or (0, 1))[1]
            if abs(count - source.ratio * len(mixture) / every) > module.stage.batch_size:
                self.broken.append(f"{source.name} has {count} of {len(mixture)} slots at ratio {source.ratio}")

    def _span(self, gpm: GPM, module: Any, step: dict[str, Tensor]) -> None:
        memories = gpm.memories()
        for name, place in linear_maps(module.model, step).items():
            if (memory := memories.get(place.owner)) is None or not step[name].any():
                continue
            matrix, basis = place.by_input(step[name]), memory.basis.double()
            inside = basis @ (basis.T @ matrix)
            leak = float((matrix - inside if memory.free else inside).norm() / matrix.norm())
            # Parameters in float32 round what is added to them; against a short step that shows.
            floor = 1e-7 * float(self.before[name].norm() / matrix.norm())
            if leak > 1e-4 + 4 * floor:
                self.broken.append(f"{name}: {leak:.1e} of a step lies on the protected span")

    def _directions(self, ogd: OGD, step: dict[str, Tensor]) -> None:
        basis = ogd.state["basis"]
        assert isinstance(basis, Tensor)
        if not len(basis):
            return
        flat = torch.cat([step[name].flatten() for name in sorted(step)])
        size = float(flat.norm())
        leak = float((basis.double() @ flat).norm())
        if size and leak > 1e-3 * size + 1e-6:
            self.broken.append(f"{leak / size:.1e} of a step changes what was remembered")

    def _columns(self, shielding: SourceShielding, module: Any, after: dict[str, Tensor]) -> None:
        frozen = shielding.state["frozen"]
        assert isinstance(frozen, dict)
        for name, place in linear_maps(module.model, after).items():
            if (mask := frozen.get(place.layer)) is None or place.kind == "B":
                continue
            one, other = self.start[name], after[name]
            if place.kind == "A":
                b = name.replace(".lora_A.", ".lora_B.")
                one, other = self.start[b] @ one, after[b] @ other
            moved = float((other - one)[:, mask].abs().max())
            if moved > 1e-7:
                self.broken.append(f"{name}: a frozen column moved by {moved:.1e}")

    def _rows(self, migu: MIGU, module: Any, step: dict[str, Tensor]) -> None:
        for name, place in linear_maps(module.model, step).items():
            rows = place.by_input(step[name]).abs().amax(0)
            share = float((rows > 0).double().mean())
            if share > 1 - migu.threshold + 1 / len(rows) + 1e-9:
                self.broken.append(f"{name}: {share:.2f} of the rows moved at threshold {migu.threshold}")


class ThreeStages:
    """Trains pairs through three tiny stages; the attached model is made once per adapter.

    Args:
        backbone: Folder of the tiny model.
        folder: For the data.
    """

    def __init__(self, backbone: Path, folder: Path) -> None:
        self.source = Pairs(backbone, folder / "pairs", adapters=ADAPTERS, mitigations=MITIGATIONS)
        self.folder = folder
        self.data = StreamData(
            domains=domains(folder / "data", {"a": "generative", "b": "label", "c": "generative"}), batch_size=4
        )

    def broken(self, adapter: str, parts: dict[str, Mitigation]) -> list[str]:
        """What did not hold.

        Raises:
            UserError: The pair is refused.
        """
        module: ContinualModule = self.source.module(adapter, parts)
        watch = Promises(parts)
        for index, domain in enumerate("abc"):
            stage = Stage(index=index, domain=domain, stages=3, seed=0, steps=2, batch_size=4)
            history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None)
            train_stage(
                module=module,
                data=self.data,
                trainers=Fits(lambda: {"gradient_clip_val": 1.0}),
                stage=stage,
                folder=self.folder / "work",
                history=history,
                observers=[watch],
                checkpoint_every_n_steps=0,
            )
            grams = _grams(module)
            finish_stage(module, {}, device=torch.device("cpu"), remember=index < 2)
            if not any(
                isinstance(m, FisherMerge) for m in parts.values()
            ):  # which averages factors, in their coordinates
                turned = _turned(grams, _grams(module))
                watch.broken += [f"{name}: the gauge of its factors changed" for name in turned]
        last = module.adapter.state(module.model)
        watch.broken += [f"{name} is not finite" for name, t in last.items() if not t.isfinite().all()]
        return watch.broken


def _grams(module: ContinualModule) -> dict[str, Tensor]:
    """A Aᵀ of every LoRA layer: what weight mixing must leave to optimizers and memories."""
    leaves = module.adapter.trainable(module.model)
    return {name: (a.detach() @ a.detach().T).double() for name, a in leaves.items() if ".lora_A." in name}


def _turned(before: dict[str, Tensor], after: dict[str, Tensor]) -> list[str]:
    return [name for name, gram in before.items() if (gram - after[name]).norm() > 1e-3 * gram.norm()]


def rendered() -> str:
    """The table of pairs as Markdown."""
    made = {name: MITIGATIONS[name].make() for name in NAMES}
    reasons: dict[str, list[str]] = {}
    lines = [
        "# Which mitigations compose",
        "",
        "Written by `tests/support/mitigation_pairs.py` from what the classes declare; the test beside it",
        "trains every pair, in both orders, on LoRA and on all weights through three stages, and measures what each",
        "promises: the part of every step on GPM's span and along OGD's vectors, shielded columns, MIGU's rows, shares",
        "of the batch, the gauge of LoRA's factors after mixing. How: `src/residency/mitigations/composition.py`.",
        "",
        "| mitigation | holds | not with |",
        "|---|---|---|",
    ]
    for name in NAMES:
        against = []
        for other in NAMES:
            if other != name and (found := refusal(made[name], made[other])) is not None:
                against.append(other)
                reasons.setdefault(found[0], []).append(f"{name} + {other}")
        holds = ", ".join(sorted(made[name].holds)) or "-"
        lines.append(f"| {name} | {holds} | {', '.join(against) or '-'} |")
    refused = sum(len(pairs) for pairs in reasons.values()) // 2
    lines += ["", f"{len(PAIRS) - refused} of {len(PAIRS)} pairs compose; {refused} are refused:", ""]
    lines += [f"* {reason}" for reason in reasons]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(parents=True, exist_ok=True)
    FILE.write_text(rendered(), encoding="utf-8")
    sys.stdout.write(rendered())

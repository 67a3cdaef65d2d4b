"""One new plug-in of each kind, as texts: put into a copy of the project, and into a package outside of it."""

from __future__ import annotations

__all__ = ["FILES"]

_DOMAIN_ROW = """
from residency.testing import write_domain  # noqa: E402


def _brand_new(folder):
    files = write_domain(folder, "a")["init_args"]
    return domains.BrandNewDomain(train=files["train"], test=files["test"])


DOMAINS["brand_new"] = DomainRow(make=_brand_new)
"""

# kind -> (its file, its text, where its preset goes, the preset's class, its row in tests/table.py)
FILES = {
    "adapter": (
        "adapters/brand_new.py",
        """
from residency.adapters.full import Full


class BrandNewAdapter(Full):
    '''Everything moves.'''
""",
        "--model.adapter configs/adapter/brand_new.yaml",
        "residency.adapters.BrandNewAdapter",
        'ADAPTERS["brand_new"] = AdapterRow(make=adapters.BrandNewAdapter, loads_with="transformers")',
    ),
    "mitigation": (
        "mitigations/penalties/brand_new.py",
        """
from residency.mitigations.base import Mitigation


class BrandNewPull(Mitigation):
    '''Pull every parameter to 0.

    Args:
        strength: Of the pull.
    '''

    def __init__(self, *, strength: float = 0.1) -> None:
        super().__init__()
        self.strength = strength

    def touches_training(self, index):
        return self.strength != 0 and super().touches_training(index)

    def loss_terms(self, module, batch, outputs):
        if not self.touches_training(module.stage.index):
            return {}
        leaves = module.adapter.trainable(module.model).values()
        return {"pull": self.strength * sum(leaf.square().sum() for leaf in leaves)}
""",
        "--model.mitigations.x configs/mitigation/brand_new.yaml",
        "residency.mitigations.BrandNewPull",
        'MITIGATIONS["brand_new"] = MitigationRow(\n'
        "    make=lambda: mitigations.BrandNewPull(strength=0.5),\n"
        "    off=lambda: mitigations.BrandNewPull(strength=0.0),\n)",
    ),
    "objective": (
        "objectives/brand_new.py",
        """
from residency.objectives.sft import SFT


class BrandNewObjective(SFT):
    '''As SFT.'''
""",
        "--model.objective configs/objective/brand_new.yaml",
        "residency.objectives.BrandNewObjective",
        'OBJECTIVES["brand_new"] = ObjectiveRow(make=objectives.BrandNewObjective)',
    ),
    "scorer": (
        "scorers/brand_new.py",
        """
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from residency.core.types import Row
from residency.scorers.base import Answer, Scorer


@dataclass(frozen=True, kw_only=True)
class BrandNewScorer(Scorer):
    '''Whether the answer begins as the completion does.'''

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"brand_new": {}}
    unit: ClassVar[str] = "share of rows that begin right"
    needs: ClassVar[Literal["generation"]] = "generation"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        pairs = zip(rows, answers, strict=True)
        return [float((answer.text or "")[:1] == row.completion[:1]) for row, answer in pairs]
""",
        "--data.domains.code.scorers=[nll,configs/scorer/brand_new.yaml]",
        "residency.scorers.BrandNewScorer",
        'SCORERS["brand_new"] = ScorerRow(make=scorers.BrandNewScorer)',
    ),
    "domain": (
        "domains/brand_new.py",
        """
from residency.domains.jsonl import Jsonl


class BrandNewDomain(Jsonl):
    '''As Jsonl.'''
""",
        "",
        "",
        _DOMAIN_ROW,
    ),
    "metric": (
        "metrics/definitions/brand_new.py",
        """
from residency.metrics.definitions.base import About, Scores, utility


ABOUT = About(kind="level", title="best domain", help="best domain at the end", rank=900)


def brand_new(R: Scores, *, higher_is_better: bool) -> float:
    '''max_j u[T, j].'''
    return float(utility(R, higher_is_better=higher_is_better)[-1].max())
""",
        "",
        "",
        "",
    ),
}

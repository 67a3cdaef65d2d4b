"""Source-shielded updates (SSU): the input columns that the pretrained model needs most are never written.

Before the first step the columns of every linear layer are scored on text that stands for the source
(`shield_scores`), and the top `ratio` of them are frozen for the whole stream. Embeddings, norms, biases and the head
stay trainable. It is the UPDATE that is masked: a mask on gradients leaves weight decay, which over the authors'
schedule shrinks every "frozen" column by 0.30 %.

LoRA. W_:j + s B A_:j is frozen where A_:j = 0, whatever B does. While B = 0, as at the start, the columns A_:j can be
set to 0 without changing the function, which the first update does. Later stages need nothing more, as the mask stays:
the source is the pretrained model, in every stage. A newly opened block (IncLoRA, PerDomain) starts with B = 0 again.
Where neither holds, as in PiSSA, whose factors start as a part of the weight, zeroing A_:j would change the function.
Then A_:j keeps its value and the step of B is kept orthogonal to all frozen A_:j; where these span all r dimensions, B
rests and A learns in the free columns. Exact in all three cases.

DoRA rescales whole rows by a norm that contains the free columns, so its frozen columns would move: refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from residency.core.errors import UserError
from residency.core.randomness import permutation
from residency.core.types import Capability, Example, Stage, Tensors, untyped
from residency.domains.base import Domain
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.constraints.linear_maps import LinearMap, kept_share, linear_maps
from residency.mitigations.constraints.shield_scores import Score, frozen_columns, own_text, score_layers
from residency.mitigations.contract import StageModule

__all__ = ["SourceShielding", "shield", "shield_factors"]

# Frozen columns of A that are smaller than this, relative to A, are rounding errors of a zero.
_ZERO = 1e-6


def shield(before: Tensor, after: Tensor, frozen: Tensor) -> Tensor:
    """The new weight, with the old values in frozen columns, bit for bit.

    Args:
        before: W, as stored.
        after: W after a step.
        frozen: Bool, broadcasts against W along its input features.
    """
    return torch.where(frozen, before, after)


def shield_factors(
    before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], frozen: Tensor
) -> tuple[Tensor, Tensor]:
    """The new LoRA factors, such that (B A)_:j is what it was for every frozen j.

    Args:
        before: A (r, in) and B (out, r).
        after: The same after a step.
        frozen: (in,) bool.
    """
    (a, b), (new_a, new_b) = before, after
    columns = a[:, frozen]
    if not b.any() or columns.norm() <= _ZERO * a.norm():
        return torch.where(frozen, torch.zeros_like(a), new_a), new_b
    span = occupied(columns)
    if span.shape[1] == len(a):
        final_b = b
    else:
        step = (new_b - b).double()
        final_b = b + (step - (step @ span) @ span.T).to(b.dtype)
    return torch.where(frozen, a, new_a), final_b


def occupied(columns: Tensor) -> Tensor:
    """(r, k) orthonormal directions that frozen columns (r, n) of A occupy: B must go on mapping them to the same."""
    energy, axes = torch.linalg.eigh(columns.double() @ columns.double().T)
    span: Tensor = axes[:, energy > _ZERO**2 * energy.max()]
    return span


class SourceShielding(Mitigation):
    """Freeze the columns that matter for the pretrained model. It acts from the first domain on.

    Args:
        ratio: Share of the columns of every matrix that is frozen: floor(ratio · in). 0 = off.
        score: How columns are scored, see `residency.mitigations.constraints.shield_scores`.
        calibration: What stands for the source. Null: the model's own text, drawn from the pretrained model from the
            start of a text on, at temperature 1. It needs no data and favours none of the domains, and is the source
            as far as the model has it. Or a domain (for example `residency.domains.packaged.ChitChat`), whose training
            rows are used; never one of the stream's test rows.
        samples: Texts of the calibration (the paper: 500).
        tokens: Longest text that the model writes itself (the paper: 2048).
    """

    holds: ClassVar[frozenset[Guarantee]] = frozenset({"columns"})
    update_order: ClassVar[int] = 2
    not_on_classifiers = "its scores come from texts that the model is to continue, and a classifier continues none"
    requires: frozenset[Capability] = frozenset({"linear"})
    alternative: ClassVar[str] = "configs/mitigation/weight_mixing.yaml, or an adapter of linear layers (lora, full)"
    first_domain: int = 0

    def __init__(
        self,
        *,
        ratio: float = 0.5,
        score: Score = "wanda_paper",
        calibration: Domain | None = None,
        samples: int = 32,
        tokens: int = 64,
    ) -> None:
        super().__init__()
        if not 0 <= ratio <= 1 or samples < 1 or tokens < 1:
            raise UserError(
                f"SourceShielding with ratio={ratio}, samples={samples}, tokens={tokens}",
                why="the ratio is the share of frozen columns, in [0, 1]; samples and tokens are at least 1",
                fix="use the paper's ratio: 0.5, or 0 for off",
            )
        self.ratio = ratio
        self.score: Score = score
        self.calibration = calibration
        self.samples = samples
        self.tokens = tokens
        self.add_state("frozen", {})
        self.add_state("kept", torch.ones(()))

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """Score the pretrained model, before the first step of the stream."""
        if self.ratio == 0 or stage.index > 0:
            return
        places = linear_maps(module.model, module.adapter.trainable(module.model))
        head: Any = untyped(module.model).get_output_embeddings()
        layers = sorted({p.layer for p in places.values() if module.model.get_submodule(p.layer) is not head})
        uses_text = self.score not in ("magnitude", "random")
        examples = self._source(module, stage) if uses_text else []
        scores = score_layers(module, layers, examples, score=self.score, seed=stage.seed)
        self.state["frozen"] = {layer: frozen_columns(s, self.ratio).to(module.device) for layer, s in scores.items()}

    def transform_update(self, module: StageModule, before: Tensors, after: Tensors) -> Tensors:
        """Undo the step in frozen columns."""
        frozen = self._frozen()
        if not frozen:
            return after
        final = dict(after)
        for name, place in linear_maps(module.model, after).items():
            if (mask := frozen.get(place.layer)) is not None:
                final |= _shielded(name, place, before, after, mask)
        self.state["kept"] = kept_share(before, after, final)
        return final

    def frozen_inputs(self, module: StageModule) -> Mapping[str, Tensor]:
        """The frozen columns; of a B whose A is not 0 there, the directions that they occupy."""
        found: dict[str, Tensor] = {}
        masks, leaves = self._frozen(), module.adapter.trainable(module.model)
        for name, place in (linear_maps(module.model, leaves) if masks else {}).items():
            if (mask := masks.get(place.layer)) is None:
                continue
            if place.kind != "B":
                found[place.owner] = mask
            elif (a := leaves.get(name.replace(".lora_B.", ".lora_A."))) is not None:
                columns = a.detach()[:, mask]
                if columns.norm() > _ZERO * a.detach().norm():
                    found[place.owner] = occupied(columns)
        return found

    def touches_training(self, index: int) -> bool:
        """Not at ratio 0."""
        return self.ratio > 0 and super().touches_training(index)

    def fingerprint(self) -> str:
        """Of the calibration's rows."""
        return self.calibration.fingerprint() if self.calibration else ""

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`frozen`: share of the columns; `kept`: share of the last update's norm."""
        masks, kept = list(self._frozen().values()), self.state["kept"]
        assert isinstance(kept, Tensor)
        total = sum(len(mask) for mask in masks)
        return {"frozen": sum(int(m.sum()) for m in masks) / total if total else 0.0, "kept": float(kept)}

    def _source(self, module: StageModule, stage: Stage) -> list[Example]:
        if self.calibration is None:
            return own_text(module, samples=self.samples, tokens=self.tokens, seed=stage.seed)
        rows, template = self.calibration.rows("train"), self.calibration.template
        order = permutation(len(rows), stage.seed, "calibration")
        tokenizer = module.backbone.tokenizer
        return [template.encode(tokenizer, domain="calibration", row=rows[i]) for i in order[: self.samples]]

    def _frozen(self) -> dict[str, Tensor]:
        frozen = self.state["frozen"]
        assert isinstance(frozen, dict)
        return frozen


def _shielded(name: str, place: LinearMap, before: Tensors, after: Tensors, mask: Tensor) -> dict[str, Tensor]:
    if place.kind == "weight":
        return {name: shield(before[name], after[name], place.over_inputs(mask))}
    if place.kind == "B":  # comes with its A
        return {}
    other = name.replace(".lora_A.", ".lora_B.")
    a, b = shield_factors((before[name], before[other]), (after[name], after[other]), mask)
    return {name: a, other: b}

"""Refusing what cannot work, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from residency.adapters.base import Adapter
from residency.backbones.base import Backbone
from residency.core.errors import UserError
from residency.core.types import RowKind
from residency.domains.base import Domain
from residency.domains.readers.formats import WANTED
from residency.domains.stream_data import StreamData
from residency.mitigations.base import Mitigation, overrides
from residency.mitigations.composition import check_pairs
from residency.objectives.base import Objective, Reads

__all__ = [
    "check_family",
    "check_mitigations",
    "check_objective",
    "check_objectives",
    "check_parts",
    "check_rows",
    "check_steps",
    "check_validation",
]


def check_parts(
    backbone: Backbone, adapter: Adapter, mitigations: Mapping[str, Mitigation], objective: Objective
) -> None:
    """Whether the parts of a module work with each other.

    Raises:
        UserError: As the checks below say.
    """
    check_family(backbone, adapter, mitigations, objective)
    check_mitigations(adapter, mitigations)
    check_objective(objective, adapter, mitigations)


def check_family(
    backbone: Backbone, adapter: Adapter, mitigations: Mapping[str, Mitigation], objective: Objective
) -> None:
    """Who works on some kinds of models only, against the backbone.

    Raises:
        UserError: Naming the part, and why.
    """
    if backbone.family == "decoder":
        return
    kind = "a sequence classifier" if backbone.family == "classifier" else f"an {backbone.family}"
    parts: dict[str, Adapter | Mitigation | Objective] = {"model.adapter": adapter, "model.objective": objective}
    parts |= {f"model.mitigations.{name}": mitigation for name, mitigation in mitigations.items()}
    for place, part in parts.items():
        why = part.not_on_classifiers if backbone.family == "classifier" else part.decoder_only
        if not why and backbone.family == "classifier" and "low_rank" in getattr(part, "requires", ()):
            why = "it measures distances between low-rank updates, and the head of a classifier moves beside them"
        if why:
            raise UserError(
                f"{place} ({type(part).__name__}) with model.backbone {type(backbone).__name__}, {kind}",
                why=why,
                fix="use configs/adapter/lora.yaml, configs/mitigation/ewc.yaml or replay.yaml, or a decoder "
                "(residency.backbones.CausalLM)",
            )


def check_mitigations(adapter: Adapter, mitigations: Mapping[str, Mitigation]) -> None:
    """Every mitigation's requirements against what the adapter provides.

    Raises:
        UserError: Naming mitigation, missing capability, adapter, and what to use instead; or two mitigations that
            exclude each other.
    """
    check_pairs(mitigations)
    for name, mitigation in mitigations.items():
        missing = sorted(mitigation.requires - adapter.provides)
        if missing:
            kind = type(mitigation).__name__
            raise UserError(
                f"model.mitigations.{name} ({kind}) with model.adapter {type(adapter).__name__}",
                why=f"{kind} needs {', '.join(missing)}; this adapter provides "
                f"{', '.join(sorted(adapter.provides)) or 'none of the capabilities'}",
                fix=f"use {mitigation.alternative}",
            )
        if mitigation.needs_continuity and not adapter.continues:
            raise UserError(
                f"model.mitigations.{name} ({type(mitigation).__name__}) with model.adapter {type(adapter).__name__}",
                why="this adapter begins every stage with another function than the stage before left, so the weights "
                "at its start are not the previous model's",
                fix=f"set model.mitigations.{name}.cache to 64: the previous model is asked before the stage begins",
            )
        hooks = [hook for hook in ("transform_gradients", "transform_update") if overrides(mitigation, hook)]
        if adapter.steps_in_backward and hooks:
            raise UserError(
                f"model.mitigations.{name} ({type(mitigation).__name__}) with model.adapter {type(adapter).__name__}",
                why=f"its {hooks[0]} comes after the backward pass, and this adapter has stepped and freed every "
                "gradient by then",
                fix="set model.adapter.layerwise to false",
            )


def check_objective(objective: Objective, adapter: Adapter, mitigations: Mapping[str, Mitigation]) -> None:
    """What an objective needs of the adapter, and which mitigations can protect what is learnt by it.

    Raises:
        UserError: Naming the objective, and what to use instead.
    """
    kind = type(objective).__name__
    missing = sorted(objective.requires - adapter.provides)
    if missing:
        raise UserError(
            f"model.objective {kind} with model.adapter {type(adapter).__name__}",
            why=f"as it is configured it needs {', '.join(missing)}, which this adapter does not provide",
            fix="set model.objective.reference (or start) to stage_start where there is one, or use "
            "configs/adapter/lora.yaml",
        )
    for name, mitigation in mitigations.items():
        if objective.reads not in mitigation.follows:
            raise UserError(
                f"model.mitigations.{name} ({type(mitigation).__name__}) with model.objective {kind}",
                why=f"as it is configured it works on {' or '.join(sorted(mitigation.follows))} rows, and this "
                f"objective reads {objective.reads} rows",
                fix="use configs/mitigation/ewc.yaml or weight_mixing.yaml, which follow every objective",
            )


_READABLE: Mapping[Reads, frozenset[RowKind]] = {
    "completion": frozenset({"completion", "messages", "text", "labelled"}),
    "label": frozenset({"completion", "labelled"}),
    "pair": frozenset({"pair"}),
    "unpaired": frozenset({"unpaired"}),
    "prompt": frozenset({"prompt", "completion", "labelled", "messages", "pair"}),
}
_LEARNT_BY: Mapping[RowKind, str] = {
    "pair": "objective/dpo.yaml",
    "unpaired": "objective/kto.yaml",
    "prompt": "objective/grpo.yaml",
}


def check_rows(objective: Objective, domain: Domain, name: str) -> None:
    """An objective can read the training rows of a domain, before a model is loaded.

    Args:
        objective: Of the stage.
        domain: Of the stage.
        name: Of the domain.

    Raises:
        UserError: Naming the first row that it cannot read, what it reads, and which objective reads such rows.
    """
    readable = _READABLE[objective.reads]
    odd = next((row for row in domain.rows("train") if row.kind not in readable), None)
    if odd is not None:
        wanted = " or ".join(WANTED[kind] for kind in sorted(readable))
        raise UserError(
            f"model.objective {type(objective).__name__} and data.domains.{name}, whose row {odd.id!r} is "
            f"{WANTED[odd.kind]}",
            why=f"it learns from rows of the form {wanted}",
            fix=f"give such rows, or learn these with configs/{_LEARNT_BY.get(odd.kind, 'objective/sft.yaml')}",
        )


def check_objectives(objectives: Mapping[str, Objective], mitigations: Mapping[str, Mitigation]) -> None:
    """Rows that are kept for later stages can be read by the objectives of all of them.

    Args:
        objectives: By domain, in the order of learning.
        mitigations: By name.

    Raises:
        UserError: Naming the mitigation and two domains.
    """
    keeping = [name for name, mitigation in mitigations.items() if mitigation.keeps_examples]
    first = next(iter(objectives))
    other = next((name for name, one in objectives.items() if one.reads != objectives[first].reads), None)
    if keeping and other is not None:
        raise UserError(
            f"model.mitigations.{keeping[0]} with {first}, whose objective reads {objectives[first].reads} rows, and "
            f"{other}, whose objective reads {objectives[other].reads} rows",
            why="it learns again from rows of earlier stages, which the objective of another stage cannot read",
            fix="use configs/mitigation/ewc.yaml or weight_mixing.yaml, which keep no rows, or objectives that read "
            "rows of one kind",
        )


def check_validation(mitigations: Mapping[str, Mitigation], data: StreamData) -> None:
    """Every domain has validation rows if a mitigation looks at them.

    Raises:
        UserError: Naming mitigation and domain.
    """
    for name, mitigation in mitigations.items():
        empty = [
            domain
            for domain in data.order
            if mitigation.uses_validation and not data.domains[domain].rows("validation")
        ]
        if empty:
            kind = type(mitigation).__name__
            raise UserError(
                f"model.mitigations.{name} ({kind}) and no validation rows in data.domains.{empty[0]}",
                why="it judges the model on the validation rows of the domain that is being learned",
                fix=f"give data.domains.{empty[0]} a validation file, or a max_validation above 0",
            )


def check_steps(adapter: Adapter, *, clip: float | None, accumulate: int, ranks: int = 1) -> None:
    """What the Trainer does between gradients and step, against when the adapter steps.

    Args:
        adapter: The adapter.
        clip: `trainer.gradient_clip_val`.
        accumulate: Micro-batches per optimizer step and rank.
        ranks: Processes that train together.

    Raises:
        UserError: The adapter steps inside the backward pass, and gradients are to be clipped or accumulated.
    """
    if not adapter.steps_in_backward:
        return
    name = f"model.adapter {type(adapter).__name__} with layerwise=true"
    if clip:
        raise UserError(
            f"{name} and trainer.gradient_clip_val={clip}",
            why="every gradient is used and freed in the backward pass, so there is nothing left to clip",
            fix="set trainer.gradient_clip_val to null, or model.adapter.layerwise to false",
        )
    if ranks > 1:
        raise UserError(
            f"{name} on {ranks} ranks",
            why="a parameter steps as soon as it has the gradient of its own rank; nothing is averaged",
            fix="set model.adapter.layerwise to false, or trainer.devices to 1",
        )
    if accumulate > 1:
        raise UserError(
            f"{name} and {accumulate} micro-batches per step",
            why="a parameter steps as soon as it has the gradient of one micro-batch; nothing is accumulated",
            fix="set data.micro_batch_size to data.batch_size (or null), or model.adapter.layerwise to false",
        )

"""A saved stage as a folder that plain transformers or PEFT load, with a model card."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from residency.adapters import Adapter, Full
from residency.backbones.loading import quiet_transformers
from residency.backbones.structure import names_of
from residency.core.environment import versions
from residency.core.errors import UserError
from residency.core.folders import replace_folder
from residency.core.tensor_files import write_json
from residency.core.types import untyped
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.row_scores import means
from residency.runs.export.hub_base import HubModel, hub_model, name_base
from residency.runs.export.model_card import model_card
from residency.runs.folder import RunFolder
from residency.runs.saved_stage import load_stage
from residency.runs.settings import StreamSettings, check_stream

if TYPE_CHECKING:
    from residency.backbones import Backbone
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule

__all__ = ["MARKER", "check_request", "difference", "export_saved", "merged_model"]

MARKER = "residency.json"
"""What an exported folder holds beside the weights; its presence allows `--overwrite` to replace the folder."""

Means = Mapping[str, Mapping[str, float]]


def export_saved(
    *,
    module: ContinualModule,
    data: StreamData,
    folder: RunFolder,
    settings: StreamSettings,
    stage: int | None,
    merge: bool,
    dtype: str | None,
    output: Path | None,
    overwrite: bool,
    device: torch.device,
) -> dict[str, Any]:
    """Write one saved stage: weights, tokenizer, model card, and the facts as JSON.

    Args:
        module: Not yet built.
        data: Names the stages; scored again if merged.
        folder: The run.
        settings: Of the run.
        stage: 1 ... T; `None` = the last one that is saved.
        merge: Fold the adapter into the backbone's weights; the result is scored with the run's own settings.
        dtype: Of merged weights; `None` = the backbone's own (full precision where that is quantised).
        output: Folder to write; `None` = export/<stage>-<domain> in the run.
        overwrite: Whether an earlier export there may be replaced.
        device: Where a merged model is scored.

    Returns:
        What `residency.json` holds, and `path`.

    Raises:
        UserError: The stage is not complete, the adapter cannot do it, or the folder is in use.
    """
    kind, told = type(module.adapter).__name__, module.backbone.task_id_at_test or module.adapter.task_id_at_test
    check_request(module.adapter, stage, merge=merge, dtype=dtype)
    check_stream(data)
    chosen = load_stage(module, data, folder, stage=stage, seed=settings.seed)
    place = folder.stage(chosen, data.order[chosen - 1])
    target = output or folder.path / "export" / f"{place.name}{'-merged' if merge else ''}"
    with replace_folder(target, overwrite=overwrite, marker=MARKER) as temporary:
        scores = _recorded(folder, place, chosen)
        tax: Means = {}
        if merge:
            module.model = merged_model(module.adapter, module.model, dtype=dtype)
            module.adapter = Full()  # nothing is left to switch on or off
            module.to(device)
            how: dict[str, Any] = {"split": settings.split, "settings": settings.evaluation, "learned": chosen}
            again = means(evaluate(module, data, **how))
            tax = difference(again, scores)
        with quiet_transformers():
            module.adapter.export(module.model.cpu(), temporary)
        base = _hub(module.backbone)
        name_base(temporary, base)
        module.backbone.tokenizer.save_pretrained(temporary)
        facts = {
            **_origin(data, settings, module.backbone, stage=chosen),
            "hub": None if base is None else {"id": base.id, "commit": base.commit},
            "family": module.backbone.family,
            "labels": module.backbone.label_names(),
            "adapter": kind,
            "format": written_format(temporary),
            "merged": merge,
            "task_id_at_test": told,
            "scores": scores,
            "base_scores": _base(folder),
            "merge_tax": tax,
        }
        write_json(temporary / MARKER, facts)
        (temporary / "README.md").write_text(model_card(facts), encoding="utf-8")
    return {**facts, "path": str(target)}


def _origin(data: StreamData, settings: StreamSettings, backbone: Backbone, *, stage: int) -> dict[str, Any]:
    return {
        "name": settings.cell,
        "seed": settings.seed,
        "stage": stage,
        "domain": data.order[stage - 1],
        "stream": data.order,
        "probes": list(data.probes),
        "split": settings.split,
        "backbone": _backbone(backbone),
        "licences": {name: domain.licence for name, domain in data.columns.items()},
        "versions": versions(),
    }


@torch.no_grad()
def merged_model(adapter: Adapter, model: nn.Module, *, dtype: str | None) -> nn.Module:
    """The plain model with the adapter folded in, summed in float32 and rounded once.

    Args:
        adapter: Provides `mergeable`.
        model: With the adapter; used up.
        dtype: Of the result; `None` = that of the backbone's unquantised weights.
    """
    own = next(p.dtype for p in model.parameters() if p.is_floating_point())
    if all(p.is_floating_point() for p in model.parameters()):
        # Half-precision sums of weight and update would be rounded twice. Quantised weights are the adapter's business.
        model = model.float()
    _untie_adapted(model)
    plain = adapter.merge(model)
    head = untyped(plain).get_output_embeddings()  # a classifier has none
    if _tied(plain) and head is not None and untyped(plain).get_input_embeddings().weight is not head.weight:
        untyped(plain).config.tie_word_embeddings = False
    return plain.to(own if dtype is None else getattr(torch, dtype))


def _tied(model: nn.Module) -> bool:
    return bool(getattr(model.config, "tie_word_embeddings", False))


def _untie_adapted(model: nn.Module) -> None:
    """Give a head and an embedding that share a weight one each, where a tuner is around one of them.

    Otherwise what is folded into the one would change the other, and the function with it.
    """
    for first, *others in names_of(model).values():
        if others and any(".base_layer." in name for name in (first, *others)):
            for name in others:
                owner, _, leaf = name.rpartition(".")
                parameter = model.get_parameter(name)
                setattr(model.get_submodule(owner), leaf, nn.Parameter(parameter.detach().clone(), requires_grad=False))


def difference(merged: Means, unmerged: Means) -> dict[str, dict[str, float]]:
    """{scorer: {column: merged - unmerged}} where both have a value."""
    return {
        scorer: {
            column: value - unmerged[scorer][column] for column, value in row.items() if column in unmerged[scorer]
        }
        for scorer, row in merged.items()
        if scorer in unmerged
    }


def written_format(folder: Path) -> Literal["peft", "transformers", "residency"]:
    """Who loads what lies in a folder."""
    if (folder / "adapter_config.json").is_file():
        return "peft"
    return "transformers" if (folder / "config.json").is_file() else "residency"


def _hub(backbone: Backbone) -> HubModel | None:
    folder = getattr(backbone, "folder", None)
    return None if folder is None else hub_model(Path(folder))


def _backbone(backbone: Backbone) -> dict[str, str]:
    described = {**backbone.describe(), **backbone.fingerprint()}
    # Where the folder lies on this machine is nobody's business.
    return {**described, "name": Path(described["name"]).name} if Path(described["name"]).is_dir() else described


def check_request(adapter: Adapter, stage: int | None, *, merge: bool, dtype: str | None) -> None:
    """What can be refused before a model is loaded.

    Raises:
        UserError: The stage is the base, the adapter does not merge, or a dtype is given for nothing.
    """
    kind = type(adapter).__name__
    if stage == 0:
        raise UserError(
            "residency export --stage 0",
            why="stage 0 is the pretrained model, which is there already",
            fix="give --stage 1 or higher",
        )
    if merge and "mergeable" not in adapter.provides:
        raise UserError(
            f"residency export --merge of {kind}",
            why="its effect cannot be written as a change of the backbone's own weights",
            fix="export without --merge",
        )
    if dtype is not None and not merge:
        raise UserError(
            f"residency export --dtype {dtype} without --merge",
            why="an adapter is written as it was trained; only merged weights are rounded",
            fix="add --merge, or leave out --dtype",
        )


def _recorded(folder: RunFolder, place: Path, stage: int) -> Means:
    record = folder.completed(place)
    if record is None:
        raise UserError(
            f"stage {stage} of {folder.path} is trained, but was not scored",
            why="the model card holds its scores",
            fix="run the command that began the run again; it goes on where it was stopped",
        )
    found: Means = record["means"]
    return found


def _base(folder: RunFolder) -> Means:
    record = folder.completed(folder.stage(0, "base"))
    found: Means = {} if record is None else record["means"]
    return found

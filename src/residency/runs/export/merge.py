"""Several exported stages as one: LoRA exports by PEFT's `add_weighted_adapter`, whole models by its merge utilities.

Of whole models what is merged are task vectors tau_i = theta_i - theta_0, tensor by tensor, in float32:

    task_arithmetic   theta_0 + sum_i w_i tau_i                       Ilharco et al. 2023 (arXiv:2212.04089)
    ties              trimmed, signs elected, mean of what agrees     Yadav et al. 2023 (arXiv:2306.01708)
    dare_linear, dare_ties   entries dropped at random, the rest scaled up    Yu et al. 2024 (arXiv:2311.03099)
    magnitude_prune   the largest entries of each, added
    slerp             theta_0 + on the arc from tau_1 to tau_2
    linear            sum_i w_i theta_i                               Wortsman et al. 2022 (arXiv:2203.05482)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import merge_utils
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from residency.backbones import CausalLM
from residency.core.environment import versions
from residency.core.errors import UserError
from residency.core.folders import replace_folder
from residency.core.tensor_files import read_json, write_json
from residency.core.types import untyped
from residency.mitigations.merging.slerp import slerp
from residency.runs.export.export import MARKER
from residency.runs.export.model_card import merge_card

__all__ = ["ADAPTER_METHODS", "MODEL_METHODS", "Recipe", "merge_exports", "merge_tensors"]

ADAPTER_METHODS: tuple[str, ...] = ("linear", "svd", "cat", "ties", "ties_svd", "dare_linear", "dare_linear_svd")
ADAPTER_METHODS += ("dare_ties", "dare_ties_svd", "magnitude_prune", "magnitude_prune_svd")
"""Of LoRA exports, as PEFT calls them; `svd` and `cat` add the updates exactly (`svd` up to its rank)."""
MODEL_METHODS = ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "magnitude_prune", "slerp")
"""Of whole models."""

# Of a LoRA: what `add_weighted_adapter` would leave out without a word.
_LEFT_OUT = ("use_dora", "use_rslora", "lora_bias", "modules_to_save", "trainable_token_indices")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How exports become one.

    Args:
        method: One of `ADAPTER_METHODS` (LoRA exports) or `MODEL_METHODS` (whole models).
        weights: One per export; `None` = 1/n each. Of `slerp` the second one is the place on the arc, 0 to 1.
        density: Share of entries that `ties`, `dare_*` and `magnitude_prune` keep, in (0, 1).
        seed: Of what `dare_*` drops.
        rank: Of the result of `*svd`; `None` = the largest of the exports.
    """

    method: str
    weights: Sequence[float] | None = None
    density: float = 0.5
    seed: int = 0
    rank: int | None = None

    def weights_of(self, count: int) -> list[float]:
        """One factor per export.

        Raises:
            UserError: Their number is another.
        """
        if self.weights is None:
            return [1 / count] * count
        if len(self.weights) != count or (self.method == "slerp" and count != 2):
            raise UserError(
                f"{len(self.weights)} weights for {count} exports, method {self.method}",
                why="every export has a factor, and an arc has two ends",
                fix="give one number per export (two exports for slerp)",
            )
        return [*self.weights]


def merge_exports(
    folders: Sequence[str | Path],
    output: str | Path,
    *,
    recipe: Recipe,
    base: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Merge exported stages of one base model into a new export.

    Args:
        folders: As `export` has written them, at least two: all LoRA adapters, or all whole models.
        output: Folder to write.
        recipe: Method and factors.
        base: The base model, as in `model.backbone.path` of the runs; `None` = the hub id that the exports name.
        overwrite: Whether an earlier export there may be replaced.

    Returns:
        What residency.json holds, and `path`. It has no scores: nobody has measured the result yet.

    Raises:
        UserError: The exports do not belong together, or the method is not for them.
    """
    paths = [Path(folder) for folder in folders]
    facts = [_facts(path) for path in paths]
    _check(paths, facts, recipe)
    weights = recipe.weights_of(len(paths))
    backbone = CausalLM(path=_base(facts, base))
    if facts[0]["backbone"].get("weights") not in (None, backbone.fingerprint()["weights"]):
        raise UserError(
            f"the base {base or backbone.path} has other weights than the exports were trained from",
            why="what is merged are differences from the base",
            fix="give the model that residency.json names as `backbone` with --base",
        )
    merge = _merge_adapters if facts[0]["format"] == "peft" else _merge_models
    with replace_folder(Path(output), overwrite=overwrite, marker=MARKER) as temporary:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            merge(backbone.load(), paths, temporary, recipe, weights)
        AutoTokenizer.from_pretrained(paths[0]).save_pretrained(temporary)
        told = _told(facts, recipe, weights)
        write_json(temporary / MARKER, told)
        (temporary / "README.md").write_text(merge_card(told), encoding="utf-8")
    return {**told, "path": str(output)}


def _facts(path: Path) -> dict[str, Any]:
    if not (path / MARKER).is_file():
        raise UserError(
            f"{path} is no export (no {MARKER})",
            why="only of an export is it known which base it was trained from",
            fix="`residency export RUN --stage K` first; it names the folder",
        )
    facts: dict[str, Any] = read_json(path / MARKER)
    return facts


def _check(paths: Sequence[Path], facts: Sequence[Mapping[str, Any]], recipe: Recipe) -> None:
    kinds = {one["format"] for one in facts}
    bases = {one["backbone"].get("weights") for one in facts}
    if len(paths) < 2 or len(kinds) > 1 or len(bases) > 1:
        raise UserError(
            f"{len(paths)} exports, written as {', '.join(sorted(kinds))}, of {len(bases)} base models",
            why="two or more adapters, or two or more whole models, of one base can be merged",
            fix="export all stages in the same way (with or without --merge)",
        )
    known = ADAPTER_METHODS if kinds == {"peft"} else MODEL_METHODS if kinds == {"transformers"} else ()
    if recipe.method not in known:
        raise UserError(
            f"--method {recipe.method} of exports written as {kinds.pop()}",
            why="PEFT merges LoRA adapters; everything else is merged as whole models",
            fix=f"use one of {', '.join(known)}" if known else "export the stages with --merge first",
        )
    if not 0 < recipe.density < 1:
        raise UserError(f"--density {recipe.density}", why="it is the share that is kept", fix="give 0 < density < 1")
    for path in paths if kinds == {"peft"} else ():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        held = [name for name in _LEFT_OUT if config.get(name)]
        if config["peft_type"] != "LORA" or held or config.get("bias", "none") != "none":
            raise UserError(
                f"{path} is {config['peft_type']}{f' with {held}' if held else ''}",
                why="PEFT's add_weighted_adapter would merge the factors of a LoRA and leave the rest out",
                fix="export the stages with --merge, and merge the whole models",
            )


def _base(facts: Sequence[Mapping[str, Any]], base: str | None) -> str:
    if base is not None:
        return base
    hub = facts[0].get("hub") or {}
    if "id" not in hub:
        raise UserError(
            "the exports name no model of a hub as their base",
            why="they were trained from a folder, which may lie elsewhere by now",
            fix="give it with --base",
        )
    return str(hub["id"])


def _merge_adapters(
    model: nn.Module, paths: Sequence[Path], output: Path, recipe: Recipe, weights: Sequence[float]
) -> None:
    names = [f"export{k}" for k in range(len(paths))]
    tuned: Any = PeftModel.from_pretrained(untyped(model), paths[0], adapter_name=names[0])
    for name, path in zip(names[1:], paths[1:], strict=True):
        tuned.load_adapter(path, adapter_name=name)
    density = recipe.density if any(part in recipe.method for part in ("ties", "dare", "prune")) else None
    torch.manual_seed(recipe.seed)  # here: making adapters draws, too
    tuned.add_weighted_adapter(
        names, list(weights), "merged", combination_type=recipe.method, density=density, svd_rank=recipe.rank
    )
    tuned.save_pretrained(output, selected_adapters=["merged"])
    for file in (output / "merged").iterdir():
        file.rename(output / file.name)
    (output / "merged").rmdir()
    config = json.loads((paths[0] / "adapter_config.json").read_text(encoding="utf-8"))
    written = json.loads((output / "adapter_config.json").read_text(encoding="utf-8"))
    place = {key: config.get(key) for key in ("base_model_name_or_path", "revision")}
    write_json(output / "adapter_config.json", {**written, **place})


def _merge_models(
    model: nn.Module, paths: Sequence[Path], output: Path, recipe: Recipe, weights: Sequence[float]
) -> None:
    start = {name: p.detach() for name, p in model.named_parameters()}
    tuned = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
    states = [{name: p.detach() for name, p in one.named_parameters()} for one in tuned]
    torch.manual_seed(recipe.seed)
    for name, live in tuned[0].named_parameters():
        # A head that was untied from the embeddings is not in the base; it began as they did.
        origin = start.get(name, start.get("model.embed_tokens.weight"))
        if origin is None or any(name not in state or state[name].shape != origin.shape for state in states):
            raise UserError(f"the exports differ in {name}", why="they are no models of one shape", fix="export again")
        vectors = [state[name].float() - origin.float() for state in states]
        live.copy_(origin.float() + merge_tensors(vectors, recipe, weights))
    tuned[0].save_pretrained(output)


def merge_tensors(vectors: Sequence[Tensor], recipe: Recipe, weights: Sequence[float]) -> Tensor:
    """One task vector of several.

    Args:
        vectors: tau_i, equal shapes, float32.
        recipe: Method, density.
        weights: w_i. `linear` is `task_arithmetic` with factors that are scaled to a sum of 1.
    """
    factors = torch.tensor(weights, dtype=vectors[0].dtype)
    if recipe.method == "slerp":
        return slerp(vectors[0], vectors[1], alpha=weights[1])
    if recipe.method in ("linear", "task_arithmetic"):
        scaled = factors / factors.sum() if recipe.method == "linear" else factors
        added: Tensor = merge_utils.task_arithmetic(list(vectors), scaled)
        return added
    combine: Callable[..., Tensor] = getattr(merge_utils, recipe.method)
    return combine(list(vectors), factors, recipe.density)


def _told(facts: Sequence[Mapping[str, Any]], recipe: Recipe, weights: Sequence[float]) -> dict[str, Any]:
    kept = ("backbone", "hub", "format", "licences")
    sources = [{"name": one["name"], "stage": one["stage"], "domain": one["domain"]} for one in facts]
    how = {"method": recipe.method, "weights": list(weights), "density": recipe.density, "seed": recipe.seed}
    licences: dict[str, Any] = {}
    for one in facts:
        licences |= one["licences"]
    found = {key: facts[0].get(key) for key in kept} | {"licences": licences}
    return {**found, "merged_from": sources, "merge": how, "scores": {}, "versions": versions()}

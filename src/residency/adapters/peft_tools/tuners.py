"""What each tuner of PEFT can promise here, and which cannot work, each with its reason.

PEFT does not say any of this itself. Every entry was found by trying: `tests/adapters/test_composition.py` tries again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from peft import PeftConfig

from residency.core.errors import UserError
from residency.core.types import Capability

__all__ = ["capabilities", "check_config", "check_quantised", "kind_of"]

# Initialisations that write into the frozen weight: with the adapter off, the model is not the base any more.
_BASE_CHANGING = ("pissa", "olora")
# The effect on the model is linear in these parameters, so their mean is the mean of the effects.
_LINEAR = frozenset(
    {"IA3", "LN_TUNING", "BEFT", "FOURIERFT", "WAVEFT", "SHIRA", "C3A", "MISS", "TINYLORA", "FROD", "SUPERTUNING"}
    | {"TRAINABLE_TOKENS", "PROMPT_TUNING", "PREFIX_TUNING", "CARTRIDGE"}
)
_VIRTUAL_TOKENS = frozenset({"PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"})
# Not a change of weights, or one to a bias that the base does not have.
_UNMERGEABLE = _VIRTUAL_TOKENS | {"ADAPTION_PROMPT", "BEFT"}
# Read the base's weight as a matrix of numbers. UniLoRA trains on a quantised base, and does not act on it.
_FULL_PRECISION_ONLY = frozenset(
    {"ADAMSS", "DEFT", "DELORA", "FROD", "GLORA", "HRA", "LOHA", "LOKR", "OSF", "PEANUT", "PSOFT", "SUPERTUNING"}
    | {"TINYLORA", "UNILORA"}
)
_FULL_PRECISION_INITS = (*_BASE_CHANGING, "orthogonal", "mica")
# BD-LoRA becomes plain LoRA there, without a word.
_FULL_PRECISION_OPTIONS = ("velora_config", "use_bdlora")

# What makes LoRA more, or something else, than two factors per linear layer. MiCA trains one of the two.
_MORE_THAN_FACTORS = (
    *("use_dora", "use_bdlora", "lora_bias", "modules_to_save", "trainable_token_indices"),
    *("target_parameters", "velora_config"),
)

_LORA = "configs/adapter/lora.yaml"
_TASK_ID = "its forward must be told which task every row belongs to, and rows here do not say"
_LOSS_INSIDE = "a part of its loss is computed inside its forward, from labels; here the objective computes the loss"

_REFUSED: dict[str, tuple[str, str]] = {
    "ADALORA": (
        "its rank budget follows a schedule over one training run of known length, and a stream is several",
        f"use {_LORA}, or give single layers other ranks with rank_pattern of peft.LoraConfig",
    ),
    "CPT": (_LOSS_INSIDE, "use configs/adapter/prompt_tuning.yaml"),
    "LILY": (
        "its router averages over the whole batch, so the score of a row depends on its neighbours",
        "use configs/adapter/randlora.yaml or configs/adapter/gralora.yaml",
    ),
    "MULTITASK_PROMPT_TUNING": (_TASK_ID, "use configs/adapter/prompt_tuning.yaml"),
    "OSF": (
        "it is wrapped anew for every domain, which is a class of its own",
        "use configs/adapter/osf.yaml (residency.adapters.OSF)",
    ),
    "POLY": (_TASK_ID, f"use {_LORA}"),
    "SHADOW": (_LOSS_INSIDE, f"use {_LORA}"),
    "XLORA": ("it mixes adapters that were trained before, and a stream begins with none", f"use {_LORA}"),
}

_NEEDS_DATA = "it is drawn from a pass over the data before attaching; without that PEFT silently starts plain LoRA"
_NO_BASE = "neither its start nor the model with the adapter off is the pretrained one, so row 0 could not be scored"
_PISSA = "use configs/adapter/pissa.yaml or configs/adapter/olora.yaml"

_REFUSED_INITS: dict[str, tuple[str, str]] = {
    "corda": (_NEEDS_DATA, _PISSA),
    "eva": (_NEEDS_DATA, "use configs/adapter/orthogonal.yaml or configs/adapter/pissa.yaml"),
    "loftq": (_NO_BASE, "use configs/backbone/qlora.yaml for LoRA on a quantised base"),
    "lora_ga": (_NEEDS_DATA, _PISSA),
}

_REFUSED_OPTIONS: dict[str, tuple[Callable[[Any], bool], str, str]] = {
    "alora_invocation_tokens": (
        bool,
        "it switches on once per row of a batch, and a packed row holds several examples",
        f"remove it, or use {_LORA}",
    ),
    "arrow_config": (bool, "it routes between adapters that were trained before", f"remove it, or use {_LORA}"),
    "kasa_config": (bool, _NO_BASE, _PISSA),
    "layer_replication": (bool, _NO_BASE, "remove it"),
    "monteclora_config": (
        bool,
        "its random draws lie in buffers that no checkpoint holds, so a run could not be resumed exactly",
        f"remove it, or use {_LORA}",
    ),
    "use_qalora": (bool, "it needs a GPTQ base; on any other PEFT silently trains plain LoRA", "set it to false"),
    "velora_config": (
        lambda given: given.init_type == "batch_average_once",
        "whether its first batch has been seen is not in any checkpoint",
        "set velora_config.init_type to random or batch_average",
    ),
}


def kind_of(config: PeftConfig) -> str:
    """The `PeftType` as a string."""
    return str(getattr(config.peft_type, "value", config.peft_type))


def check_config(config: PeftConfig) -> None:
    """Refuse what cannot train here.

    Raises:
        UserError: With the reason, and what to use instead.
    """
    name = type(config).__name__
    if (refused := _REFUSED.get(kind_of(config))) is not None:
        raise UserError(f"adapter config {name}", why=refused[0], fix=refused[1])
    if (refused := _REFUSED_INITS.get(_init(config))) is not None:
        raise UserError(f"{name} with init_lora_weights {_init(config)}", why=refused[0], fix=refused[1])
    for option, (wrong, why, fix) in _REFUSED_OPTIONS.items():
        given = getattr(config, option, None)
        if given and wrong(given):
            raise UserError(f"{name} with {option}", why=why, fix=fix)


def check_quantised(config: PeftConfig) -> None:
    """Refuse what does not act on 4-bit or 8-bit weights.

    Raises:
        UserError: Naming what does.
    """
    init = _init(config)
    option = next((name for name in _FULL_PRECISION_OPTIONS if getattr(config, name, None)), "")
    if not option and kind_of(config) not in _FULL_PRECISION_ONLY and not init.startswith(_FULL_PRECISION_INITS):
        return
    what = option or (f"init_lora_weights {init}" if init else "")
    raise UserError(
        f"{type(config).__name__}{what and f' with {what}'} on a quantised backbone",
        why="it computes with the base's weights as numbers, and they are stored as 4-bit or 8-bit codes",
        fix="set model.backbone.quantisation to null, or use configs/adapter/lora.yaml, dora.yaml or oft.yaml on it",
    )


def capabilities(config: PeftConfig) -> frozenset[Capability]:
    """What a PEFT config can promise (spec/adapters 1.3)."""
    kind, init = kind_of(config), _init(config)
    found: set[Capability] = {"fixed_coordinates"}
    # A trained bias is the base's own: switching the adapter off leaves it changed.
    if not init.startswith(_BASE_CHANGING) and getattr(config, "bias", "none") == "none":
        found.add("reference")
    if _averages(config, kind):
        found.add("averageable")
    if _is_plain_lora(config):
        found.add("linear")
    plain = init != "mica" and getattr(config, "bias", "none") == "none"
    if kind == "LORA" and plain and not any(getattr(config, option, None) for option in _MORE_THAN_FACTORS):
        found.add("low_rank")
    if kind not in _UNMERGEABLE and not getattr(config, "lora_bias", False):
        found.add("mergeable")
    # PEFT repeats a base-changing initialisation when it loads; a drawn one comes out differently.
    if not init.startswith("pissa_niter"):
        found.add("exportable")
    return frozenset(found)


def _is_plain_lora(config: PeftConfig) -> bool:
    # DoRA rescales whole rows; BD-LoRA's factors are stored as blocks; MiCA trains one of the two.
    plain = kind_of(config) == "LORA" and _init(config) != "mica"
    return plain and not any(getattr(config, option, None) for option in ("use_dora", "use_bdlora"))


def _averages(config: PeftConfig, kind: str) -> bool:
    if kind == "LORA":
        return not getattr(config, "use_bdlora", None)  # its factors are stored as blocks
    if kind == "SUPERTUNING" and getattr(config, "r", None):
        return False  # a product of two factors beside the sparse part
    return kind in _LINEAR and not getattr(config, "prefix_projection", False)


def _init(config: PeftConfig) -> str:
    """The initialisation of LoRA, lower case; empty for the standard one and for other tuners."""
    init = getattr(config, "init_lora_weights", True)
    return init.lower() if isinstance(init, str) else ""

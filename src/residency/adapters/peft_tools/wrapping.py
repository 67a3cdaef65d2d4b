"""How a tuner of PEFT is put around a model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn

from residency.adapters.peft_tools.tuners import check_quantised, kind_of
from residency.backbones.kernels.lora import fuse_lora
from residency.core.errors import UserError
from residency.core.types import untyped

__all__ = ["expected_remarks", "is_quantised", "task_of", "wrap"]

_EXPECTED = (
    ".*is_gradient_checkpointing.*",  # PEFT asks transformers for a property that has been renamed
    ".*cannot merge the BEFT adapter.*",  # which the capabilities say
    ".*Failed to load the CUDA extension.*",  # BOFT has a slower way without it, and says what it sets for it
    ".*Setting boft_n_butterfly_factor to 1.*",
    ".*Unsupported layer type.*Norm.*",  # LN tuning only asks for the sizes of the layer
)


def wrap(model: nn.Module, config: PeftConfig, *, name: str = "default") -> nn.Module:
    """Attach a PEFT tuner under a name; does nothing to a model that has one.

    Raises:
        UserError: The tuner does not fit the model, its layers or its quantisation.
    """
    if isinstance(model, PeftModel):
        result: nn.Module = model
        return result
    if is_quantised(model):
        check_quantised(config)
    # A copy: PEFT writes the base model's name and the resolved targets into the config it is given.
    config = copy.deepcopy(config)
    config.task_type = config.task_type or task_of(model)
    if hasattr(config, "modules_to_save") and (drawn := getattr(model, "drawn_modules", ())):
        # Parts of a classifier that no checkpoint has; PEFT itself adds its output layer.
        config.modules_to_save = [*(config.modules_to_save or ()), *drawn]
    if kind_of(config) == "FROD":
        # torch's default, said aloud: it warns about FRoD's sparse matrices otherwise.
        torch.sparse.check_sparse_tensor_invariants.disable()
    try:
        with expected_remarks():
            wrapped = get_peft_model(untyped(model), config, adapter_name=name)
        fuse_lora(wrapped)
        result = wrapped
        return result
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(
            f"PEFT refuses {type(config).__name__} on {type(model).__name__}: {error}",
            why="the tuner does not fit this model, its layers or its quantisation",
            fix="correct model.adapter.config (often target_modules), or use configs/adapter/lora.yaml",
        ) from error


def task_of(model: nn.Module) -> str:
    """PEFT's name for what a model does: it decides how virtual tokens are put in front, and what an export says."""
    if type(model).__name__.endswith("ForSequenceClassification"):
        return "SEQ_CLS"
    config = getattr(model, "config", None)
    return "SEQ_2_SEQ_LM" if getattr(config, "is_encoder_decoder", False) else "CAUSAL_LM"


@contextmanager
def expected_remarks() -> Iterator[None]:
    """Silence what PEFT and torch remark while a tuner is attached or loaded, and what is known here."""
    with warnings.catch_warnings():
        for message in _EXPECTED:
            warnings.filterwarnings("ignore", message=message)
        yield


def is_quantised(model: nn.Module) -> bool:
    """Whether some weights are stored as integer codes."""
    return any(not p.is_floating_point() for p in model.parameters())

"""A sequence classifier of transformers with one row of its head per label of a stream.

What a checkpoint does not bring (the head of a pretrained model, a pooler) is drawn by name and label from the run's
seed, so that a label begins alike in every stream that has it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.labels import StreamLabels
from residency.backbones.loading import load_config, load_whole
from residency.core.errors import UserError
from residency.core.randomness import seed_of

__all__ = ["head_tensors", "load_classifier"]

_OUTPUTS = ("score", "classifier.out_proj", "classifier")
# Parts of a classifier behind its encoder, and the heads of pretraining, which a classifier leaves out.
_HEAD = re.compile(r"^(score|classifier|pre_classifier|cls|lm_head|vocab_\w+|\w+_predictions)\b|\bpooler\.")


def load_classifier(
    folder: Path, labels: StreamLabels, *, seed: int, new_head: bool, **options: Any
) -> tuple[Any, str]:
    """The classifier of a folder, its output layer replaced by one with a row per label.

    Args:
        folder: As `save_pretrained` writes it: a classifier, or a pretrained model without its head.
        labels: Of the stream.
        seed: Of what is drawn.
        new_head: Draw all rows, also those that the checkpoint has.
        options: Of `from_pretrained`.

    Returns:
        (the model, where the rows come from). Its attribute `drawn_modules` names the modules that were drawn and are
        no output layer: an adapter that freezes the model must train them as well.

    Raises:
        UserError: transformers has no such classifier, weights are missing, or the checkpoint has a head of which no
            label is in the stream.
    """
    from transformers import AutoModelForSequenceClassification

    config = load_config(folder)
    chosen = _class_of(folder, config)
    trained = chosen in (config.architectures or ())

    def head(name: str) -> bool:
        return not trained and _HEAD.search(name) is not None

    model, missing = load_whole(folder, config, chosen, AutoModelForSequenceClassification, options, head=head)
    old = _output(model, chosen)
    own = _own_rows(folder, model.config, labels, new_head=new_head) if trained else {}
    _draw(model, missing, seed)
    _replace_output(model, old, labels, own, seed)
    # Their paths end in a module that an adapter can name: `bert.pooler.dense.weight` is the pooler's.
    outside = {name.split(".pooler.")[0] + ".pooler" if ".pooler." in name else name.split(".")[0] for name in missing}
    model.drawn_modules = sorted({name.rpartition(".")[2] for name in outside} - {"score", "classifier"})
    return model, f"{len(own)} of {len(labels.keys)} rows of the head from the checkpoint, the others drawn"


def head_tensors(model: nn.Module) -> list[Tensor]:
    """Weight and bias of the output layer, (labels, ...), as they train: in the model, or in PEFT's copies of it."""
    owner, _, leaf = str(model.head_path).partition(".")
    inside = re.compile(rf"(^|\.){owner}\.(modules_to_save\.[^.]+\.)?{f'{leaf}.' if leaf else ''}(weight|bias)$")
    return [p for name, p in model.named_parameters() if p.requires_grad and inside.search(name)]


def _path_of(model: nn.Module) -> str:
    """Where the output layer is; empty if there is none that is known."""
    for path in _OUTPUTS:
        try:
            found = model.get_submodule(path)
        except AttributeError:
            continue
        if isinstance(found, nn.Linear):
            return path
    return ""


def _class_of(folder: Path, config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES as NAMES

    chosen = NAMES.get(config.model_type)
    if not isinstance(chosen, str) or getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{folder} holds a model of type {config.model_type}",
            why="transformers has no classifier of one stack for it",
            fix="choose a BERT, RoBERTa, DistilBERT, Llama, Qwen or GPT-2 checkpoint; for T5 use "
            "residency.backbones.Seq2Seq, which scores labels as texts",
        )
    return chosen


def _output(model: nn.Module, chosen: str) -> nn.Linear:
    path = _path_of(model)
    if not path:
        raise UserError(
            f"the head of {chosen}",
            why=f"rows per label are known for heads whose output layer is {', '.join(_OUTPUTS)}",
            fix="choose a BERT, RoBERTa, DistilBERT, Llama, Qwen or GPT-2 checkpoint",
        )
    found = model.get_submodule(path)
    assert isinstance(found, nn.Linear)
    return found


def _own_rows(folder: Path, config: Any, labels: StreamLabels, *, new_head: bool) -> dict[int, int]:
    """{row of the stream's head: row of the checkpoint's} for the labels that both have.

    Raises:
        UserError: There are none, and nobody said that the head may go.
    """
    if new_head:
        return {}
    names: Mapping[Any, str] = config.id2label
    known = {str(name): int(row) for row, name in names.items()}
    found = {row: known[label] for row, (_, label) in enumerate(labels.keys) if label in known}
    if not found:
        wanted = _some(label for _, label in labels.keys)
        raise UserError(
            f"{folder} has a trained head for {_some(known)}, and the stream has {wanted}",
            why="no label is in both, so that nothing of this head would be used",
            fix="write the data's labels as the checkpoint's id2label does, or set model.backbone.init_args.new_head "
            "to true for a head that is drawn",
        )
    return found


def _some(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:4]) + (", ..." if listed[4:] else "")


@torch.no_grad()
def _draw(model: nn.Module, missing: Iterable[str], seed: int) -> None:
    """Values of what no file has: normal weights, norms 1, biases 0."""
    std = float(getattr(model.config, "initializer_range", 0.02))
    for name in missing:
        parameter = model.get_parameter(name)
        if parameter.ndim > 1:
            parameter.copy_(_normal(parameter.shape, std, seed_of(seed, "head", name)))
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)


@torch.no_grad()
def _replace_output(model: Any, old: nn.Linear, labels: StreamLabels, own: Mapping[int, int], seed: int) -> None:
    std = float(getattr(model.config, "initializer_range", 0.02))
    new = nn.Linear(old.in_features, len(labels.keys), bias=old.bias is not None, dtype=old.weight.dtype)
    for row, key in enumerate(labels.keys):
        drawn = _normal(old.weight.shape[1:], std, seed_of(seed, "head", *key))
        new.weight[row] = old.weight[own[row]] if row in own else drawn
        if old.bias is not None:
            new.bias[row] = old.bias[own[row]] if row in own else 0.0
    model.head_path = _path_of(model)
    owner, _, leaf = model.head_path.rpartition(".")
    setattr(model.get_submodule(owner), leaf, new)
    names = dict(enumerate(labels.names))
    model.num_labels = len(names)
    model.config.num_labels = len(names)
    model.config.id2label, model.config.label2id = names, {name: row for row, name in names.items()}
    model.config.problem_type = "single_label_classification"


def _normal(shape: Any, std: float, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * std

"""A language model from a folder: every weight from its files, or one sentence why not."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from residency.backbones.checkpoint_files import check_files, check_weights
from residency.core.errors import UserError

__all__ = [
    "check_tokenizer",
    "load_causal",
    "load_config",
    "load_seq2seq",
    "load_tokenizer",
    "load_whole",
    "longest_text",
    "quiet_transformers",
]

# Their frequencies change with the longest text of a batch, once it is longer than this key of the config says.
_CHANGING_POSITIONS = {"dynamic": "max_position_embeddings", "longrope": "original_max_position_embeddings"}
_WITHOUT_POSITIONS = 1_000_000
_SEQ2SEQ = {
    "t5": "T5ForConditionalGeneration",
    "mt5": "MT5ForConditionalGeneration",
    "umt5": "UMT5ForConditionalGeneration",
}


def load_causal(folder: Path, **options: Any) -> Any:
    """The model of a folder as transformers builds it, on the CPU.

    Args:
        folder: As `save_pretrained` writes it.
        options: Of `from_pretrained`.

    Raises:
        UserError: It is no causal language model, needs code from elsewhere, has weights in pickles only, or has
            weights that are missing, unknown or of another shape.
    """
    from transformers import AutoModelForCausalLM

    config = load_config(folder)
    model, _ = load_whole(folder, config, _causal_class(folder, config), AutoModelForCausalLM, options)
    _check_tied(folder, model)
    return model


def load_seq2seq(folder: Path, **options: Any) -> Any:
    """The encoder-decoder of a folder as transformers builds it, on the CPU.

    Args:
        folder: As `save_pretrained` writes it.
        options: Of `from_pretrained`.

    Raises:
        UserError: As for a causal one; or it is of another family than T5's.
    """
    from transformers import AutoModelForSeq2SeqLM

    config = load_config(folder)
    chosen = _SEQ2SEQ.get(config.model_type)
    stored = next(iter(config.architectures or ()), chosen)
    if chosen is None or stored != chosen:
        raise UserError(
            f"{folder} holds {stored or config.model_type}, {_kind(stored or config.model_type, config)}",
            why=f"Seq2Seq trains and scores {', '.join(_SEQ2SEQ.values())}: others begin their texts otherwise, or "
            "have no decoder",
            fix="choose a T5, FLAN-T5, mT5 or UMT5 checkpoint; for a decoder use residency.backbones.CausalLM",
        )
    # transformers says of every T5 that head and embedding are one tensor; a head of its own that the files hold is
    # loaded, and saved again, as one of its own all the same.
    return load_whole(folder, config, chosen, AutoModelForSeq2SeqLM, options)[0]


def load_whole(
    folder: Path,
    config: Any,
    chosen: str,
    loader: Any,
    options: dict[str, Any],
    *,
    head: Callable[[str], bool] = lambda name: False,
) -> tuple[Any, list[str]]:
    """A model with every weight from its files, but for those of a head that may be another one.

    Args:
        folder: As `save_pretrained` writes it.
        config: From `load_config`.
        chosen: Name of the class, for messages.
        loader: Of transformers.
        options: Of `from_pretrained`.
        head: Whether a weight of this name may be missing from the files, or be left out of them.

    Returns:
        (model, names of the weights that no file has).

    Raises:
        UserError: As `load_causal`.
    """
    check_files(folder, loader.__name__)
    try:
        with quiet_transformers():
            # Shapes that differ are told with the other weights that do not fit, and refused with them.
            options |= {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
            model, info = loader.from_pretrained(folder, config=config, **options)
    except UserError:
        raise
    except Exception as error:  # transformers and safetensors raise many unrelated types
        raise UserError(
            f"{folder} cannot be loaded as {chosen}: {' '.join(str(error).split())[:300]}",
            why="transformers refuses its files",
            fix="check that config.json and *.safetensors belong together and are complete (download them again)",
        ) from error
    missing = sorted(filter(head, info.get("missing_keys", ())))
    kept = {kind: [key for key in info.get(kind, ()) if not head(key)] for kind in ("missing_keys", "unexpected_keys")}
    check_weights(folder, chosen, {**info, **kept})
    return model, missing


def load_config(folder: Path) -> Any:
    """The config of a folder: a copy, as transformers writes dtype and attention into what it is given (pitfalls H5).

    Raises:
        UserError: It cannot be read, or wants code from elsewhere.
    """
    from transformers import AutoConfig

    path = folder / "config.json"
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(written, dict) and written.get("auto_map"):
            raise UserError(
                f"{path} wants to run code of its own (auto_map)",
                why="a model that brings Python files could do anything on this machine",
                fix="use a copy of the model in an architecture of transformers itself; remove auto_map from "
                "config.json if its model_type is one",
            )
        return copy.deepcopy(AutoConfig.from_pretrained(folder))
    except UserError:
        raise
    except Exception as error:  # KeyError, ValueError, validation errors of the config classes
        raise UserError(
            f"{path}: {' '.join(str(error).split())[:300]}",
            why="transformers cannot read the config of the model",
            fix="check that it is the model's own config.json, and that transformers is new enough for it",
        ) from error


def _causal_class(folder: Path, config: Any) -> str:
    """Name of the class that runs the model; what a checkpoint is decides, not what would load somehow."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    chosen = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    stored = next(iter(config.architectures or ()), None)
    if getattr(config, "is_encoder_decoder", False):
        chosen = None
    names = (chosen,) if isinstance(chosen, str) else tuple(chosen or ())
    if names and (stored is None or stored.lower() in {name.lower() for name in names}):
        return str(stored or names[0])
    kind = _kind(stored or config.model_type, config)
    raise UserError(
        f"{folder} holds {stored or config.model_type}, {kind}",
        why="CausalLM trains and scores causal language models; of another model parts would be missing, and drawn "
        "at random",
        fix="set model.backbone.class_path to residency.backbones.Seq2Seq"
        if stored in _SEQ2SEQ.values()
        else "choose a checkpoint whose `architectures` in config.json ends with ForCausalLM"
        + (f" (for this family {names[0]})" if names else ""),
    )


def _kind(name: str, config: Any) -> str:
    if getattr(config, "is_encoder_decoder", False):
        return "an encoder-decoder (sequence to sequence)"
    if "Classification" in name:
        return "a classifier"
    if "MaskedLM" in name or "PreTraining" in name:
        return "an encoder that fills gaps in texts"
    if hasattr(config, "vision_config") or hasattr(config, "audio_config"):
        return "a model of texts with images or sound"
    return "which is no causal language model"


def _check_tied(folder: Path, model: Any) -> None:
    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if not tied or head is None or table is None or head.weight is table.weight:
        return
    if head.weight.shape != table.weight.shape:
        return  # a head of another width is none that could be tied
    raise UserError(
        f"{folder}: config.json says that head and embedding are one tensor, and the files hold two",
        why="they would be trained apart here, and fall into one when the result is saved and loaded",
        fix='set "tie_word_embeddings": false in its config.json, or remove the head from its files',
    )


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a folder.

    Raises:
        UserError: There is none, or it needs code from elsewhere.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # missing files, missing packages and broken JSON are told by many types
        raise UserError(
            f"{folder} has no tokenizer that can be loaded: {' '.join(str(error).split())[:200]}",
            why="texts become tokens by the model's own tokenizer",
            fix="put tokenizer.json and tokenizer_config.json of the model into the folder",
        ) from error


def check_tokenizer(tokenizer: Any, model: nn.Module) -> None:
    """Every token has a row in the embedding.

    Raises:
        UserError: The tokenizer writes ids that the model cannot read.
    """
    find: Any = getattr(model, "get_input_embeddings", None)
    if find is None or not hasattr(tokenizer, "get_vocab"):
        return
    rows = find().weight.shape[0]
    beyond = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if beyond:
        raise UserError(
            f"model.backbone: the tokenizer has {len(beyond)} tokens without a row in the embedding of {rows}, first "
            f"{beyond[0][1]!r} (id {beyond[0][0]})",
            why="the model cannot read a text with such a token",
            fix="give the tokenizer that belongs to the model, or enlarge the model first: "
            "model.resize_token_embeddings(len(tokenizer)), then save_pretrained",
        )


def longest_text(config: Any) -> int:
    """Most tokens of a text that a model reads as it was made to, each text for itself.

    Positions that are learned end there; with `dynamic` and `longrope` positions the score of a short row would depend
    on whether a longer one is in its batch.
    """
    text = config.get_text_config()
    positions = getattr(text, "max_position_embeddings", None)
    rope = getattr(text, "rope_parameters", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))] if isinstance(rope, dict) else []
    limits = [positions] if isinstance(positions, int) else []
    for kind in kinds:
        key = _CHANGING_POSITIONS.get(str(kind.get("rope_type")))
        limit = None if key is None else kind.get(key, getattr(text, key, None))
        limits += [limit] if isinstance(limit, int) else []
    return min(limits, default=_WITHOUT_POSITIONS)


class quiet_transformers:
    """Hide transformers' progress bars and its report of a load: the user sees our own display and messages."""

    def __enter__(self) -> None:
        from transformers.utils import logging

        self._was_on, self._level = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()

    def __exit__(self, *error: object) -> None:
        from transformers.utils import logging

        logging.set_verbosity(self._level)
        if self._was_on:
            logging.enable_progress_bar()

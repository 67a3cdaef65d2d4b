"""Encoder-decoders of the T5 family: the encoder reads the prompt, the decoder writes the completion.

Raffel et al. 2020 (T5), Xue et al. 2021 (mT5), Chung et al. 2022 (FLAN-T5); the tables of O-LoRA, SAPT and MIGU stand
on T5-large.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from residency.backbones.base import Backbone, Family, Sampling
from residency.backbones.fingerprint import tokenizer_fingerprint, weights_fingerprint
from residency.backbones.generation import seeded
from residency.backbones.loading import load_config, load_seq2seq, load_tokenizer
from residency.backbones.locations import model_folder
from residency.backbones.work import is_checkpointed
from residency.backbones.work_halves import Passed, halves_of
from residency.core.errors import UserError
from residency.core.types import Batch, Layout

__all__ = ["Seq2Seq", "decoder_places"]

_PACKING = "an encoder and a decoder read two texts each, which one row of tokens does not hold"


class Seq2Seq(Backbone):
    """A pretrained encoder-decoder.

    The prompt goes to the encoder, with the end token where the tokenizer writes one behind a text; a completion is
    what the decoder writes, from the model's own start token on. Labels of one prompt, and the two answers of a pair,
    share one pass of the encoder. Batches are padded.

    Args:
        path: A local folder in the format of `save_pretrained`, or a hub id, of a model of type t5, mt5 or umt5.
        revision: Branch, tag or commit of a hub id.
        dtype: Of weights and computation; `auto` = as stored. float16 is not offered: T5's activations overflow in it.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.3 x the time.
    """

    family: ClassVar[Family] = "encoder-decoder"

    def __init__(
        self,
        *,
        path: str,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "auto"] = "float32",
        gradient_checkpointing: bool = False,
    ) -> None:
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing

    @cached_property
    def folder(self) -> Path:
        """Local folder of the model.

        Raises:
            UserError: There is no such folder, or the hub id is neither cached nor reachable.
        """
        return model_folder(self.path, self.revision)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder, which knows how many tokens there are."""
        tokenizer = load_tokenizer(self.folder)
        tokenizer.model_vocabulary = load_config(self.folder).vocab_size
        return tokenizer

    @cached_property
    def _ends(self) -> tuple[tuple[int, ...], int]:
        """What stands behind a prompt in the encoder, and the token before every completion in the decoder."""
        written = self.tokenizer("a").input_ids
        end = self.tokenizer.eos_token_id
        start = load_config(self.folder).decoder_start_token_id
        if start is None:
            raise UserError(
                f"{self.folder}: config.json has no decoder_start_token_id",
                why="the decoder begins every completion with that token",
                fix='add the one it was trained with; for T5 it is the padding token: "decoder_start_token_id": 0',
            )
        return ((end,) if written[-1:] == [end] else ()), int(start)

    def load(self) -> nn.Module:
        """A fresh pretrained model on the CPU.

        Raises:
            UserError: It is no encoder-decoder of the T5 family, or cannot be loaded whole.
        """
        dtype = self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)
        model = load_seq2seq(self.folder, dtype=dtype).eval()
        if self.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        loaded: nn.Module = model
        return loaded

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) logits of the decoder at the positions whose next token is supervised."""
        if batch.layout == "packed":
            raise TypeError(_PACKING)
        end, start = self._ends
        device = batch.input_ids.device
        read, mask = _rows([(*e.prompt, *end) for e in batch.examples], device)
        written, _ = _rows([(start, *b.tokens[:-1]) for e in batch.examples for b in e.branches], device)
        copies = torch.tensor([len(e.branches) for e in batch.examples], device=device)
        run: Any = model
        if _has_virtual_tokens(model):
            # They stand in front of what the encoder reads, and PEFT puts them there in the model's own forward.
            inputs: dict[str, Any] = {"input_ids": read.repeat_interleave(copies, 0)}
        else:
            state = run.get_encoder()(input_ids=read, attention_mask=mask).last_hidden_state
            inputs = {"encoder_outputs": (state.repeat_interleave(copies, 0),)}
        mask = mask.repeat_interleave(copies, 0)
        out = run(**inputs, attention_mask=mask, decoder_input_ids=written, use_cache=False)
        result: Tensor = out.logits[decoder_places(batch)]
        rows = len(mask) if _has_virtual_tokens(model) else len(read)
        at = Passed(encoded=rows, read=read.shape[1], decoded=len(written), written=written.shape[1])
        halves = self.work.known(model, halves_of)
        again = halves.again(at) if model.training and is_checkpointed(model) else 0
        backward = halves.backward(at) + again
        self.work.counted(tokens=batch.tokens, forward=halves.forward(at), backward=backward, out=result)
        return result

    @torch.inference_mode()
    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        layout: Layout = "padded",
    ) -> list[list[int]]:
        """Greedy or drawn completions, without the start and the end token."""
        if not prompts or max_new_tokens < 1:
            return [[] for _ in prompts]
        from transformers import GenerationConfig

        end, start = self._ends
        device = next(model.parameters()).device
        read, mask = _rows([(*prompt, *end) for prompt in prompts], device)
        stop = self.tokenizer.eos_token_id
        how: dict[str, Any] = {"do_sample": False}
        if sampling is not None:
            how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": 1.0}
        settings = GenerationConfig(
            max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=stop, decoder_start_token_id=start, **how
        )
        write: Any = model.generate
        with seeded(sampling, device):
            out = write(input_ids=read, attention_mask=mask, generation_config=settings)
        new = [row[1:] for row in out.tolist()]
        # Every step reads one token per row and, by its keys and values, the states of the encoder.
        at = Passed(encoded=len(read), read=read.shape[1], decoded=len(read), written=out.shape[1] - 1)
        forward = self.work.known(model, halves_of).forward(at)
        self.work.counted(tokens=int(mask.sum()) + sum(map(len, new)), forward=forward, backward=0)
        return [row[: row.index(stop)] if stop in row else row for row in new]

    def packing_problem(self) -> str:
        """Why batches are padded."""
        return _PACKING

    def fingerprint(self) -> dict[str, str]:
        """Hashes of weights and tokenizer, with dtype."""
        return {"weights": self._weights, "dtype": self.dtype, "tokenizer": self._tokens}

    @cached_property
    def _weights(self) -> str:
        return weights_fingerprint(self.folder)

    @cached_property
    def _tokens(self) -> str:
        return tokenizer_fingerprint(self.tokenizer, self.folder)

    def describe(self) -> dict[str, str]:
        """Name, licence and remarks."""
        described = {"name": self.path, "licence": "see the model's card", "remark": "encoder-decoder"}
        return described if self.revision is None else {**described, "revision": self.revision}


def decoder_places(batch: Batch) -> tuple[Tensor, Tensor]:
    """(M,) rows and (M,) positions of the decoder that predict the targets of a padded batch.

    A padded row holds prompt and completion, a row of the decoder the completion alone: its k-th token is predicted at
    position k, behind the start token and the k tokens before it.
    """
    width = batch.input_ids.shape[1]
    prompts = [len(e.prompt) for e in batch.examples for _ in e.branches]
    row, column = batch.target_at // width, batch.target_at % width
    return row, column - torch.tensor(prompts, device=row.device)[row] + 1


def _rows(texts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right with 0, and (rows, T) where they are."""
    width = max(len(text) for text in texts)
    ids = torch.tensor([[*text, *[0] * (width - len(text))] for text in texts], device=device)
    mask = torch.tensor([[1] * len(text) + [0] * (width - len(text)) for text in texts], device=device)
    return ids, mask


def _has_virtual_tokens(model: nn.Module) -> bool:
    config = getattr(model, "active_peft_config", None)
    return bool(getattr(config, "is_prompt_learning", False))

"""Any causal language model of transformers, from a folder or a hub id, or the packaged default."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residency.backbones import packed_attention
from residency.backbones.base import Backbone, Sampling
from residency.backbones.exactness import Subject, Verdict
from residency.backbones.fingerprint import tokenizer_fingerprint, weights_fingerprint
from residency.backbones.generation import greedy
from residency.backbones.kernels.head import bare_head, free_head, head_nll, without_head
from residency.backbones.kernels.lane_choice import Lanes, lanes_for
from residency.backbones.kernels.lanes import run_in_lanes
from residency.backbones.kernels.last_layer import trim_last_layer
from residency.backbones.kernels.layers import fuse_layers
from residency.backbones.kernels.norm import fuse_norms
from residency.backbones.kernels.rotary import fuse_rotary
from residency.backbones.loading import load_causal, load_config, load_tokenizer, longest_text
from residency.backbones.locations import model_folder
from residency.backbones.outline import Outline, outline_causal
from residency.backbones.padded_generation import write
from residency.backbones.quantisation import Quantisation, forbid_repacking, loading_options, refuse_unquantised
from residency.backbones.supervised import supervised_logits, supervised_nll
from residency.backbones.verdicts import settled, verdict_key
from residency.core.errors import UserError
from residency.core.losses import token_nll
from residency.core.types import Batch, Layout

__all__ = ["CausalLM"]

PACKAGED = "packaged"


class CausalLM(Backbone):
    """A pretrained causal language model.

    Args:
        path: `packaged` (SmolLM2-135M-Instruct, a de-quantised 4-bit copy that `residency assets` provides), a local
            folder in the format of `save_pretrained`, or a hub id.
        revision: Branch, tag or commit of a hub id.
        dtype: Of weights and computation; `auto` = as stored.
        quantisation: Store the weights in 4 or 8 bit; `null` = not.
        gradient_checkpointing: Recompute activations in the backward pass: less memory, about 1.3 x the time.
        lanes: On a CPU, in how many parts a packed row is computed at the same time, each with its share of the
            threads; 1 = not in parts, `auto` = 2 where that is exact and pays (plain LoRA and scoring, from 20 million
            parameters and 64 tokens on). Changes the last bits, as the number of threads does.
        attention: `auto` = ours, which reads packed rows, where it is found exact on this model, else the model's own;
            `packed` = ours, refused where it is not exact; `model` = the model's own, and rows are padded.
        tf32: On a GPU, whether float32 products may round their factors to 10 bits (TF32): some 3 to 8 times as fast.
    """

    def __init__(
        self,
        *,
        path: str = PACKAGED,
        revision: str | None = None,
        dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
        quantisation: Quantisation | None = None,
        gradient_checkpointing: bool = False,
        lanes: Lanes = "auto",
        attention: Literal["auto", "packed", "model"] = "auto",
        tf32: bool = False,
    ) -> None:
        if lanes != "auto" and lanes < 1:
            raise UserError(
                f"model.backbone.lanes is {lanes}",
                why="it is in how many parts a packed row is computed at the same time",
                fix="set it to auto, or to 1 to compute a row as a whole",
            )
        self.path = path
        self.revision = revision
        self.dtype = dtype
        self.quantisation = quantisation
        self.gradient_checkpointing = gradient_checkpointing
        self.lanes: Lanes = lanes
        self.attention = attention
        self.tf32 = tf32
        self.verdict: Verdict | None = None
        """What was found on the model that was loaded last."""

    @cached_property
    def folder(self) -> Path:
        """Local folder of the model.

        Raises:
            UserError: There is no such folder, or the hub id is neither cached nor reachable.
        """
        if self.path != PACKAGED:
            return model_folder(self.path, self.revision)
        from residency.core.assets.cache import packaged_model

        return packaged_model()

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer of the folder, which knows how many tokens the model reads at once and how many there are."""
        from transformers import AutoConfig

        tokenizer = load_tokenizer(self.folder)
        config = AutoConfig.from_pretrained(self.folder).get_text_config()
        context = getattr(config, "max_position_embeddings", None)
        if context:
            # The smaller of both: a tokenizer of another model may claim more than this one reads.
            tokenizer.model_max_length = min(tokenizer.model_max_length, context)
        tokenizer.model_vocabulary = config.vocab_size
        return tokenizer

    def load(self) -> nn.Module:
        """A fresh pretrained model on the CPU, with every kernel that was found exact on it.

        Raises:
            UserError: It is no causal language model, or cannot be loaded whole (`residency.backbones.loading`).
        """
        packed_attention.register()
        torch.backends.cuda.matmul.allow_tf32 = self.tf32
        options: dict[str, Any] = {"dtype": self.dtype if self.dtype == "auto" else getattr(torch, self.dtype)}
        if self.quantisation is not None:
            options |= loading_options(self.quantisation)
        model = load_causal(self.folder, **options).eval()
        if self.quantisation is not None:
            refuse_unquantised(model, self.quantisation)
            forbid_repacking(model)
        if self.gradient_checkpointing:
            # transformers renamed the method within 5.x.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        self.verdict = self._examined(model)
        loaded: nn.Module = model
        return loaded

    def outline(self) -> Outline:
        """Its modules without their weights, for estimates."""
        return outline_causal(self.folder, dtype=self.dtype, quantisation=self.quantisation)

    def _examined(self, model: Any) -> Verdict:
        key = verdict_key(self._identity(), self.attention, self.gradient_checkpointing)
        verdict = settled(self._subject(model), key)
        if self.attention == "packed" and not verdict.packed:
            raise UserError(
                f"model.backbone.attention is packed, and on {self.path} {verdict.reason}",
                why="examples in one row would not be independent of each other",
                fix="set model.backbone.attention to auto or model",
            )
        return verdict

    def _subject(self, model: Any) -> Subject:
        own = model.config._attn_implementation

        def attend(ours: bool) -> None:
            model.set_attn_implementation(packed_attention.NAME if ours else own)

        kernels = {"norm": fuse_norms, "rotary": fuse_rotary, "head": free_head}
        kernels |= {} if self.gradient_checkpointing else {"last layer": trim_last_layer}
        whole = copy.copy(self)
        whole.lanes = 1
        return Subject(
            model=model,
            name=f"model.backbone.path={self.path}",
            attention=attend if self.attention != "model" and model._supports_attention_backend else None,
            kernels=kernels | {"layers": fuse_layers},
            logits=whole.logits,
            nll=whole.nll,
            positions=longest_text(model.config),
            vocabulary=model.get_input_embeddings().weight.shape[0],
        )

    def logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M, V) logits; the head is computed at the supervised positions only, which is exact."""
        return self._run(supervised_logits, model, batch)

    def nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M,) nats; memory does not grow with the vocabulary where the model ends with a plain head (checked)."""
        head = bare_head(model)
        if head is None:
            return token_nll(self.logits(model, batch), batch.targets)
        # Behind the lanes: the weights of the head are read once, by all threads.
        with without_head():
            features = self._run(supervised_logits, model, batch)
        return head_nll(features, head.weight, head.bias, batch.targets)

    @torch.inference_mode()
    def target_nll(self, model: nn.Module, batch: Batch) -> Tensor:
        """(M,) nats; where several labels go on from one position, the head is computed there once."""
        return super().target_nll(model, batch) if batch.layout == "padded" else self._run(supervised_nll, model, batch)

    def _run(self, function: Callable[[nn.Module, Batch], Tensor], model: nn.Module, batch: Batch) -> Tensor:
        lanes, leaves = lanes_for(model, batch, self.lanes)
        one = lanes == 1
        out = (
            function(model, batch) if one else run_in_lanes(partial(function, model), batch, lanes=lanes, leaves=leaves)
        )
        self.work.passed(model, batch, out)
        return out

    def generate(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None = None,
        layout: Layout = "padded",
    ) -> list[list[int]]:
        """Greedy or drawn continuations: greedy ones packed without padding where the layout is, others padded."""
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling, "layout": layout}
        written = self._written(model, prompts, **options)
        # Whoever stopped by itself wrote an end token, which is not given back.
        lengths = [[min(len(new) + 1, max_new_tokens)] for new in written]
        padded = not self._writes_packed(layout, sampling)
        self.work.wrote(model, [len(prompt) for prompt in prompts], lengths, padded=padded)
        return written

    def _writes_packed(self, layout: Layout, sampling: Sampling | None) -> bool:
        return layout == "packed" and sampling is None and (self.verdict is None or self.verdict.decodes)

    @torch.inference_mode()
    def _written(
        self,
        model: nn.Module,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        sampling: Sampling | None,
        layout: Layout,
    ) -> list[list[int]]:
        end = self.tokenizer.eos_token_id
        if self._writes_packed(layout, sampling):
            return greedy(model, prompts, end=end, max_new_tokens=max_new_tokens)
        padded = self.verdict is None or self.verdict.pads
        return write(model, prompts, end=end, max_new_tokens=max_new_tokens, sampling=sampling, padded=padded)

    def longest_text(self) -> int:
        """Positions that the model has, or that its texts do not change beyond."""
        return longest_text(load_config(self.folder))

    def packing_problem(self) -> str:
        """Why packed rows are not exact, with nothing but the model's own attention left."""
        return "" if self.verdict is None or self.verdict.packed else self.verdict.reason

    def left_out(self) -> Mapping[str, str]:
        """Kernels that are not exact on the model that was loaded last, and why."""
        return self.verdict.left_out if self.verdict else {}

    def fingerprint(self) -> dict[str, str]:
        """Hashes of weights and tokenizer, with dtype and quantisation."""
        return {**self._identity(), "tokenizer": self._tokens}

    def _identity(self) -> dict[str, str]:
        quantisation = json.dumps(asdict(self.quantisation)) if self.quantisation else "none"
        return {"weights": self._weights, "dtype": self.dtype, "quantisation": quantisation} | (
            {"tf32": "true"} if self.tf32 else {}
        )

    @cached_property
    def _weights(self) -> str:
        return weights_fingerprint(self.folder)

    @cached_property
    def _tokens(self) -> str:
        return tokenizer_fingerprint(self.tokenizer, self.folder)

    def describe(self) -> dict[str, str]:
        """Name, licence and remarks."""
        if self.path == PACKAGED:
            return {
                "name": "SmolLM2-135M-Instruct",
                "licence": "Apache-2.0",
                "remark": "de-quantised 4-bit copy (GGUF Q4), not the original weights",
            }
        remark = f"bitsandbytes {self.quantisation.kind}" if self.quantisation else ""
        described = {"name": self.path, "licence": "see the model's card", "remark": remark}
        return described if self.revision is None else {**described, "revision": self.revision}

"""The pretrained model of a run as a writer, before any stage and without an adapter: what augmentations ask."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from residency.backbones.base import Backbone, Sampling
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.types import Example, Row
from residency.domains.chat import Chat
from residency.domains.template import Template

__all__ = ["Pretrained"]


class Pretrained:
    """Loaded when it is first asked, and never changed.

    Args:
        backbone: What loads and runs it.
        device: Where it runs; asked when it is loaded.
    """

    def __init__(self, *, backbone: Backbone, device: Callable[[], torch.device | str] = lambda: "cpu") -> None:
        self.backbone, self.device = backbone, device
        self.tokens = 0
        self._model: nn.Module | None = None

    @property
    def tokenizer(self) -> Any:
        """Of the backbone."""
        return self.backbone.tokenizer

    def identity(self) -> Mapping[str, str]:
        """Hashes of weights and tokenizer, and the precision."""
        return self.backbone.fingerprint()

    def write(self, request: str, *, max_new_tokens: int, temperature: float, seed: int) -> str | None:
        """What it answers, stripped: by its chat template where it has one. `None` if it went on to the limit, or
        cannot read all of the request.

        Args:
            request: What is asked.
            max_new_tokens: The limit.
            temperature: Logits are divided by it.
            seed: Of this answer: one request, one seed, so that no answer depends on those beside it.

        Raises:
            UserError: The model chooses labels and writes nothing.
        """
        if self.backbone.family == "classifier":
            raise UserError(
                "augment with a classifier as the model of the run",
                why="it chooses labels and writes no text",
                fix="use synonyms or a translation model, or a backbone that writes",
            )
        if (prompt := self._prompt(request)) is None:
            return None
        sampling = Sampling(seed=seed, temperature=temperature)
        (written,) = self.backbone.generate(self._loaded(), [prompt], max_new_tokens=max_new_tokens, sampling=sampling)
        self.tokens += len(prompt) + len(written)
        if len(written) >= max_new_tokens:
            return None
        text: str = self.tokenizer.decode(written, skip_special_tokens=True)
        return text.strip()

    @torch.no_grad()
    def nll(self, example: Example) -> tuple[float, ...]:
        """(branches,) summed negative log-likelihood of the supervised tokens of each branch, in nats."""
        batch = make_batch([example], layout="padded")
        model = self._loaded()
        nll = self.backbone.target_nll(model, batch.to(next(model.parameters()).device)).double().cpu()
        sums = torch.zeros(len(example.branches), dtype=torch.float64).index_add_(0, batch.target_branch, nll)
        self.tokens += len(example)
        return tuple(sums.tolist())

    def release(self) -> None:
        """Give its memory back."""
        self._model = None
        self.backbone.work.take()
        self.backbone.work.renew()

    def _prompt(self, request: str) -> tuple[int, ...] | None:
        """Tokens of a request; `None` if they are more than the model reads. Control tokens in it stay text."""
        row = Row(id="request", prompt=request, completion="", kind="prompt")
        template = Chat() if getattr(self.tokenizer, "chat_template", None) else Template()
        example = template.encode(self.tokenizer, domain="augment", row=row, split="test")
        return None if example.cut_prompt else example.prompt

    def _loaded(self) -> nn.Module:
        if self._model is None:
            self._model = self.backbone.load().to(self.device()).eval()
        return self._model

"""A causal language model with trained vectors in front of its input, in the coordinates of the model without them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Prompted", "shift_positions", "sizes_with_prompt"]


class Prompted(nn.Module):
    """Input [P_t; ...; P_1; E(x)], output the logits of x alone.

    Whoever calls it need not know about the prompts: `logits_to_keep` counts the tokens of x, and generation returns
    x and what follows. Rows may be padded on either side, or packed.

    Args:
        model: A transformers causal language model; its parameters are frozen.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.prompts = nn.ParameterDict()
        self.depth = 0

    @property
    def config(self) -> Any:
        """Of the model."""
        return self.model.config

    def prompt(self) -> Tensor | None:
        """(p depth, D): the newest of the prompts in use first; `None` if none is."""
        names = sorted(self.prompts)[: self.depth]
        return torch.cat([self.prompts[name] for name in reversed(names)]) if names else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        segments: tuple[tuple[int, ...], ...] | None = None,
        logits_to_keep: Tensor | int = 0,
        **options: Any,
    ) -> Any:
        """As the model's own forward.

        Args:
            input_ids: (B, T), or (1, N) packed.
            attention_mask: (B, T); `None` when packed.
            position_ids: Packed only; the padded ones follow from their place.
            segments: Packed only; see `Batch.segments`.
            logits_to_keep: Positions in T or N whose logits are wanted; 0 = all.
            options: Passed on.
        """
        prompt = self.prompt()
        if prompt is None:
            options |= {"logits_to_keep": logits_to_keep} if self._keeps_logits() else {}
            options |= {"segments": segments, "position_ids": position_ids} if segments is not None else {}
            out = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
            if not self._keeps_logits():
                out.logits = _kept(out.logits, logits_to_keep)
            return out
        wanted = torch.arange(input_ids.shape[1], device=input_ids.device)
        wanted = wanted if isinstance(logits_to_keep, int) else logits_to_keep
        if segments is None:
            options |= self._padded(input_ids, attention_mask, prompt)
            wanted = wanted % input_ids.shape[1] + len(prompt)
        else:
            options |= self._packed(input_ids, position_ids, segments, prompt)
            wanted = shift_positions(wanted, segments, by=len(prompt))
        if self._keeps_logits():
            return self.model(**options, logits_to_keep=wanted)
        out = self.model(**options)
        out.logits = out.logits[:, wanted]
        return out

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """(B, T) padded on the left -> (B, T + new)."""
        prompt = self.prompt()
        if prompt is None:
            plain: Tensor = self.model.generate(input_ids=input_ids, attention_mask=attention_mask, **options)
            return plain
        new = self.model.generate(**self._padded(input_ids, attention_mask, prompt), **options)
        return torch.cat([input_ids, new], 1)

    def _embed(self, input_ids: Tensor) -> Tensor:
        embedded: Tensor = self.model.get_input_embeddings()(input_ids)
        return embedded

    def _keeps_logits(self) -> bool:
        return "logits_to_keep" in inspect.signature(self.model.forward).parameters

    def _padded(self, input_ids: Tensor, attention_mask: Tensor | None, prompt: Tensor) -> dict[str, Tensor]:
        embedded = self._embed(input_ids)
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        front = prompt.to(embedded.dtype).expand(len(input_ids), -1, -1)
        seen = mask.new_ones(len(input_ids), len(prompt))
        return {"inputs_embeds": torch.cat([front, embedded], 1), "attention_mask": torch.cat([seen, mask], 1)}

    def _packed(
        self, input_ids: Tensor, position_ids: Tensor | None, segments: tuple[tuple[int, ...], ...], prompt: Tensor
    ) -> dict[str, Any]:
        """A prompt in front of every segment of a packed row."""
        if position_ids is None:
            raise ValueError("a packed row needs position_ids")
        embedded, lengths = self._embed(input_ids)[0], [sum(segment) for segment in segments]
        front = prompt.to(embedded.dtype)
        rows = [part for x in embedded.split(lengths) for part in (front, x)]
        own = torch.arange(len(prompt), device=input_ids.device)
        places = [part for x in position_ids[0].split(lengths) for part in (own, x + len(prompt))]
        return {
            "inputs_embeds": torch.cat(rows)[None],
            "position_ids": torch.cat(places)[None],
            "segments": sizes_with_prompt(segments, by=len(prompt)),
            "attention_mask": None,
        }


def sizes_with_prompt(segments: tuple[tuple[int, ...], ...], *, by: int) -> tuple[tuple[int, ...], ...]:
    """Segments of a packed row when `by` vectors stand in front of each."""
    return tuple((first + by, *branches) for first, *branches in segments)


def shift_positions(at: Tensor, segments: tuple[tuple[int, ...], ...], *, by: int) -> Tensor:
    """Where positions of a packed row are when `by` vectors stand in front of each segment.

    Args:
        at: (M,) positions.
        segments: Of the row without prompts.
        by: Vectors per segment.
    """
    ends = torch.tensor([sum(segment) for segment in segments], device=at.device).cumsum(0)
    return at + by * (torch.bucketize(at, ends, right=True) + 1)


def _kept(logits: Tensor, logits_to_keep: Tensor | int) -> Tensor:
    return logits if isinstance(logits_to_keep, int) else logits[:, logits_to_keep]

"""transformers' own `generate` on many prompts at once: padded on their left, where that changes nothing.

Attention leaves padding out. A state that is carried from token to token takes it in (RWKV, RecurrentGemma), and what
is written then depends on the other prompts, without a word: the model is tried, and such a one gets prompts of one
length at a time.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from residency.backbones.base import Sampling
from residency.backbones.generation import seeded

__all__ = ["leaves_padding_out", "write"]

_LENGTHS, _STEPS = (11, 4, 7), 3
# Relative to the largest logit; rounding stays below 1e-5 in float32, the padding of a state is far above.
_TOLERANCE = {torch.float32: 2e-4, torch.float64: 1e-8}
_LOOSE = 5e-2


@torch.inference_mode()
def write(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    end: int,
    max_new_tokens: int,
    sampling: Sampling | None,
    padded: bool,
) -> list[list[int]]:
    """Greedy or drawn continuations, without the token that ends them.

    Args:
        model: With its adapter.
        prompts: At least one token each.
        end: Ends a continuation.
        max_new_tokens: Most tokens of a continuation.
        sampling: `None` = greedy.
        padded: Whether prompts of several lengths are continued together (ask `leaves_padding_out`).
    """
    how: dict[str, Any] = {"do_sample": False}
    if sampling is not None:
        how = {"do_sample": True, "temperature": sampling.temperature, "top_k": sampling.top_k, "top_p": 1.0}
    how |= {"max_new_tokens": max_new_tokens, "eos_token_id": end, "pad_token_id": end}
    written: dict[int, list[int]] = {}
    with seeded(sampling, next(model.parameters()).device):
        for group in [range(len(prompts))] if padded else _of_one_length(prompts):
            chosen = [prompts[k] for k in group]
            width = max(map(len, chosen))
            new = [row[width:] for row in _generate(model, chosen, **how).tolist()]
            written |= {k: row[: row.index(end)] if end in row else row for k, row in zip(group, new, strict=True)}
    return [written[k] for k in range(len(prompts))]


@torch.inference_mode()
def leaves_padding_out(model: nn.Module, *, vocabulary: int, positions: int) -> bool:
    """Whether rows that are padded on their left are continued as each is alone; tried on three short ones.

    Args:
        model: A causal language model of transformers.
        vocabulary: Token ids are below it.
        positions: Most tokens of a text.
    """
    draw = torch.Generator().manual_seed(0)
    lengths = [max(1, min(length, positions - _STEPS)) for length in _LENGTHS]
    prompts = [torch.randint(min(1, vocabulary - 1), vocabulary, (n,), generator=draw).tolist() for n in lengths]
    try:
        together = _logits(model, prompts)
        alone = torch.cat([_logits(model, [prompt]) for prompt in prompts])
    except (AttributeError, NotImplementedError, RuntimeError, StopIteration, TypeError, ValueError):
        return False  # whoever lets it write is told
    apart = (together - alone).abs().max() / alone.abs().max().clamp_min(1e-9)
    return float(apart) <= _TOLERANCE.get(alone.dtype, _LOOSE)


def _logits(model: nn.Module, prompts: Sequence[Sequence[int]]) -> Tensor:
    """(B, steps, V) behind the prompts and what is written first."""
    steps: dict[str, Any] = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": _STEPS, "min_new_tokens": _STEPS}
    out = _generate(model, prompts, **steps, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1)


def _of_one_length(prompts: Sequence[Sequence[int]]) -> Iterator[Sequence[int]]:
    for length in sorted({len(prompt) for prompt in prompts}):
        yield [k for k, prompt in enumerate(prompts) if len(prompt) == length]


def _generate(model: Any, prompts: Sequence[Sequence[int]], **settings: Any) -> Any:
    from transformers import GenerationConfig

    width, device = max(map(len, prompts)), next(model.parameters()).device

    def rows(values: Sequence[Sequence[int]]) -> Tensor:
        return torch.tensor([[0] * (width - len(row)) + list(row) for row in values], device=device)

    with warnings.catch_warnings():
        # PEFT gives virtual tokens their positions itself, and says so at every step.
        warnings.filterwarnings("ignore", message="Position ids are not supported for parameter efficient tuning")
        return model.generate(
            input_ids=rows(prompts),
            attention_mask=rows([[1] * len(prompt) for prompt in prompts]),
            generation_config=GenerationConfig(**settings),
        )

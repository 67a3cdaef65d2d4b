"""Examples that a model writes itself: prompts drawn from it, completions by it. Pure functions and one pass."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import takewhile

import torch
from torch import Tensor

from residency.backbones.base import Sampling
from residency.core.randomness import seed_of
from residency.core.types import Example, Stage
from residency.mitigations.contract import StageModule

__all__ = ["Shape", "close", "degenerate", "draw_texts", "label", "pack_shapes", "shape_of", "unpack_shapes"]

TOGETHER = 48  # prompts that are continued side by side
LOOPING = 8  # tokens from which a text that repeats itself is called degenerate


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """How the examples of a domain look, as far as their tokens say.

    Args:
        head: Tokens with which every prompt begins (the template's, a start token).
        tail: Tokens with which every prompt ends.
        prompt: Length of the longest prompt.
        completion: Length of the longest completion, its end token included.
    """

    head: tuple[int, ...]
    tail: tuple[int, ...]
    prompt: int
    completion: int


def shape_of(examples: Sequence[Example]) -> Shape:
    """The shape of a domain's examples, at least one. A single prompt has neither head nor tail: it is all both."""
    prompts = list({example.prompt: None for example in examples})
    head: tuple[int, ...] = ()
    tail: tuple[int, ...] = ()
    if len(prompts) > 1:
        room = min(map(len, prompts)) - 1  # something of every prompt is its own
        head = _common(prompts)[:room]
        backwards = _common([prompt[::-1] for prompt in prompts])[: room - len(head)]
        tail = backwards[::-1]
    longest = max(map(len, prompts)), max(len(example.completion) for example in examples)
    return Shape(head=head, tail=tail, prompt=longest[0], completion=longest[1])


def _common(sequences: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    columns = zip(*sequences, strict=False)
    return tuple(column[0] for column in takewhile(lambda column: len({*column}) == 1, columns))


def close(written: Sequence[int], shape: Shape) -> tuple[int, ...] | None:
    """Make a prompt of what the model wrote after the head.

    It ends where the domain's prompts end: at the first tail, or, where there is none, as long as the longest prompt,
    and the tail is added.

    Returns:
        The prompt; `None` if there is nothing between head and tail, or it repeats itself.
    """
    n = len(shape.tail)
    ends = (i for i in range(len(written) - n + 1) if n and tuple(written[i : i + n]) == shape.tail)
    end = next(ends, max(1, shape.prompt - len(shape.head) - n))
    body = tuple(written[:end])
    return None if not body or degenerate(body) else (*shape.head, *body, *shape.tail)


def degenerate(tokens: Sequence[int]) -> bool:
    """Whether a text is empty, or goes round in circles: of eight tokens or more, less than a quarter are different."""
    return not tokens or (len(tokens) >= LOOPING and 4 * len({*tokens}) < len(tokens))


def pack_shapes(shapes: dict[str, Shape]) -> Tensor:
    """Shapes by domain as UTF-8 JSON, (bytes,) uint8."""
    text = json.dumps({domain: asdict(shape) for domain, shape in shapes.items()})
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def unpack_shapes(packed: Tensor) -> dict[str, Shape]:
    """The inverse of `pack_shapes`."""
    found = json.loads(bytes(packed.tolist()) or b"{}")
    return {
        domain: Shape(**{**shape, "head": tuple(shape["head"]), "tail": tuple(shape["tail"])})
        for domain, shape in found.items()
    }


def draw_texts(
    module: StageModule,
    contexts: Sequence[Sequence[int]],
    *,
    length: int,
    stage: Stage,
    domain: str,
    temperature: float,
    top_k: int,
) -> list[list[int]]:
    """One drawn continuation per context, without the end token: a function of (weights, contexts, seed, stage)."""
    texts: list[list[int]] = []
    for part, first in enumerate(range(0, len(contexts), TOGETHER)):
        seed = seed_of(stage.seed, "write", stage.index, domain, part)
        how = Sampling(seed=seed, temperature=temperature, top_k=top_k)
        group = contexts[first : first + TOGETHER]
        texts += module.backbone.generate(module.model, group, max_new_tokens=length, sampling=how)
    return texts


def label(
    module: StageModule, prompts: Iterable[tuple[int, ...]], *, domain: str, length: int
) -> tuple[list[Example], int]:
    """Let the model answer prompts, greedily.

    Args:
        module: In evaluation mode.
        prompts: Equal ones are answered once.
        domain: Whose examples they are to be.
        length: Longest completion, its end token included; a longer answer is cut, as a template cuts it.

    Returns:
        (examples with an answer that is neither empty nor in circles, how many of these were cut).
    """
    different = sorted(dict.fromkeys(prompts), key=len)
    end = module.backbone.tokenizer.eos_token_id
    examples: list[Example] = []
    cut = 0
    for first in range(0, len(different), TOGETHER):
        group = different[first : first + TOGETHER]
        answers = module.backbone.generate(module.model, group, max_new_tokens=length)
        for prompt, answer in zip(group, answers, strict=True):
            if degenerate(answer):
                continue
            cut += len(answer) == length
            completion = (*answer, end)[:length]
            examples.append(
                Example.of(domain=domain, row=f"written {len(examples)}", prompt=prompt, completion=completion)
            )
    return examples, cut

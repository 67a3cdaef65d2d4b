"""Examples -> one batch, packed (no padding) or padded. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch

from residency.types import Batch, Example, Layout

__all__ = ["by_token_budget", "make_batch"]


def make_batch(examples: Sequence[Example], *, layout: Layout) -> Batch:
    """Lay examples out for one forward pass.

    Args:
        examples: At least one; each with at least one prompt and one completion token.
        layout: `packed` puts them side by side in one row; an example's `alternatives` become branches that share
            its prompt. `padded` gives every (example, branch) a row of its own, padded on the right.

    Returns:
        The batch; targets in the order example by example, branch by branch, token by token.
    """
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    return _packed(examples) if layout == "packed" else _padded(examples)


def _branches(example: Example) -> tuple[tuple[int, ...], ...]:
    return (example.completion, *example.alternatives)


def _packed(examples: Sequence[Example]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[tuple[int, ...]] = []
    targets: list[tuple[int, int, int, int]] = []
    for index, example in enumerate(examples):
        prompt, start = len(example.prompt), len(ids)
        ids += example.prompt
        positions += range(prompt)
        for branch, tokens in enumerate(_branches(example)):
            # The first token of every branch is predicted by the last token of the shared prompt.
            at = [start + prompt - 1, *range(len(ids), len(ids) + len(tokens) - 1)]
            targets += [(p, t, index, branch) for p, t in zip(at, tokens, strict=True)]
            # The last token is a target only: nothing follows it, so the model need not read it.
            ids += tokens[:-1]
            positions += range(prompt, prompt + len(tokens) - 1)
        lengths = tuple(len(tokens) - 1 for tokens in _branches(example))
        segments.append((prompt + lengths[0],) if len(lengths) == 1 else (prompt, *lengths))
    return _batch("packed", [ids], [positions], None, segments, targets, examples)


def _padded(examples: Sequence[Example]) -> Batch:
    rows = [(i, b, e.prompt, t) for i, e in enumerate(examples) for b, t in enumerate(_branches(e))]
    width = max(len(prompt) + len(tokens) - 1 for _, _, prompt, tokens in rows)
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    mask: list[list[int]] = []
    targets: list[tuple[int, int, int, int]] = []
    for row, (index, branch, prompt, tokens) in enumerate(rows):
        length = len(prompt) + len(tokens) - 1
        # Padding is id 0 and is told apart by the mask only: in many tokenizers the pad token is the end token.
        ids.append([*prompt, *tokens[:-1], *[0] * (width - length)])
        positions.append([*range(length), *[0] * (width - length)])
        mask.append([1] * length + [0] * (width - length))
        first = row * width + len(prompt) - 1
        targets += [(first + k, t, index, branch) for k, t in enumerate(tokens)]
    segments: list[tuple[int, ...]] = [(len(prompt) + len(tokens) - 1,) for _, _, prompt, tokens in rows]
    return _batch("padded", ids, positions, torch.tensor(mask), segments, targets, examples)


def _batch(
    layout: Layout,
    ids: list[list[int]],
    positions: list[list[int]],
    mask: torch.Tensor | None,
    segments: list[tuple[int, ...]],
    targets: list[tuple[int, int, int, int]],
    examples: Sequence[Example],
) -> Batch:
    at, tokens, example, branch = torch.tensor(targets, dtype=torch.long).T.contiguous().unbind(0)
    return Batch(
        layout=layout,
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        attention_mask=mask,
        segments=tuple(segments),
        target_at=at,
        targets=tokens,
        target_example=example,
        target_branch=branch,
        examples=tuple(examples),
    )


def by_token_budget(examples: Iterable[Example], *, tokens: int) -> Iterator[list[Example]]:
    """Group examples, in order, into lists of at most `tokens` tokens (a longer example is a list by itself)."""
    group: list[Example] = []
    used = 0
    for example in examples:
        if group and used + len(example) > tokens:
            yield group
            group, used = [], 0
        group.append(example)
        used += len(example)
    if group:
        yield group

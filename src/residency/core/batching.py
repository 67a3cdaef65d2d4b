"""Examples -> one batch, packed (no padding) or padded. Pure functions."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby

import torch

from residency.core.types import Batch, Branch, Example, Layout, Segment

__all__ = ["by_token_budget", "make_batch", "own_places", "prefix_tree", "wanted_targets", "wanted_tokens"]

_Tree = tuple[Segment, list[tuple[int, int]], list[list[int]]]

_NOTHING = (Branch(tokens=()),)  # what goes on from a prompt alone


def make_batch(examples: Sequence[Example], *, layout: Layout) -> Batch:
    """Lay examples out for one forward pass.

    Args:
        examples: At least one; each with at least one prompt token. One without a branch is read and has no target.
        layout: `packed` puts them side by side in one row; an example's branches share its prompt and the beginnings
            they have in common. `padded` gives every (example, branch) a row of its own, padded on the right.

    Returns:
        The batch; targets in the order example by example, branch by branch, token by token: the supervised ones.
    """
    if not examples:
        raise ValueError("a batch needs at least one example, got none")
    return _packed(examples) if layout == "packed" else _padded(examples)


def own_places(count: int, batch: Batch) -> list[int]:
    """Which of `count` things that a step has beside its global batch (draws, answers) belong to a micro-batch.

    They are spread over the slots of the global batch, so that the parts of a step have all of them, each once.
    """
    size, own = len(batch.whole.examples), {*batch.whole.slots}
    return [i for i in range(count) if i * size // count in own]


def _packed(examples: Sequence[Example]) -> Batch:
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    targets: list[tuple[int, int, int, int]] = []
    for index, example in enumerate(examples):
        start, prompt, branches = len(ids), len(example.prompt), example.branches or _NOTHING
        # The last token of a branch is a target only: nothing follows it, so the model need not read it.
        inputs = [branch.tokens[:-1] for branch in branches]
        segment, tree, places = prefix_tree(prompt, inputs) if len(branches) > 1 else _single(prompt, inputs[0])
        ids += (*example.prompt, *(token for token, _ in tree))
        positions += (*range(prompt), *(position for _, position in tree))
        segments.append(segment)
        for number, (branch, at) in enumerate(zip(branches, places, strict=True)):
            # The first token of every branch is predicted by the last token of the shared prompt.
            at = [start + prompt - 1, *(start + prompt + k for k in at)]
            targets += _targets(branch, at, index, number)
    return _batch("packed", [ids], [positions], None, segments, targets, examples)


def prefix_tree(length: int, branches: Sequence[tuple[int, ...]]) -> _Tree:
    """What branches share behind a prompt, each shared token once.

    Args:
        length: Tokens of the prompt.
        branches: Tokens of each branch; may be empty or equal.

    Returns:
        The segment of prompt and branches; the (token, position) of everything behind the prompt, in the order of the
        row; and per branch the places of its tokens in that order.
    """
    # A beginning sorts before those that go on from it: this is the order of the row.
    beginnings = sorted({tokens[:k] for tokens in branches for k in range(1, len(tokens) + 1)})
    place = {beginning: k for k, beginning in enumerate(beginnings)}
    tree = [(beginning[-1], length + len(beginning) - 1) for beginning in beginnings]
    places = [[place[tokens[:k]] for k in range(1, len(tokens) + 1)] for tokens in branches]
    return _segment(length, sorted({*branches} - {()}), 0), tree, places


def _single(length: int, tokens: tuple[int, ...]) -> _Tree:
    """`prefix_tree` of one branch, in linear time."""
    tree = list(zip(tokens, range(length, length + len(tokens)), strict=True))
    return (length + len(tokens),), tree, [list(range(len(tokens)))]


def _segment(length: int, branches: Sequence[tuple[int, ...]], depth: int) -> Segment:
    """A run of `length` tokens and the sorted, distinct branches; their first `depth` tokens belong to earlier runs."""
    while branches and branches[0][depth] == branches[-1][depth]:
        length, depth = length + 1, depth + 1
        branches = _longer(branches, depth)
    forks = [_segment(1, _longer(group, depth + 1), depth + 1) for _, group in groupby(branches, lambda t: t[depth])]
    return (length, *(fork if len(fork) > 1 else fork[0] for fork in forks))


def _longer(branches: Iterable[tuple[int, ...]], depth: int) -> list[tuple[int, ...]]:
    return [tokens for tokens in branches if len(tokens) > depth]


def _padded(examples: Sequence[Example]) -> Batch:
    rows = [(i, b, e.prompt, branch) for i, e in enumerate(examples) for b, branch in enumerate(e.branches or _NOTHING)]
    lengths = [len(prompt) + len(branch.tokens[:-1]) for _, _, prompt, branch in rows]
    width = max(lengths)
    ids: list[list[int]] = []
    positions: list[list[int]] = []
    mask: list[list[int]] = []
    targets: list[tuple[int, int, int, int]] = []
    for row, (index, number, prompt, branch) in enumerate(rows):
        length = lengths[row]
        # Padding is id 0 and is told apart by the mask only: in many tokenizers the pad token is the end token.
        ids.append([*prompt, *branch.tokens[:-1], *[0] * (width - length)])
        positions.append([*range(length), *[0] * (width - length)])
        mask.append([1] * length + [0] * (width - length))
        first = row * width + len(prompt) - 1
        targets += _targets(branch, range(first, first + len(branch.tokens)), index, number)
    segments: list[Segment] = [(length,) for length in lengths]
    return _batch("padded", ids, positions, torch.tensor(mask), segments, targets, examples)


def _targets(branch: Branch, at: Sequence[int], example: int, number: int) -> list[tuple[int, int, int, int]]:
    """(position, token, example, branch) of the supervised tokens, given the position that predicts each token."""
    return [(at[k], branch.tokens[k], example, number) for k in branch.supervised]


def _batch(
    layout: Layout,
    ids: list[list[int]],
    positions: list[list[int]],
    mask: torch.Tensor | None,
    segments: list[Segment],
    targets: list[tuple[int, int, int, int]],
    examples: Sequence[Example],
) -> Batch:
    at, tokens, example, branch = torch.tensor(targets, dtype=torch.long).view(-1, 4).T.contiguous().unbind(0)
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


def wanted_tokens(example: Example) -> int:
    """Supervised tokens of an example that a model should write: those of a rejected answer it should not."""
    return sum(len(branch.supervised) for branch in example.branches if branch.role != "rejected")


def wanted_targets(batch: Batch) -> torch.Tensor:
    """(M,) which targets a model should write: not those of a rejected answer."""
    rejected = [[branch.role == "rejected" for branch in example.branches] for example in batch.examples]
    places = zip(batch.target_example.tolist(), batch.target_branch.tolist(), strict=True)
    return torch.tensor([not rejected[e][b] for e, b in places], dtype=torch.bool, device=batch.targets.device)

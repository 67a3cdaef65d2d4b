"""The mask of FlexAttention against the segment kernel: packed rows, branches of branches, windows."""

from __future__ import annotations

import random

import pytest
import torch

from residency.backbones.kernels.flex import attend_flex, block_mask, follows_until, places
from residency.backbones.kernels.segments import segment_mask
from residency.backbones.packed_attention import How, attend_segments
from residency.core.types import Segment, segment_tokens

ROW: tuple[Segment, ...] = ((7,), (3, (2, 1, 1), 2), (5,))


def test_the_ends_of_a_row_by_hand() -> None:
    assert follows_until(ROW).tolist() == [7] * 7 + [16] * 3 + [14, 14, 13, 14, 16, 16] + [21] * 5
    assert places(ROW).tolist() == [*range(7), 0, 1, 2, 3, 4, 5, 5, 3, 4, *range(5)]


def _tree(draw: random.Random, depth: int) -> Segment:
    parts: list[int | Segment] = [draw.randint(1, 6)]
    if depth:
        for _ in range(draw.choice([0, 2, 3])):
            parts.append(_tree(draw, depth - 1) if draw.random() < 0.6 else draw.randint(1, 4))
    return tuple(parts)


def _random_rows() -> list[tuple[Segment, ...]]:
    draw = random.Random(0)
    return [tuple(_tree(draw, 3) for _ in range(draw.randint(1, 4))) for _ in range(40)]


@pytest.mark.parametrize("window", [None, 1, 3])
def test_one_comparison_says_what_the_dense_masks_say(window: int | None) -> None:
    branched = 0
    for row in _random_rows():
        end, place = follows_until(row).long(), places(row).long()
        q, k = torch.arange(len(end))[:, None], torch.arange(len(end))[None, :]
        seen = (k <= q) & (q < end[None, :])
        if window is not None:
            seen &= place[:, None] - place[None, :] < window
        assert torch.equal(seen, torch.block_diag(*(segment_mask(s, window).int() for s in row)).bool())
        branched += any(len(segment) > 1 for segment in row)
    assert branched > 10


# Uncompiled, as here, it computes all pairs, and says so once.
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("row", "window", "heads"),
    [
        (ROW, 3, (4, 4)),
        # Over the borders of the mask's blocks of 128 tokens, with keys that queries share.
        (((130,), (90, (40, 20, 30), 25), (60,)), None, (4, 2)),
        (((130,), (90, (40, 20, 30), 25), (60,)), 50, (4, 2)),
    ],
    ids=["short", "blocks", "blocks and window"],
)
def test_the_forward_is_that_of_the_segment_kernel(
    row: tuple[Segment, ...], window: int | None, heads: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    n = sum(segment_tokens(segment) for segment in row)
    query, key, value = (torch.randn(1, h, n, 16) for h in (heads[0], heads[1], heads[1]))
    how = How(scale=0.3, dropout=0.0, window=window, softcap=None, sinks=None)
    wanted = attend_segments(query, key, value, row, how)
    found = attend_flex(query, key, value, block_mask(row, window=window, device="cpu"), scale=0.3)
    assert (found - wanted).abs().max() <= 1e-5

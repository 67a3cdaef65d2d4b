"""The mask of FlexAttention against the segment kernel: packed rows, branches of branches, windows."""

from __future__ import annotations

import random

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from residency.backbones import packed_attention
from residency.backbones.kernels.flex import attend_flex, attend_row, block_mask, filled, follows_until, places
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


# -- blocks -----------------------------------------------------------------------------------------------------------

LONG: tuple[Segment, ...] = ((300,), (90, (40, 20, 150), 25), (260,), (7,))


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("length", [None, 1024])
def test_no_block_is_left_out_and_none_is_taken_as_a_whole_that_is_not(window: int | None, length: int | None) -> None:
    mask = block_mask(LONG, window=window, device="cpu", length=length)
    tokens = mask.seq_lengths[0]
    # torch's own way: evaluate all pairs.
    dense = create_block_mask(mask.mask_mod, None, None, tokens, tokens, device="cpu")

    def kinds(of: object, counts: str, columns: str) -> list[list[int]]:
        found = getattr(of, counts)[0, 0].tolist(), getattr(of, columns)[0, 0].tolist()
        return [sorted(row[:count]) for count, row in zip(*found, strict=True)]

    whole, some = (("full_kv_num_blocks", "full_kv_indices"), ("kv_num_blocks", "kv_indices"))
    seen = [sorted(a + b) for a, b in zip(kinds(mask, *whole), kinds(mask, *some), strict=True)]
    wanted = [sorted(a + b) for a, b in zip(kinds(dense, *whole), kinds(dense, *some), strict=True)]
    for row, (ours, theirs) in enumerate(zip(seen, wanted, strict=True)):
        assert {*theirs} <= {*ours}, row
        assert {*kinds(mask, *whole)[row]} <= {*kinds(dense, *whole)[row]}, row
    assert sum(map(len, kinds(mask, *whole))) > 0 or window is not None
    assert sum(map(len, seen)) < len(seen) * (len(seen) + 1) // 2, "no block was left out"


def test_rows_are_filled_to_few_lengths() -> None:
    lengths = {filled(n) for n in range(1, 16385)}
    assert all(n <= filled(n) and filled(n) % 128 == 0 for n in range(1, 16385))
    assert max(filled(n) / n for n in range(257, 16385)) <= 1.5
    assert len(lengths) == 14


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("window", [None, 50])
def test_a_filled_row_is_attended_to_like_its_segments(window: int | None) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(1, h, 892, 16) for h in (6, 2, 2))
    assert filled(892) == 1024
    found = attend_row(query, key, value, LONG, window=window, scale=None)
    wanted = attend_segments(query, key, value, LONG, How(window=window))
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_the_kernel_is_tried_before_it_is_used_and_never_used_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, shape = torch.device("cpu"), (torch.float32, 4, 2, 16)
    assert packed_attention._tried_flex(cpu, *shape)
    assert not packed_attention._runs_flex(How(), cpu, *shape)
    packed_attention._tried_flex.cache_clear()
    monkeypatch.setattr(packed_attention, "attend_row", lambda query, *args, **options: query)
    assert not packed_attention._tried_flex(cpu, *shape), "a kernel that gives something else is not used"
    packed_attention._tried_flex.cache_clear()

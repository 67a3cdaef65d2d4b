"""What torch's CPU allocator hands out while something runs, by its profiler: what estimates are held to."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.profiler import ProfilerActivity, profile

__all__ = ["Peak", "held_bytes", "watched_peak"]


class Peak:
    """Bytes beyond what there was at the beginning: `highest` at any time, `end` in the end."""

    highest = 0
    end = 0


@contextmanager
def watched_peak() -> Iterator[Peak]:
    """Sums up what is allocated and freed inside; read it behind the block.

    What is garbage before is collected first: the profiler knows the sizes of blocks from earlier watches, and would
    count their release inside as memory that came free.
    """
    gc.collect()
    found = Peak()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        yield found
    sizes: list[tuple[int, int, int]] = []

    def walk(events: Iterable[Any]) -> None:
        for event in events:
            if event.tag.name == "Allocation" and str(event.extra_fields.device) == "cpu":
                sizes.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
            walk(event.children)

    inner: Any = profiler.profiler
    walk(inner.kineto_results.experimental_event_tree())
    live: dict[int, int] = {}
    for _, size, place in sorted(sizes):
        # Storages that are resized to nothing (FSDP) are freed without a word: their place is given to others.
        before = live.pop(place, 0)
        if size > 0:
            live[place] = size
            found.end -= before
        found.end += size
        found.highest = max(found.highest, found.end)


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Of all storages behind some tensors, each once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())

"""Which pretrained model writes rows for the domains of a run, and what became of those rows: `data.augmented`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from residency.backbones.pretrained import Pretrained
from residency.core.text import printable
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.trainers import Trainers

__all__ = ["cost_of", "lines", "use_base"]

Augmented = Mapping[str, Sequence[Mapping[str, Any]]]
"""{domain: what each method made, as in `Made`}."""


def use_base(module: ContinualModule, data: StreamData, trainers: Trainers) -> Trainers:
    """Let the backbone of a run write for the domains that ask for it, on the device of its Trainers, which come back.

    It writes before the first stage, so without an adapter.
    """
    data.use_base(Pretrained(backbone=module.backbone, device=lambda: trainers.root_device))
    return trainers


def lines(augmented: Augmented) -> Iterator[str]:
    """A sentence per domain and method."""
    for domain, made in augmented.items():
        for one in made:
            why = ", ".join(f"{name} {count:,}" for name, count in sorted(one["dropped"].items()))
            told = f"{printable(domain, 24)}: {one['kept']:,} of {one['asked']:,} rows made by {one['method']}"
            told += f" (dropped: {why})" if why else ""
            yield told + (f"; {one['not_asked']:,} more would be above max_share" if one["not_asked"] else "")


def cost_of(augmented: Augmented, domain: str) -> dict[str, float]:
    """Tokens and seconds that models took to write the rows of a domain; nothing where none did."""
    made = augmented.get(domain, ())
    tokens, seconds = (sum(one[name] for one in made) for name in ("tokens", "seconds"))
    return {"augment_tokens": tokens, "augment_seconds": seconds} if tokens or seconds else {}

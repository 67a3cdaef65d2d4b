"""Tiny streams of labels, and classifiers that have met them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from residency.adapters import Adapter
from residency.backbones import Classifier
from residency.core.batching import make_batch
from residency.core.types import Batch, Example
from residency.domains.stream_data import StreamData
from residency.testing.tiny_runs import domains, make_module

__all__ = ["FAMILIES", "KINDS", "alone", "built", "labelled", "met", "stream", "tokens"]

DRAW = torch.Generator().manual_seed(5)
KINDS = {"a": "label", "b": "label"}
FAMILIES = ["bert", "roberta", "llama"]


def tokens(count: int) -> tuple[int, ...]:
    """Of a text."""
    return tuple(torch.randint(1, 257, (count,), generator=DRAW).tolist())


def stream(folder: Path, kinds: dict[str, str] | None = None, **options: Any) -> StreamData:
    """Two domains of two labels each."""
    return StreamData(domains=domains(folder / "data", kinds or KINDS), batch_size=4, **options)


def met(path: Path, folder: Path, *, learned: int = 2, seed: int = 0, **options: Any) -> Classifier:
    """A classifier that has met the stream of two domains and begun `learned` of them."""
    backbone = Classifier(path=str(path), **options).for_stream(stream(folder)).seeded(seed)
    backbone.learned = learned
    return backbone


def labelled(backbone: Classifier, lengths: tuple[int, ...] = (9, 2, 17, 5)) -> Batch:
    """Prompts of unequal length with labels of both domains; the first with the other label of its domain beside."""
    found = []
    for k, n in enumerate(lengths):
        name, label = ("a", "a even") if k % 2 else ("b", "b odd one")
        one, other = backbone.labels.row(name, label), backbone.labels.row(name, f"{name} even")
        rest = [(other,)] if k == 0 else []
        found.append(Example.of(domain=name, row=str(k), prompt=tokens(n), completion=(one,), alternatives=rest))
    return make_batch(found, layout="padded")


def alone(batch: Batch) -> Batch:
    """Every example with its own label only."""
    return make_batch([example.alone() for example in batch.examples], layout="padded")


def built(folder: Path, place: Path, adapter: Adapter, mitigations: Any = None) -> Any:
    """A module before its first stage."""
    module = make_module(folder, adapter, mitigations or {}, family=Classifier)
    module.backbone = module.backbone.for_stream(stream(place))
    module.build(seed=0)
    return module

"""Train a tiny stream of tiny domains, with the whole machinery of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback

from residency.adapters import Adapter
from residency.backbones import CausalLM
from residency.domains.base import Domain
from residency.domains.jsonl import Jsonl
from residency.domains.stream_data import StreamData
from residency.domains.template import Template
from residency.engine.module import ContinualModule
from residency.engine.stage_overrides import StageOverrides
from residency.engine.trainers import Trainers
from residency.mitigations import Mitigation
from residency.objectives import SFT, Objective
from residency.runs.folder import RunFolder
from residency.runs.stream import StreamSettings, train_stream
from residency.testing.tiny_models import write_domain

__all__ = ["domains", "make_module", "train"]


def domains(folder: Path, kinds: Mapping[str, str] | None = None) -> dict[str, Domain]:
    """Tiny domains `a` (text), `b` (labels), ... as readers."""
    found: dict[str, Domain] = {}
    for name, kind in (kinds or {"a": "generative", "b": "label", "c": "generative"}).items():
        options = write_domain(folder, name, kind=kind)["init_args"]
        found[name] = Jsonl(template=Template(**options.pop("template")), **options)
    return found


def make_module(
    backbone: Path,
    adapter: Adapter,
    mitigations: Mapping[str, Mitigation],
    *,
    objective: Objective | None = None,
    **options: Any,
) -> ContinualModule:
    """A module with SFT and AdamW, weight decay on; `loading` are options of the backbone, `family` is its class."""
    kind = options.pop("optimizer", torch.optim.AdamW)
    optimizer: Any = partial(kind, lr=options.pop("lr", 1e-2), weight_decay=0.1)
    return ContinualModule(
        backbone=options.pop("family", CausalLM)(path=str(backbone), **options.pop("loading", {})),
        adapter=adapter,
        objective=objective or SFT(),
        mitigations=dict(mitigations),
        optimizer=optimizer,
        **options,
    )


def train(
    folder: Path,
    backbone: Path,
    adapter: Adapter,
    mitigations: Mapping[str, Mitigation] | None = None,
    *,
    steps: int = 4,
    seed: int = 0,
    every: int = 2,
    callbacks: Sequence[Callback] = (),
    kinds: Mapping[str, str] | None = None,
    trainer: Mapping[str, Any] | None = None,
    data: Mapping[str, Any] | None = None,
    stages: Mapping[str, StageOverrides] | None = None,
    **options: Any,
) -> tuple[dict[str, Any], ContinualModule]:
    """Run a whole stream of tiny domains; the record and the module at its end."""
    module = make_module(backbone, adapter, mitigations or {}, **options)
    stream = StreamData(**{"domains": domains(folder.parent / "data", kinds), "batch_size": 4, **(data or {})})
    base = {"max_steps": steps, "accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False}
    trainers = Trainers(lambda: {**base, "callbacks": list(callbacks), **(trainer or {})})
    settings = StreamSettings(cell="tiny", seed=seed, checkpoint_every_n_steps=every, stages=stages or {})
    record = train_stream(module=module, data=stream, trainers=trainers, folder=RunFolder(folder), settings=settings)
    return record, module

"""The stream by `residency`: rows, batches, initial values and optimizer of the others; an arm of `lockstep.py`.

    python ours.py MODEL PACKAGES [--peers FOLDER] [--bare] [--mitigation NAME] [options of packaged_rows.py]

`--bare` runs the same step (module, packing, kernels, optimizer) in a plain loop: what remains is the price of
Lightning and of our own hooks. `--mitigation NAME` adds a preset of configs/mitigation. `--peers` takes rows and first
values from the peers' `common.py` instead of `packaged_rows.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import resource
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import residency  # noqa: F401  (before torch: what it sets for its threads and pages is read there)

# isort: split
import torch

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.types import Example, Stage
from residency.engine.checkpointing import History
from residency.engine.fused_optimizer import fuse
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import completion_nll
from residency.engine.stage import finish_stage, train_stage
from residency.engine.trainers import Trainers
from residency.mitigations import Mitigation
from residency.objectives import SFT

RANK = 8


class Rows:
    """What `train_stage` asks of the stream's data: the peers' batches, example by example."""

    def __init__(self, train: dict[str, list[list[tuple[list[int], int]]]], batch: int) -> None:
        self.batch_size = batch
        self.num_workers = 0
        self.found = {
            name: [_example(name, str(i), row) for i, row in enumerate(row for step in steps for row in step)]
            for name, steps in train.items()
        }

    def examples(self, stage: Stage, tokenizer: Any) -> Sequence[Example]:
        """All examples of a stage, in order."""
        return self.found[stage.domain]

    def evaluation_examples(self, *args: Any, **options: Any) -> Sequence[Example]:
        """No rows are held out."""
        return []

    def micro_batch(self, *, devices: int, batch: int | None = None) -> int:
        """Examples per forward pass."""
        return batch or self.batch_size


def _example(domain: str, row: str, encoded: tuple[list[int], int]) -> Example:
    ids, start = encoded
    return Example.of(domain=domain, row=row, prompt=tuple(ids[:start]), completion=tuple(ids[start:]))


def build(options: Any, common: Any, mitigations: dict[str, Mitigation]) -> ContinualModule:
    """The module, with the initial LoRA values that the peers draw."""
    module = ContinualModule(
        backbone=CausalLM(path=options.model),
        adapter=lora(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        objective=SFT(),
        optimizer=partial(torch.optim.AdamW, lr=options.lr, weight_decay=0.01),
        mitigations=mitigations,
    )
    module.build(seed=0)
    _, peer = common.load(options)
    values = {name: p.detach() for name, p in peer.named_parameters() if p.requires_grad}
    module.adapter.load_state(module.model, values)
    return module


def fit(module: ContinualModule, rows: Rows, stage: Stage) -> None:
    """One stage as `residency fit` trains it."""
    options = {"max_steps": stage.steps, "accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False}
    trainers = Trainers(lambda: dict(options))
    history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: None)
    with tempfile.TemporaryDirectory() as folder:
        facts = train_stage(
            module=module,
            data=rows,  # type: ignore[arg-type]
            trainers=trainers,
            stage=stage,
            folder=Path(folder),
            history=history,
            observers=[],
            checkpoint_every_n_steps=0,
        )
        finish_stage(module, facts, device=torch.device("cpu"))


def bare(module: ContinualModule, rows: Rows, stage: Stage) -> None:
    """The same steps without Lightning, hooks, logging and history."""
    examples = rows.examples(stage, None)
    optimizer = fuse(module.adapter.optimizer(module.model, module.optimizer_factory))
    leaves = list(module.adapter.trainable(module.model).values())
    module.model.train()
    for step in range(stage.steps):
        group = examples[step * stage.batch_size : (step + 1) * stage.batch_size]
        batch = module.objective.collate(group, layout=module.layout)
        loss = module.objective(module.trained_forward, batch, None).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(leaves, 1.0, foreach=True)
        optimizer.step()
    module.model.eval()


def score(module: ContinualModule, test: dict[str, list[tuple[list[int], int]]]) -> list[float]:
    """Mean nats per response token on every domain's test rows."""
    found = []
    for name, rows in test.items():
        examples = [_example(name, str(i), row) for i, row in enumerate(rows)]
        weights = torch.tensor([len(e.completion) for e in examples], dtype=torch.float64)
        found.append(float((completion_nll(module, examples) * weights).sum() / weights.sum()))
    return found


def main() -> None:
    """Train the stream, print the last row of the matrix and the peak memory."""
    first = argparse.ArgumentParser(add_help=False)
    first.add_argument("--peers", type=Path)
    first.add_argument("--bare", action="store_true")
    first.add_argument("--mitigation", default="")
    known, rest = first.parse_known_args()
    if known.peers:
        sys.path.insert(0, str(known.peers))
    common = importlib.import_module("common" if known.peers else "packaged_rows")

    options = common.parser(__doc__).parse_args(rest)
    torch.set_num_threads(options.threads)
    backbone = CausalLM(path=options.model)
    _, _, train, test = common.stream(options, backbone.tokenizer)
    module = build(options, common, preset(known.mitigation))
    rows = Rows(train, options.batch)
    for index, name in enumerate(train):
        stage = Stage(
            index=index, domain=name, stages=len(train), seed=0, steps=options.steps, batch_size=options.batch
        )
        (bare if known.bare else fit)(module, rows, stage)
    last = [] if options.no_eval else [score(module, test)]
    peak = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
    print(json.dumps({"tag": "residency", "R": last, "rss_mib": peak}), flush=True)


def preset(name: str) -> dict[str, Mitigation]:
    """A mitigation from its preset, by name; none for an empty name."""
    if not name:
        return {}
    import yaml

    from residency import mitigations

    text = (Path(__file__).parents[2] / "configs" / "mitigation" / f"{name}.yaml").read_text(encoding="utf-8")
    node = yaml.safe_load(text)
    kind = getattr(mitigations, node["class_path"].rpartition(".")[2])
    return {name: kind(**node.get("init_args", {}))}


if __name__ == "__main__":
    main()

"""What the properties of all rows share, each made at most once per process: tiny models, trained streams, pairs."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor, nn

from residency.adapters import Full
from residency.adapters.base import changes
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.core.tensors import snapshot
from residency.core.types import Example, Layout
from residency.engine.module import ContinualModule
from residency.mitigations import Mitigation
from residency.testing.model_copies import CopiedCausalLM
from residency.testing.pairs import Pairs
from residency.testing.rows import AdapterRow, MitigationRow
from residency.testing.tiny_models import write_backbone
from residency.testing.tiny_runs import make_module, train

__all__ = ["EXAMPLES", "SHORT", "SharedRuns", "Trained", "everything", "logits", "plain_logits"]

RowT = TypeVar("RowT")
EXAMPLES = [
    Example.of(domain="x", row=str(i), prompt=tuple(range(5 + i, 9 + 2 * i)), completion=(40 + i, 50 + i, 0))
    for i in range(3)
]
# What two domains cannot show about a pair, a third does not either.
SHORT: dict[str, Any] = {"kinds": {"a": "generative", "b": "label"}, "steps": 3}


def logits(module: ContinualModule) -> Tensor:
    """Logits of fixed examples, in evaluation mode."""
    module.model.eval()
    with torch.inference_mode():
        return module.forward(make_batch(EXAMPLES, layout=module.layout)).clone()


def plain_logits(model: Any) -> Tensor:
    """The same from a model of transformers or PEFT that knows nothing of `residency`."""
    model.eval()
    batch = make_batch(EXAMPLES, layout="padded")
    with torch.inference_mode():
        out: Tensor = model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    width = batch.input_ids.shape[1]
    # Virtual tokens stand in front of the others.
    return out[:, out.shape[1] - width :][batch.target_at // width, batch.target_at % width]


def everything(module: ContinualModule) -> dict[str, Tensor]:
    """Every parameter and buffer, cloned."""
    return snapshot(dict(module.model.named_parameters()) | dict(module.model.named_buffers()))


@dataclass(frozen=True, kw_only=True)
class Moves:
    """Names of parameters in one stage.

    Args:
        moved: Of those that training changed.
        declared: Of those that the adapter says are trainable.
        still: Of those declared, not zero, and unchanged.
        grad: Of those that require a gradient.
    """

    moved: set[str]
    declared: set[str]
    still: set[str]
    grad: set[str]


class _Watch(Callback):
    """What moves in each stage, against what is declared."""

    def __init__(self) -> None:
        self.stages: list[Moves] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = everything(pl_module)
        self.declared = {*pl_module.adapter.trainable(pl_module.model)}

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        after = everything(pl_module)
        moved = {key for key, old in self.before.items() if not torch.equal(old, after[key])}
        still = {key for key in self.declared - moved if self.before[key].abs().sum() > 0}
        grad = {key for key, p in pl_module.model.named_parameters() if p.requires_grad}
        self.stages.append(Moves(moved=moved, declared=self.declared, still=still, grad=grad))


@dataclass(frozen=True)
class Trained:
    """A stream of tiny domains that was trained once and is looked at by many properties.

    Args:
        record: As in `results.json`.
        module: At the end; not to be changed.
        folder: Of the run.
        stages: What moved.
    """

    record: dict[str, Any]
    module: ContinualModule
    folder: Path
    stages: list[Moves]

    @property
    def state(self) -> dict[str, Tensor]:
        """As stored after the last stage."""
        last = max((self.folder / "stages").iterdir(), key=lambda path: path.name)
        weights: dict[str, Tensor] = load_tree(last / "state.safetensors")["weights"]
        return weights


class SharedRuns:
    """Trains the rows of a suite.

    Args:
        adapters: {name: row} of all adapters that are named.
        mitigations: {name: row} of all mitigations that are named.
        marks: Names of the marks of a pair, as of `Pairs`.
    """

    def __init__(
        self,
        *,
        adapters: Mapping[str, AdapterRow],
        mitigations: Mapping[str, MitigationRow],
        marks: Callable[[str, str], Sequence[str]] = lambda adapter, mitigation: (),
    ) -> None:
        self.adapters = adapters
        self.mitigations = mitigations
        self.marks = marks
        self._plain: dict[tuple[str, bool], Trained] = {}
        self._loaded: dict[str, tuple[CausalLM, nn.Module]] = {}
        self._pretrained: dict[tuple[str, Layout], Tensor] = {}

    @cached_property
    def folder(self) -> Path:
        """Removed when the process ends."""
        folder = Path(tempfile.mkdtemp(prefix="residency-testing-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder

    @cached_property
    def backbone(self) -> Path:
        """A random Llama of 2 layers and 32 dimensions."""
        return write_backbone(self.folder / "llama")

    @cached_property
    def pairs(self) -> Pairs:
        """Every adapter with every mitigation."""
        rows: dict[str, Any] = {"adapters": self.adapters, "mitigations": self.mitigations}
        return Pairs(self.backbone, self.folder / "pairs", **rows, marks=self.marks)

    def row(self, adapter: str) -> AdapterRow:
        """Of an adapter.

        Raises:
            UserError: There is none of that name.
        """
        return _named(self.adapters, adapter, "adapters", "AdapterRow(make=...)")

    def mitigation(self, name: str) -> MitigationRow:
        """Row of a mitigation.

        Raises:
            UserError: There is none of that name.
        """
        return _named(self.mitigations, name, "mitigations", "MitigationRow(make=..., off=...)")

    def built(self, adapter: str, *, seed: int = 0) -> ContinualModule:
        """A fresh module with the adapter of a row attached to a copy of the model."""
        row = self.row(adapter)
        loaded, model = self._load(adapter)

        def family(**options: Any) -> CopiedCausalLM:
            return CopiedCausalLM(**options).copies(model, of=loaded)

        module = make_module(self.backbone, row.make(), {}, family=family, **row.options)
        module.build(seed=seed)
        return module

    def pretrained(self, adapter: str, layout: Layout) -> Tensor:
        """`logits` of the model as a row loads it, without its adapter."""
        key = (self._key(adapter), layout)
        if key not in self._pretrained:
            module = make_module(self.backbone, Full(), {}, loading=self.row(adapter).loading)
            module.model, module.layout = module.backbone.load(), layout
            self._pretrained[key] = logits(module)
        return self._pretrained[key]

    def _load(self, adapter: str) -> tuple[CausalLM, nn.Module]:
        """What a row loads; not to be changed."""
        key = self._key(adapter)
        if key not in self._loaded:
            backbone = CausalLM(path=str(self.backbone), **self.row(adapter).loading)
            self._loaded[key] = (backbone, backbone.load())
        return self._loaded[key]

    def _key(self, adapter: str) -> str:
        return adapter if self.row(adapter).loading else ""

    def run(
        self, adapter: str, folder: Path, mitigations: Mapping[str, Mitigation] | None = None, **options: Any
    ) -> tuple[dict[str, Any], ContinualModule]:
        """Train the stream of a row; `options` as of `tiny_runs.train`."""
        row = self.row(adapter)
        options = {"trainer": row.trainer, **row.options, **options}
        return train(folder, self.backbone, row.make(), mitigations, **options)

    def stream(self, adapter: str) -> dict[str, Any]:
        """Options of the stream that an adapter's own properties look at: two domains, or three.

        Three where an adapter opens or closes its stages: what it holds of the first two in the third is its point. To
        all others every later stage is as the second.
        """
        made = self.row(adapter).make()
        return {} if changes(made, "begin_stage") or changes(made, "end_stage") else SHORT

    def plain(self, adapter: str, *, short: bool = False) -> Trained:
        """The stream of a row without mitigations, as of `stream`, or that of `SHORT`."""
        options = SHORT if short else self.stream(adapter)
        key = (adapter, options is SHORT)
        if key not in self._plain:
            folder, watch = self.folder / f"plain-{len(self._plain)}" / "run", _Watch()
            record, module = self.run(adapter, folder, callbacks=[watch], **options)
            self._plain[key] = Trained(record, module, folder, watch.stages)
        return self._plain[key]


def _named(rows: Mapping[str, RowT], name: str, kind: str, example: str) -> RowT:
    if name not in rows:
        raise UserError(
            f"{name!r} in a pair",
            why=f"none of the {kind} of this suite has that name; they are {', '.join(sorted(rows))}",
            fix=f"give conformance({kind}={{{name!r}: {example}}})",
        )
    return rows[name]

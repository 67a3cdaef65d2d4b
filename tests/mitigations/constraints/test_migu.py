"""MIGU: the rows of large output are updated, and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.core.errors import UserError
from residency.mitigations import MIGU
from residency.mitigations.constraints.linear_maps import linear_maps
from residency.mitigations.constraints.migu import kept_rows
from residency.testing.tiny_runs import train

KINDS = {"a": "label", "b": "generative"}
MADE: dict[str, Callable[[], Adapter]] = {"full": Full, "lora": lambda: lora(target_modules="all-linear", r=8)}


@pytest.mark.parametrize("quantile", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("rows", [1, 2, 10, 33, 100])
def test_the_share_of_rows(quantile: float, rows: int) -> None:
    magnitudes = torch.rand(rows, generator=torch.Generator().manual_seed(rows))
    kept = kept_rows(magnitudes, quantile)
    assert abs(int(kept.sum()) - (1 - quantile) * rows) <= 1
    if not kept.all():
        assert magnitudes[kept].min() > magnitudes[~kept].max(), "the largest"
    assert torch.equal(kept, kept_rows(magnitudes / magnitudes.sum(), quantile)), "the paper's normalisation"


class Watch(Callback):
    """Which rows of every matrix move in each step, and how large their outputs were, by hooks of its own."""

    def __init__(self) -> None:
        self.moved: list[dict[str, torch.Tensor]] = []
        self.sizes: list[dict[str, torch.Tensor]] = []
        self.others: list[set[str]] = []

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.hooks = []
        leaves = pl_module.adapter.trainable(pl_module.model)
        self.places = linear_maps(pl_module.model, leaves)
        for name, place in self.places.items():
            path = place.owner if place.kind != "B" else place.layer

            def keep(module: Any, x: Any, y: torch.Tensor, name: str = name) -> None:
                self.outputs[name] = y.detach()

            self.hooks.append(pl_module.model.get_submodule(path).register_forward_hook(keep))

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.outputs: dict[str, torch.Tensor] = {}
        self.mask = batch.attention_mask
        leaves = pl_module.adapter.trainable(pl_module.model)
        self.before = {n: p.detach().clone() for n, p in leaves.items()}

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        leaves = pl_module.adapter.trainable(pl_module.model)
        moved, sizes = {}, {}
        for name, place in self.places.items():
            changed = place.by_input(leaves[name].detach() != self.before[name])
            moved[name] = changed.any(0)
            y = self.outputs[name]
            rows = y.flatten(0, -2) if self.mask is None else y[self.mask.bool()]
            sizes[name] = rows.abs().mean(0)
        self.moved.append(moved)
        self.sizes.append(sizes)
        others = {*leaves} - {*self.places}
        self.others.append({n for n in others if not torch.equal(leaves[n], self.before[n])})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize(("adapter", "architecture"), [("full", "llama"), ("full", "gpt2"), ("lora", "llama")])
def test_rows_of_small_output_rest_from_the_second_domain_on(
    adapter: str, architecture: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    """Under AdamW with momentum and decay; outputs of LoRA's A are its own, those of B the layer's."""
    watch, folder = Watch(), request.getfixturevalue(architecture)
    _, module = train(
        tmp_path / "run", folder, MADE[adapter](), {"migu": MIGU()}, steps=3, kinds=KINDS, callbacks=[watch]
    )
    assert len(watch.moved) == 6
    started = [n for n in watch.moved[0] if "lora_A" not in n]  # at B = 0 nothing reaches A but decay
    assert all(watch.moved[0][n].float().mean() > 0.9 for n in started), "the first domain is not masked"
    for moved, sizes in zip(watch.moved[3:], watch.sizes[3:], strict=True):
        for name, rows in moved.items():
            wanted = kept_rows(sizes[name], 0.7)
            assert torch.equal(rows, wanted), name
            assert abs(int(rows.sum()) - 0.3 * len(rows)) <= 1
    if adapter == "full":
        assert any("norm" in n or "ln_" in n for n in watch.others[-1]), "what is no matrix moves freely"
    assert 0 < module.mitigations["migu"].metrics_to_log(module)["kept"] < 1
    assert not any(m._forward_hooks for m in module.model.modules()), "no hook is left"


@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_and_layout_do_not_matter(micro: int, llama: Path, tmp_path: Path) -> None:
    """Magnitudes are means over all tokens of a step, without padding."""
    found = {}
    for layout in ("packed", "padded"):
        options: Any = {"data": {"micro_batch_size": micro}, "layout": layout, "steps": 1}
        watch = Watch()
        train(tmp_path / layout, llama, Full(), {"migu": MIGU()}, kinds=KINDS, callbacks=[watch], **options)
        found[layout] = watch.moved[-1]
    same = [torch.equal(found["packed"][n], found["padded"][n]) for n in found["packed"]]
    assert sum(same) >= len(same) - 1, "equal but for a tie in rounding"


def test_threshold_zero_is_off(llama: Path) -> None:
    assert not MIGU(threshold=0.0).touches_training(1)
    assert MIGU().touches_training(1)
    assert not MIGU().touches_training(0)
    assert bool(kept_rows(torch.rand(9), 0.0).all())


@pytest.mark.parametrize("threshold", [-0.1, 1.1])
def test_wrong_options_are_refused(threshold: float) -> None:
    with pytest.raises(UserError, match="threshold"):
        MIGU(threshold=threshold)

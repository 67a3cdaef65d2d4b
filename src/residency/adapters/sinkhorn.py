"""Sinkhorn mixing on the residual stream: an independent reconstruction of a stability-constrained adapter.

Written from public descriptions only (forum posts, a data set card, arXiv 2606.00382). Not public, and therefore chosen
here: the number of streams, Sinkhorn's iterations and temperature, the gate, where in a block the mixing sits, both
learning rates, the data. No claim is made that results carry over in either way. The arms:

    naive           one LoRA through all domains            configs/adapter/lora.yaml, no mixing
    frozen          a fresh LoRA per domain, frozen base     configs/adapter/per_domain.yaml, no mixing
    modular         frozen + mixing that goes on learning    configs/adapter/sinkhorn_modular.yaml
    shared          one LoRA + mixing                        configs/adapter/sinkhorn_shared.yaml
    unconstrained   modular, matrix free                     configs/adapter/sinkhorn_unconstrained.yaml

*Frozen* alone has no drift: the mixing adds modular minus frozen, its constraint modular minus unconstrained.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from residency.adapters.algebra.sinkhorn import MIXER, Mixer, Mixing, add_mixer, mixers, mixing_parameters, residual
from residency.adapters.base import Adapter, Observe, OptimizerFactory, PromptNLL, Served
from residency.adapters.export_format import INNER, write_exported
from residency.adapters.peft import Peft
from residency.adapters.per_domain import PerDomain
from residency.backbones.structure import blocks
from residency.core.errors import UserError
from residency.core.tensors import Computed
from residency.core.types import Capability, Example, Stage, Tensors, untyped

__all__ = ["SinkhornResidual"]

_GATES = (f"{MIXER}.gate", f"{MIXER}.log_alpha")
_OWN: frozenset[Capability] = frozenset({"fixed_coordinates", "averageable", "reference"})


class _Frozen(Adapter):
    """The null object: a backbone that does not move."""

    provides = _OWN

    def attach(self, model: nn.Module) -> nn.Module:
        return model.requires_grad_(False)

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        return state

    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        return {}

    def reference(self, model: nn.Module) -> AbstractContextManager[Any]:
        return nullcontext()

    def export(self, model: nn.Module, path: Path) -> None:
        pass


# Longer than a file of this house should be, because every hook of the contract is handed on to the inner adapter.
class SinkhornResidual(Adapter):
    """A gated mixing of virtual streams behind every block, beside another adapter or alone.

    h' = h + exp(log_alpha) reshape((M - I) z) W_w with z = reshape(h W_r) in k streams of rank r, and
    M = (1 - gate) I + gate S, S doubly stochastic. The gate starts at 0, where h' = h bit for bit, and is brought back
    into 0 ... 1 after every optimizer step. M is doubly stochastic if S is; h -> h' is not bounded (see `mix`).

    Args:
        inner: The adapter beside it; `null` = the mixing alone on a frozen backbone.
        mixing: `exact`: S is a convex combination of all k! permutations. `sinkhorn`: S comes from Sinkhorn's
            iterations and is doubly stochastic up to what they leave. `unconstrained`: S is a free matrix.
        streams: k, at most 5 if exact.
        rank: r; k r is at most the hidden size.
        iterations: Of Sinkhorn.
        train_projections: Whether W_r and W_w move.
        structural_lr_ratio: Learning rate of W_r, W_w and S over the optimizer's; 0 freezes the whole mixing, the
            gate included: then the run is that of `inner`, bit for bit.
        gate_lr_ratio: Learning rate of gate and log_alpha over the optimizer's.
    """

    def __init__(
        self,
        *,
        inner: Adapter | None = None,
        mixing: Mixing = "exact",
        streams: int = 4,
        rank: int = 4,
        iterations: int = 20,
        train_projections: bool = True,
        structural_lr_ratio: float = 0.1,
        gate_lr_ratio: float = 1.0,
    ) -> None:
        limit = 5 if mixing == "exact" else 64
        if not (
            2 <= streams <= limit and rank >= 1 and iterations >= 1 and min(structural_lr_ratio, gate_lr_ratio) >= 0
        ):
            raise UserError(
                f"model.adapter: streams={streams}, rank={rank}, iterations={iterations}, "
                f"structural_lr_ratio={structural_lr_ratio}, gate_lr_ratio={gate_lr_ratio}",
                why=f"{mixing} mixing takes 2 to {limit} streams, rank and iterations from 1 on, ratios from 0 on",
                fix="correct these values; the defaults are 4, 4, 20, 0.1 and 1.0",
            )
        if inner is not None and inner.steps_in_backward:
            raise UserError(
                f"model.adapter.inner {type(inner).__name__} steps inside the backward pass",
                why="gate and structure have learning rates of their own in one optimizer",
                fix="set model.adapter.inner.layerwise to false",
            )
        self.inner: Adapter = _Frozen() if inner is None else inner
        self.shape: dict[str, Any] = {"mixing": mixing, "streams": streams, "rank": rank, "iterations": iterations}
        self.train_projections = train_projections
        self.structural_lr_ratio, self.gate_lr_ratio = structural_lr_ratio, gate_lr_ratio
        self.provides, self.continues = _OWN & self.inner.provides, self.inner.continues
        self.task_id_at_test, self.scorers = self.inner.task_id_at_test, dict(self.inner.scorers)
        self.decoder_only, self.not_on_classifiers = self.inner.decoder_only, self.inner.not_on_classifiers

    # -- attaching ----------------------------------------------------------------------------------------------

    def attach(self, model: nn.Module) -> nn.Module:
        """Attach the inner adapter, then a mixer to every block.

        Raises:
            UserError: k r exceeds the hidden size, or the model has no stack of blocks.
        """
        if mixers(model):
            return model
        # The inner adapter first: it draws what it would draw alone.
        model = self.inner.attach(model)
        width = int(untyped(model).config.hidden_size)
        kind, streams, rank, iterations = self.shape.values()
        if streams * rank > width:
            raise UserError(
                f"model.adapter: streams x rank = {streams * rank}, hidden size {width}",
                why="the streams are orthogonal directions of the residual stream",
                fix="lower model.adapter.streams or model.adapter.rank",
            )
        for block in blocks(model).values():
            add_mixer(block, Mixer(width, kind=kind, streams=streams, rank=rank, iterations=iterations))
        for name, parameter in mixing_parameters(model).items():
            fixed = name.endswith((".read", ".write")) and not self.train_projections
            parameter.requires_grad_(self.structural_lr_ratio > 0 and not fixed)
        return model

    @contextmanager
    def _alone(self, model: nn.Module) -> Iterator[Adapter]:
        """Around calls of the inner adapter: mixers are frozen to it, and are what they were afterwards."""
        flags = {parameter: parameter.requires_grad for parameter in mixing_parameters(model).values()}
        for parameter in flags:
            parameter.requires_grad_(False)
        try:
            yield self.inner
        finally:
            for parameter, flag in flags.items():
                parameter.requires_grad_(flag)

    def optimizer(self, model: nn.Module, factory: OptimizerFactory) -> Optimizer:
        """The inner adapter's optimizer, with groups for structure and gate; neither is decayed."""
        moving = {name: p for name, p in mixing_parameters(model).items() if p.requires_grad}
        gates = [p for name, p in moving.items() if name.endswith(_GATES)]
        structure = [p for name, p in moving.items() if not name.endswith(_GATES)]
        with self._alone(model) as inner:
            if not inner.trainable(model):
                optimizer = factory([{"params": structure}])
                optimizer.param_groups.clear()
            else:
                optimizer = inner.optimizer(model, factory)
        lr = optimizer.defaults["lr"]
        for parameters, ratio in ((structure, self.structural_lr_ratio), (gates, self.gate_lr_ratio)):
            if parameters:
                optimizer.add_param_group({"params": parameters, "lr": lr * ratio, "weight_decay": 0.0})
        return optimizer

    # -- over a stream ------------------------------------------------------------------------------------------

    def begin_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Of the inner adapter; the mixing goes on where it is."""
        with self._alone(model) as inner:
            inner.begin_stage(model, stage, observe)

    def end_stage(self, model: nn.Module, stage: Stage, observe: Observe) -> None:
        """Of the inner adapter."""
        with self._alone(model) as inner:
            inner.end_stage(model, stage, observe)

    def loss_terms(self, model: nn.Module, stage: Stage) -> Mapping[str, Tensor]:
        """Of the inner adapter."""
        return self.inner.loss_terms(model, stage)

    @torch.no_grad()
    def metrics_to_log(self, model: nn.Module, stage: Stage) -> Mapping[str, float]:
        """Over all blocks: mean gate, largest spectral norm of S, largest error of its row and column sums."""
        gates = torch.stack([m.gate for m in mixers(model)])
        matrices = [m.matrix() for m in mixers(model)]
        return {
            **self.inner.metrics_to_log(model, stage),
            "gate": float(gates.mean()),
            "spectral_norm": float(torch.linalg.matrix_norm(torch.stack(matrices), ord=2).max()),
            "residual": max(float(residual(matrix)) for matrix in matrices),
        }

    def transform_update(self, model: nn.Module, before: Tensors, after: Tensors) -> Tensors:
        """Bring every gate back into 0 ... 1. A sigmoid could not start at 0, a ReLU would have no gradient there."""
        after = self.inner.transform_update(model, before, after)
        return {n: t.clamp(0, 1) if n.endswith(f"{MIXER}.gate") else t for n, t in after.items()}

    def route(
        self, model: nn.Module, column: str, examples: Sequence[Example], prompt_nll: PromptNLL
    ) -> Iterable[Served]:
        """Of the inner adapter."""
        return self.inner.route(model, column, examples, prompt_nll)

    def extra_scores(
        self,
        model: nn.Module,
        column: str,
        examples: Sequence[Example],
        completion_nll: PromptNLL,
        prompt_nll: PromptNLL,
    ) -> Mapping[str, Tensor]:
        """Of the inner adapter."""
        return self.inner.extra_scores(model, column, examples, completion_nll, prompt_nll)

    # -- states and files ---------------------------------------------------------------------------------------

    def state(self, model: nn.Module) -> dict[str, Tensor]:
        """That of the inner adapter, and every mixer."""
        with self._alone(model) as inner:
            return {**inner.state(model), **{name: p.detach() for name, p in mixing_parameters(model).items()}}

    @torch.no_grad()
    def load_state(self, model: nn.Module, state: Tensors) -> None:
        """Restore both.

        Raises:
            UserError: The state is of another adapter or shape.
        """
        mine = mixing_parameters(model)
        fits = all(name in state and state[name].shape == p.shape for name, p in mine.items())
        if not fits or any(MIXER in name and name not in mine for name in state):
            raise UserError(
                f"a stored state does not fit {type(self).__name__} with {len(mine)} tensors of mixing",
                why="it was written with another adapter, number of streams, rank, kind of mixing or backbone",
                fix="use the config that lies beside the state (config.yaml), or another --run_dir",
            )
        with self._alone(model) as inner:
            inner.load_state(model, {name: t for name, t in state.items() if name not in mine})
        for name, parameter in mine.items():
            parameter.copy_(state[name])

    def weights(self, model: nn.Module, state: Tensors) -> Tensors:
        """The inner adapter's averaging space, and the parameters of the mixers as they are."""
        mine = {name: state[name] for name in mixing_parameters(model)}
        with self._alone(model) as inner:
            theirs = inner.weights(model, {name: t for name, t in state.items() if name not in mine})
        return Computed([*theirs, *mine], lambda name: mine[name] if name in mine else theirs[name])

    @torch.no_grad()
    def load_weights(self, model: nn.Module, weights: Tensors) -> Mapping[str, float]:
        """Set both."""
        mine = mixing_parameters(model)
        with self._alone(model) as inner:
            theirs = Computed([name for name in weights if name not in mine], weights.__getitem__)
            found = inner.load_weights(model, theirs)
        for name, parameter in mine.items():
            parameter.copy_(weights[name])
        return found

    @contextmanager
    def reference(self, model: nn.Module) -> Iterator[None]:
        """Mixing off, inner adapter off."""
        with self.inner.reference(model):
            for mixer in mixers(model):
                mixer.enabled = False
            try:
                yield
            finally:
                for mixer in mixers(model):
                    mixer.enabled = True

    def export(self, model: nn.Module, path: Path) -> None:
        """A folder for `export_format.attach_exported`; in it the PEFT adapter (newest domain), as PEFT writes it.

        Raises:
            UserError: The inner adapter is not one of PEFT.
        """
        if not isinstance(self.inner, Peft | PerDomain | _Frozen):
            raise UserError(
                f"export of {type(self).__name__} around {type(self.inner).__name__}",
                why="nothing but an adapter of PEFT can lie beside the mixing in an exported folder",
                fix="go on with `residency predict`, `test` or `validate` on the run itself",
            )
        options = {**self.shape, "train_projections": self.train_projections}
        options |= {"structural_lr_ratio": self.structural_lr_ratio, "gate_lr_ratio": self.gate_lr_ratio}
        write_exported(path, self, options, {name: p.detach() for name, p in mixing_parameters(model).items()})
        if isinstance(self.inner, Peft | PerDomain):
            self.inner.export(model, path / INNER)

"""Several processes within one stage: Lightning's DDP starts and connects them, the gradients are averaged here.

The reducer of `DistributedDataParallel` is left out. It expects every leaf in every batch, counts the hooks of leaves
and cannot see an auxiliary backward pass; adapters with parts that rest and mitigations with passes of their own break
these rules, some of them silently. One mean over all gradients at the end of a step has no rules, and overlaps with
nothing: for adapters there is next to nothing to overlap.
"""

from __future__ import annotations

import subprocess
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy, Strategy
from torch import Tensor
from torch.optim import Optimizer

from residency.core.errors import UserError
from residency.core.parts import check_optimizers, cut_states, in_parts, stepped, whole_states
from residency.core.ranks import mean_gradients

__all__ = ["RankStrategy", "end_in_place", "ended_children", "stage_strategy"]

_PATIENCE = 20  # seconds for the other processes to end by themselves


class RankStrategy(DDPStrategy):
    """DDP whose gradients are averaged once per optimizer step, before they are unscaled, folded and clipped.

    Args:
        timeout: How long a rank waits for the others.
        process_group_backend: `gloo`, `nccl`; by the device by default.
        shards: Whether each process keeps a part of the weights only (`engine.sharding`).
    """

    def __init__(self, *, timeout: timedelta, process_group_backend: str | None = None, shards: bool = False) -> None:
        super().__init__(timeout=timeout, process_group_backend=process_group_backend)
        self.shards = shards
        self._accumulates = False

    def configure_ddp(self) -> None:
        """Nothing is wrapped."""

    @contextmanager
    def block_backward_sync(self) -> Generator[None, None, None]:
        """Inside, a micro-batch is not the last of its step (Lightning says so)."""
        self._accumulates = True
        try:
            yield
        finally:
            self._accumulates = False

    def setup_optimizers(self, trainer: Any) -> None:
        """Make the optimizers of a stage; those of parts are looked at.

        Raises:
            UserError: One cannot step parts.
        """
        super().setup_optimizers(trainer)
        check_optimizers(self.optimizers)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What a checkpoint keeps: whole, so that any number of ranks can go on from it. Called by all ranks."""
        state: dict[str, Any] = super().optimizer_state(optimizer)
        return whole_states(state) if any(map(in_parts, stepped(optimizer))) else state

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Bring it back, cut as the parameters are."""
        states = [
            cut_states(state, optimizer) if any(map(in_parts, stepped(optimizer))) else state
            for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True)
        ]
        super().load_optimizer_state_dict({**checkpoint, "optimizer_states": states})

    def post_backward(self, closure_loss: Tensor) -> None:
        """Average what the step's micro-batches have left."""
        if not self._accumulates:
            assert self.lightning_module is not None
            mean_gradients(self.lightning_module.parameters())


def stage_strategy(chosen: Strategy) -> RankStrategy | None:
    """What takes the place of the strategy that Lightning has chosen; `None` where one process trains.

    Raises:
        UserError: A strategy with which hooks would see parts of the weights, or processes cannot go on from stage to
            stage.
    """
    if type(chosen) is SingleDeviceStrategy or isinstance(chosen, RankStrategy):
        return None
    options: dict[str, Any] = vars(chosen)
    if type(chosen) is DDPStrategy and options["_start_method"] == "popen":
        return RankStrategy(timeout=options["_timeout"], process_group_backend=options["_process_group_backend"])
    if type(chosen) is ModelParallelStrategy:
        _refuse_tensor_parallel(chosen)
        return RankStrategy(
            timeout=options["_timeout"], process_group_backend=options["_process_group_backend"], shards=True
        )
    name = type(chosen).__name__
    why = "adapters and mitigations read and write whole tensors, and with it a process has parts of them"
    if type(chosen) is DDPStrategy:
        name = f"DDPStrategy with start_method {options['_start_method']}"
        why = "such processes end with the first stage, and what they have learnt about the stream with them"
    raise UserError(
        f"trainer.strategy: {name}",
        why=why,
        fix="set trainer.strategy to ddp (or auto), use configs/trainer/fsdp.yaml to keep the base in parts, or one "
        "device per cell",
    )


def _refuse_tensor_parallel(chosen: ModelParallelStrategy) -> None:
    """Only its data-parallel half is used, over all processes."""
    asked = {name: vars(chosen)[f"_{name}"] for name in ("data_parallel_size", "tensor_parallel_size")}
    whole = ("auto", chosen.num_processes * chosen.num_nodes)
    if asked["tensor_parallel_size"] in ("auto", 1) and asked["data_parallel_size"] in whole:
        return
    told = ", ".join(f"{name}={size}" for name, size in asked.items())
    raise UserError(
        f"trainer.strategy: ModelParallelStrategy with {told}",
        why="weights are cut into one part per process (FSDP2), and never within a product (tensor parallel)",
        fix="leave data_parallel_size out and set tensor_parallel_size to 1, as configs/trainer/fsdp.yaml does",
    )


def end_in_place(strategy: Strategy) -> None:
    """What a strategy does at the end of a stage, but for carrying the model to the CPU: the next stage, or whoever
    scores this one, wants it where it is.
    """
    module: Any = strategy.lightning_module
    teardown = type(strategy).teardown
    if module is None:
        teardown(strategy)
        return
    module.cpu = lambda: module
    try:
        teardown(strategy)
    finally:
        del module.cpu


@contextmanager
def ended_children(launcher: Any) -> Iterator[None]:
    """Around what processes do that a launcher has started: none of them outlives the block.

    Args:
        launcher: Its `procs` are those that it has started; Lightning's observer, which ends this process by SIGKILL
            when one of them fails, looks at the same list.
    """
    try:
        yield
    except BaseException:
        failed, launcher.procs[:] = launcher.procs[:], []
        for process in failed:
            process.terminate()
        _wait(failed)
        raise
    _wait(launcher.procs)


def _wait(processes: list[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        try:
            process.wait(timeout=_PATIENCE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

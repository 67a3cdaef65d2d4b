"""`residency fit ... --dry-run`: what a run will take on each device, before a model is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from residency.domains.stream_data import StreamData
from residency.engine.estimate import StageEstimate, estimate_stage, largest_that_fits
from residency.engine.module import ContinualModule
from residency.engine.sharding import trains_in_parts
from residency.engine.stage_outline import Device, StageOutline, outlined
from residency.engine.trainers import Trainers
from residency.runs.estimate_words import Asked
from residency.runs.open_runner import open_runner
from residency.runs.settings import StreamSettings
from residency.runs.stage_runner import StageRunner
from residency.runs.trial import column_seconds, step_seconds

__all__ = [
    "Estimated",
    "describe_costs",
    "describe_estimate",
    "device_of",
    "energy_kwh",
    "estimate_run",
    "show_estimate",
]

_JOULES = 3.6e6  # of a kilowatt hour


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimated:
    """What was found.

    Args:
        stages: One by one.
        ranks: Devices that train together.
        seconds: Of training and scoring; `None` = not measured.
        fitting: What fits into the memory that was asked for; `None` = nothing does, or nobody asked.
        in_parts: What every device will keep a part of only; empty = nothing.
    """

    stages: Sequence[StageEstimate]
    ranks: int
    seconds: float | None
    fitting: StageEstimate | None
    in_parts: str = ""

    @property
    def largest(self) -> StageEstimate:
        """The stage that takes most memory."""
        return max(self.stages, key=lambda stage: stage.memory.peak)


def estimate_run(
    module: ContinualModule,
    data: StreamData,
    trainers: Trainers,
    runner: StageRunner,
    question: Asked,
    *,
    outline: StageOutline | None = None,
) -> Estimated:
    """Estimate every stage of a run.

    Args:
        module: Not built; it is, where time is measured.
        data: Domains.
        trainers: Devices and precision.
        runner: Of the run; trains a few steps where time is measured.
        question: What is asked.
        outline: Of the same model with the same adapter object, where it is known.
    """
    device = device_of(trainers)
    found = outline or outlined(module, device)

    def stage_with(place: int, micro: int | None = None) -> StageEstimate:
        stage = runner.stages[place]
        micro = micro or data.micro_batch(devices=device.ranks, batch=stage.batch_size)
        return estimate_stage(module, data, stage, found, device, micro=micro)

    stages = [stage_with(place) for place in range(len(runner.stages))]
    fitting = None
    if question.memory is not None:
        worst = max(range(len(stages)), key=lambda place: stages[place].memory.peak)
        fitting = largest_that_fits(
            runner.stages[worst].batch_size,
            lambda micro: stage_with(worst, micro),
            ranks=device.ranks,
            limit=question.memory,
        )
    seconds = _seconds(runner) if question.measure else None
    cut = "weights, gradients and optimizer state" if trains_in_parts(module.adapter) else "frozen weights"
    in_parts = cut if trainers.shards else ""
    return Estimated(stages=stages, ranks=device.ranks, seconds=seconds, fitting=fitting, in_parts=in_parts)


def device_of(trainers: Trainers) -> Device:
    """What a rank of a run computes on."""
    kind, precision = trainers.root_device.type, trainers.precision
    return Device(kind=kind, precision=precision, ranks=trainers.world_size, parts=trainers.shards)


def _seconds(runner: StageRunner) -> float:
    """Of training all stages, and of scoring before the first and after each."""
    rate = step_seconds(runner)
    scored = sum(column_seconds(runner, name) for name, domain in runner.data.columns.items() if domain.scorers)
    return rate * sum(stage.steps for stage in runner.stages) + (len(runner.stages) + 1) * scored


def describe_estimate(found: Estimated, question: Asked) -> list[str]:
    """In lines for a terminal."""
    worst = found.largest
    m = worst.memory
    together = "" if found.ranks == 1 else f" on each of {found.ranks} devices"
    lines = [
        f"memory{together}: {_gib(m.peak)} at most, in {worst.domain} with micro-batches of {worst.micro_batch} "
        "(without the interpreter, and what an allocator rounds up)",
        f"  weights {_gib(m.weights)}, gradients {_gib(m.gradients)}, optimizer {_gib(m.optimizer)}, activations "
        f"{_gib(m.activations)}, head {_gib(m.head)}, remembered by mitigations and teachers {_gib(m.remembered)}",
        f"  peaks: forward {_gib(m.forward)}, step {_gib(m.step)}, behind a stage {_gib(m.finish)}",
    ]
    if found.in_parts:
        lines.append(
            f"  of {found.in_parts} a device keeps 1/{found.ranks}; a block, and what lies around the blocks "
            "(embeddings, head), is whole while it computes"
        )
    tokens, flops = (sum(getattr(stage, name) for stage in found.stages) for name in ("tokens", "flops"))
    steps = sum(stage.steps for stage in found.stages)
    lines.append(f"training: {steps:,} steps, {tokens:,} tokens, {flops:.3g} FLOPs (passes of mitigations come on top)")
    if question.memory is not None:
        lines.append(_advice(found, question.memory))
    return lines + describe_costs(found.seconds, found.ranks, question)


def _advice(found: Estimated, memory: int) -> str:
    if found.fitting is None:
        return (
            f"not even one example fits into {_gib(memory)}: shorten rows (template.max_tokens), set model.backbone."
            "gradient_checkpointing, or quantise the backbone (configs/backbone/qlora.yaml)"
        )
    fit = found.fitting
    return f"fits into {_gib(memory)}: --data.micro_batch_size={fit.micro_batch} ({_gib(fit.memory.peak)} at most)"


def describe_costs(seconds: float | None, ranks: int, question: Asked) -> list[str]:
    """Time, energy and money in lines.

    Args:
        seconds: Of every device; `None` = unknown.
        ranks: Devices.
        question: Power and prices.
    """
    if seconds is None:
        return ["time: unknown; --measure tries a few steps"]
    lines = [f"time: about {seconds / 60:.1f} minutes (by a few steps and rows of this machine)"]
    if question.watts is not None:
        energy = energy_kwh(seconds, watts=question.watts, devices=ranks)
        price = "" if question.kwh_price is None else f", {energy * question.kwh_price:.2f} in money"
        lines.append(f"energy: {energy:.3g} kWh at {question.watts:g} W{price}")
    if question.hour_price is not None:
        lines.append(f"price: {seconds / 3600 * ranks * question.hour_price:.2f} at {question.hour_price:g} an hour")
    return lines


def energy_kwh(seconds: float, *, watts: float, devices: int) -> float:
    """Of some devices at a constant power."""
    return seconds * watts * devices / _JOULES


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.1f} MiB"


def show_estimate(
    module: ContinualModule, data: StreamData, trainers: Trainers, settings: StreamSettings, question: Asked
) -> dict[str, Any]:
    """Check a run, estimate it, and print the lines; the same as plain values.

    Raises:
        UserError: What is wrong with the run, as before it is trained.
    """
    found = estimate_run(module, data, trainers, open_runner(module, data, trainers, settings, planned=True), question)
    for line in describe_estimate(found, question):
        print(line)
    return asdict(found)

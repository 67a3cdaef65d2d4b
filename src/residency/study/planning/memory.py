"""How much memory the stages of a study take on a device, told with its plan."""

from __future__ import annotations

from collections.abc import Sequence

from residency.adapters.base import Adapter
from residency.core.errors import UserError
from residency.core.garbage import without_collector
from residency.engine.stage_outline import StageOutline, outlined
from residency.runs.estimate import Estimated, describe_estimate, device_of, estimate_run
from residency.runs.estimate_words import Asked
from residency.study.planning.resolve import Resolved

__all__ = ["describe_memory"]

_KINDS = 32  # of runs that are looked at: each takes a second


@without_collector()
def describe_memory(cells: Sequence[Resolved], question: Asked) -> list[str]:
    """The run that takes most, by part; one of every kind of model and mitigations is looked at.

    Args:
        cells: Those that are to be run.
        question: What is asked besides; time is told by the plan.
    """
    kinds: dict[tuple[object, ...], Resolved] = {}
    for cell in cells:
        runner = cell.stage_cache.runner
        parts = sorted((name, type(m).__name__) for name, m in runner.module.mitigations.items())
        if not cell.frozen:
            kinds.setdefault((cell.keys.model, runner.stages[0].batch_size, *parts), cell)
    found: dict[str, Estimated] = {}
    lines: list[str] = []
    outlines: dict[tuple[object, ...], tuple[Adapter, StageOutline]] = {}
    for cell in list(kinds.values())[:_KINDS]:
        runner = cell.stage_cache.runner
        module, device = runner.module, device_of(runner.trainers)
        same = (cell.keys.model, device, module.layout_choice)
        try:
            # An outline takes half a second, and is of one adapter object.
            if same in outlines:
                module.adapter = outlines[same][0]
            else:
                outlines[same] = module.adapter, outlined(module, device)
            asked = Asked(memory=question.memory)
            found[cell.cell.id] = estimate_run(
                module, runner.data, runner.trainers, runner, asked, outline=outlines[same][1]
            )
        except UserError as error:
            lines.append(f"memory of {cell.cell.id}: unknown ({error.why})")
    if found:
        worst = max(found, key=lambda name: found[name].largest.memory.peak)
        left = f", of {_KINDS} that were looked at" if len(kinds) > _KINDS else ""
        told = describe_estimate(found[worst], Asked(memory=question.memory))
        # The plan has said how long all of it takes.
        lines += [f"the run that takes most memory is {worst}{left}:", *(f"  {line}" for line in told[:-1])]
    return lines

"""In which mode a model trains: with its noise, or without it and still with gradient checkpointing.

transformers recomputes activations in training mode only, where dropout is on as well. An objective that wants the
model itself (a ratio to a reference, a reward) gets both only from a model that has no noise.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from residency.backbones.work import is_checkpointed
from residency.core.errors import UserError
from residency.objectives.base import Objective

__all__ = ["check_checkpointing", "cut_noise", "noise_of", "trained_noise", "trains_in_training_mode"]

_NOISE = ("drop", "jitter")


def noise_of(model: nn.Module) -> list[str]:
    """Where a model draws numbers in training mode: dropout, dropped layers, a jittered router; with their rates."""
    found = [
        (name, m.p) for name, m in model.named_modules() if isinstance(m, nn.Dropout | nn.Dropout1d | nn.Dropout2d)
    ]
    for path, module in model.named_modules():
        rates = {key: value for key, value in vars(module).items() if any(word in key for word in _NOISE)}
        found += [(f"{path}.{key}", rate) for key, rate in rates.items() if isinstance(rate, float)]
    return [f"{name} {rate:g}" for name, rate in found if rate > 0]


def trains_in_training_mode(objective: Objective, model: nn.Module) -> bool:
    """Whether the mode is on while a stage trains."""
    return objective.forward_noise or is_checkpointed(model)


def trained_noise(objectives: Iterable[Objective], model: nn.Module) -> list[str]:
    """What of `noise_of` is drawn while the stages of a run train."""
    return noise_of(model) if any(trains_in_training_mode(objective, model) for objective in objectives) else []


def cut_noise(noise: Sequence[str], *, parts: int) -> str:
    """What to say before a run in which noise depends on how a step is cut; empty where nothing does.

    The masks of a micro-batch start from the seed of its place in the stage, and one draw covers all of its rows: the
    same cut gives the same bits, another one other masks. Everything else of a step is the same however it is cut.

    Args:
        noise: As `trained_noise` names it.
        parts: Micro-batches of a step, over all devices; the most of any stage.
    """
    if not noise or parts < 2:
        return ""
    others = f" and {len(noise) - 1} more" if len(noise) > 1 else ""
    return (
        f"dropout ({noise[0]}{others}) is drawn per micro-batch, and a step has {parts}: another data.micro_batch_size "
        "or number of devices trains with other masks; with dropout 0 neither changes a gradient"
    )


def check_checkpointing(objectives: Iterable[Objective], model: nn.Module) -> None:
    """Gradient checkpointing of an objective without noise, on a model that has some.

    Args:
        objectives: The run's, and those of its stages.
        model: With its adapter.

    Raises:
        UserError: One of the two would be without effect.
    """
    quiet = [type(objective).__name__ for objective in objectives if not objective.forward_noise]
    if quiet and is_checkpointed(model) and (noise := noise_of(model)):
        raise UserError(
            f"model.backbone.gradient_checkpointing with {quiet[0]} and {noise[0]}",
            why=f"{quiet[0]} trains without dropout, and transformers recomputes activations only in "
            "the mode in which dropout is on",
            fix="set dropout of model and adapter to 0, or gradient_checkpointing to false with a smaller "
            "data.micro_batch_size, which changes no gradient",
        )

"""What a run is apart from model, data and Trainer: its options, and what they become."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from lightning.pytorch.cli import LightningArgumentParser

from residency.core.errors import UserError
from residency.core.text import for_terminal
from residency.engine.scoring.settings import EvaluationSettings
from residency.engine.stage_overrides import StageOverrides
from residency.inspection import Observer
from residency.runs.folder import RunFolder
from residency.runs.stream import StreamSettings
from residency.runs.views.wandb_settings import WandbSettings

__all__ = [
    "add_export_options",
    "add_predict_options",
    "add_run_options",
    "add_stage_option",
    "run_folder",
    "run_settings",
    "wandb_settings",
]

Option = Callable[[str], Any]


def add_run_options(parser: LightningArgumentParser) -> None:
    """Add name, folder, checkpoints, store, place in a study, evaluation and W&B."""
    parser.add_argument("--name", type=str, default="run", help="Name of the run; its folder is runs/<name>.")
    parser.add_argument("--run_dir", type=str | None, default=None, help="Folder of the run instead of runs/<name>.")
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="Use a run folder in which something else lies (fit); replace an earlier export (export).",
    )
    parser.add_argument(
        "--checkpoint_every_n_steps",
        type=int,
        default=50,
        help="Optimizer steps between two checkpoints inside a stage; 0 = only whole stages are saved.",
    )
    parser.add_argument(
        "--store", type=str | None, default=None, help="Folder where runs share trained stages and scores."
    )
    parser.add_argument(
        "--stage_tokens",
        type=int | None,
        default=None,
        help="Training tokens per domain instead of trainer.max_steps: an equal budget for long and short rows.",
    )
    parser.add_argument(
        "--stages",
        type=dict[str, StageOverrides],
        default={},
        help="What the stages of single domains do otherwise, by domain: epochs or steps, batch_size, lr or optimizer, "
        "scheduler, objective.",
    )
    parser.add_argument(
        "--frozen", type=bool, default=False, help="Train nothing: the pretrained model as a reference for others."
    )
    parser.add_argument(
        "--split",
        type=Literal["test", "validation"],
        default="test",
        help="Rows that are scored after every stage; validation for choosing, test for reporting.",
    )
    parser.add_argument("--axes", type=dict[str, Any], default={}, help="Place in a study (set by `sweep`).")
    parser.add_argument(
        "--inspection",
        type=dict[str, Observer] | None,
        default=None,
        help="What looks inside the model after every stage, by name; see configs/inspection.",
    )
    parser.add_class_arguments(EvaluationSettings, "evaluation")
    parser.add_class_arguments(WandbSettings, "wandb")


def add_stage_option(parser: LightningArgumentParser) -> None:
    """Add what every verb of a saved stage takes."""
    parser.add_argument(
        "--stage", type=int | None, default=None, help="Which saved stage: 0 = base, 1, 2, ...; default the last."
    )


def add_predict_options(parser: LightningArgumentParser) -> None:
    """Add what `predict` takes beside the stage."""
    parser.add_argument("--domain", type=str | None, default=None, help="Which domain; default the first.")
    parser.add_argument("--limit", type=int | None, default=8, help="How many rows; null = all.")
    parser.add_argument(
        "--prompts", type=str | None, default=None, help="File of your own prompts, one JSON object or text per line."
    )
    parser.add_argument("--output", type=str | None, default=None, help="JSON Lines file to write.")


def add_export_options(parser: LightningArgumentParser) -> None:
    """Add what `export` takes beside the stage."""
    parser.add_argument(
        "--merge", action="store_true", help="Fold the adapter into the weights and score the result again."
    )
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16"] | None,
        default=None,
        help="Of merged weights; default the backbone's own.",
    )
    parser.add_argument("--output", type=str | None, default=None, help="Folder to write; default RUN/export/<stage>.")


def run_folder(option: Option) -> RunFolder:
    """The run's folder.

    Raises:
        UserError: The name would lead out of `runs`.
    """
    folder, name = option("run_dir"), option("name")
    if not folder and (Path(name).name != name or name in ("", ".", "..")):
        raise UserError(
            f"--name={name}",
            why="runs/<name> must be one folder in runs",
            fix="give a name without slashes, or the folder itself with --run_dir",
        )
    told: set[str] = set()

    def tell(text: str) -> None:
        if text not in told:
            print(f"residency: {for_terminal(text)}", file=sys.stderr)
        told.add(text)

    path = Path(folder or Path("runs") / name)
    return RunFolder(path, overwrite=bool(option("overwrite")), on_message=tell)


def run_settings(option: Option) -> StreamSettings:
    """The run's settings.

    Raises:
        UserError: A number of steps or tokens cannot be.
    """
    every, store = option("checkpoint_every_n_steps"), option("store")
    if option("stage_tokens") is not None and option("stage_tokens") < 1:
        raise UserError(
            f"--stage_tokens={option('stage_tokens')}",
            why="every domain needs at least one optimizer step",
            fix="give the training tokens per domain, or leave it out and set trainer.max_steps",
        )
    if every < 0:
        raise UserError(
            f"--checkpoint_every_n_steps={every}",
            why="it counts optimizer steps between two checkpoints",
            fix="give 0 (no checkpoint inside a stage) or a positive number",
        )
    return StreamSettings(
        cell=option("name"),
        seed=option("seed_everything"),
        axes=dict(option("axes")),
        checkpoint_every_n_steps=every,
        evaluation=EvaluationSettings(**_plain(option("evaluation"))),
        store=Path(store) if store else None,
        stage_tokens=option("stage_tokens"),
        frozen=option("frozen"),
        stages=dict(option("stages")),
        split=option("split"),
    )


def wandb_settings(option: Option) -> WandbSettings:
    """Where the run appears on W&B."""
    return WandbSettings(**_plain(option("wandb")))


def _plain(value: Any) -> dict[str, Any]:
    return value.as_dict() if isinstance(value, Namespace) else dict(vars(value))

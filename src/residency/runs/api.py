"""Runs from a notebook or a script: the verbs of one run, and what they have left."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl

from residency.core.tensor_files import read_json
from residency.core.types import Split
from residency.runs.export.push import push
from residency.runs.listing import RunSummary, find_runs, remove_run
from residency.runs.loaded import Run, load_run

if TYPE_CHECKING:
    from residency.runs.chat import Conversation

__all__ = [
    "Run",
    "chat",
    "compare",
    "export",
    "fit",
    "list_runs",
    "load_run",
    "merge",
    "predict",
    "push",
    "remove_run",
    "score",
]


def fit(config: Mapping[str, Any] | str | Path, *, run_dir: str | Path | None = None) -> dict[str, Any]:
    """Train a stream, or go on with it, as `residency fit --config CONFIG --run_dir RUN_DIR` does.

    Args:
        config: Keys and values as in a config file, the path of one, or the name of a preset.
        run_dir: Folder of the run; runs/<name> by default.

    Returns:
        The record, as in results.json.

    Raises:
        UserError: What the user can mend.
    """
    from residency.runs.cli import ResidencyCLI

    text = json.dumps(config) if isinstance(config, Mapping) else str(config)
    words = ["fit", "--config", text, *([] if run_dir is None else ["--run_dir", str(run_dir)])]
    record: dict[str, Any] = read_json(ResidencyCLI(words).folder.path / "results.json")
    return record


def export(
    run: str | Path,
    *,
    stage: int | None = None,
    merge: bool = False,
    dtype: str | None = None,
    output: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Write a saved stage as a folder that other programs load, as `residency export RUN` does.

    Args:
        run: Folder of the run.
        stage: 1 ... T; the last one that is saved by default.
        merge: Fold the adapter into the backbone's own weights, and score the result again.
        dtype: Of merged weights, `float32` or `bfloat16`; the backbone's own by default.
        output: Folder to write; RUN/export/<stage>-<domain> by default.
        overwrite: Replace an earlier export.

    Returns:
        {"path", "stage", "domain", "merged", "scores", "merge_tax", ...}, as in residency.json beside the weights.

    Raises:
        UserError: What the user can mend; nothing half written stays.
    """
    from residency.runs.cli import ResidencyCLI

    folder = Path(run)
    words = ["export", "--config", str(folder / "config.yaml"), "--run_dir", str(folder)]
    given = {"stage": stage, "dtype": dtype, "output": output}
    words += [f"--{name}={value}" for name, value in given.items() if value is not None]
    flags = {"merge": merge, "overwrite": overwrite}
    found: dict[str, Any] = ResidencyCLI([*words, *(f"--{name}" for name, on in flags.items() if on)]).result
    return found


def predict(
    run: str | Path,
    *,
    stage: int | None = None,
    domain: str | None = None,
    limit: int | None = None,
    prompts: str | Path | None = None,
) -> list[Mapping[str, str]]:
    """Let a saved stage write, as `residency predict RUN` does.

    Args:
        run: Folder of the run.
        stage: 0 = base, 1 ... T; the last one that is saved by default.
        domain: Whose test rows, and whose template; the first one by default.
        limit: How many rows; all by default.
        prompts: File of prompts to use instead of the test rows.

    Returns:
        [{"row", "prompt", "completion", "written"}].

    Raises:
        UserError: What the user can mend.
    """
    from residency.runs.open_run import open_run
    from residency.runs.saved_stage import predict_saved

    cli = open_run(Path(run))
    return predict_saved(
        module=cli.model,
        data=cli.datamodule,
        folder=cli.folder,
        stage=stage,
        seed=cli.settings.seed,
        domain=domain,
        limit=limit,
        prompts=None if prompts is None else str(prompts),
        device=cli.trainers.root_device,
    )


def score(run: str | Path, *, stage: int | None = None, split: Split = "test") -> dict[str, Any]:
    """Score a saved stage on the rows of one split, as `residency test RUN` and `residency validate RUN` do.

    Args:
        run: Folder of the run.
        stage: 0 = base, 1 ... T; the last one that is saved by default.
        split: `test` or `validation`.

    Returns:
        {"stage", "split", "means": {scorer: {column: mean}}}.

    Raises:
        UserError: What the user can mend.
    """
    from residency.runs.open_run import open_run
    from residency.runs.saved_stage import score_saved

    cli = open_run(Path(run))
    return score_saved(
        module=cli.model,
        data=cli.datamodule,
        folder=cli.folder,
        settings=cli.settings,
        stage=stage,
        split=split,
        device=cli.trainers.root_device,
    )


def chat(
    run: str | Path, *, stage: int | None = None, domain: str | None = None, max_new_tokens: int = 128
) -> Conversation:
    """A conversation with a saved stage, as `residency chat RUN` holds it: `.answer(text)`, `.switch(stage)`.

    Args:
        run: Folder of the run.
        stage: 0 = base, 1 ... T; the last one that is saved by default.
        domain: Whose template; that of the stage's domain by default.
        max_new_tokens: Most tokens of an answer.

    Raises:
        UserError: There is no such run, stage or domain.
    """
    from residency.runs.chat import Conversation
    from residency.runs.open_run import open_run

    return Conversation(open_run(Path(run)), stage=stage, domain=domain, max_new_tokens=max_new_tokens)


def merge(
    exports: Sequence[str | Path],
    output: str | Path,
    *,
    method: str = "linear",
    weights: Sequence[float] | None = None,
    density: float = 0.5,
    seed: int = 0,
    rank: int | None = None,
    base: str | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Several exported stages as one export, as `residency merge` writes it.

    Args:
        exports: Folders that `export` has written: LoRA adapters, or whole models, of one base.
        output: Folder to write.
        method: PEFT's name of it (`runs.export.merge` lists them).
        weights: A factor per export; 1/n each by default.
        density: Share of entries that `ties`, `dare_*` and `magnitude_prune` keep, in (0, 1).
        seed: Of what `dare_*` drops.
        rank: Of the result of `*svd`; the largest of the exports by default.
        base: The base model, where the exports name none on a hub.
        overwrite: Replace an earlier export.

    Raises:
        UserError: The exports do not belong together, or the method is not for them.
    """
    from residency.runs.export.merge import Recipe, merge_exports

    recipe = Recipe(method=method, weights=weights, density=density, seed=seed, rank=rank)
    return merge_exports(exports, output, recipe=recipe, base=base, overwrite=overwrite)


def list_runs(*folders: str | Path) -> list[RunSummary]:
    """Every run in or below some folders, unfinished ones too, the newest last, as `residency ls` lists them.

    Args:
        folders: `runs` and `studies` by default.
    """
    return find_runs([Path(folder) for folder in folders or ("runs", "studies")])


def compare(folders: Sequence[str | Path], *, scorer: str = "nll") -> pl.DataFrame:
    """One row per run below these folders, with the figures of one scorer; null where a run is not finished."""
    rows = [
        {
            "path": str(run.path),
            "status": run.status,
            "stages": run.stages,
            "adapter": run.adapter,
            "mitigations": "+".join(run.mitigations),
            "seed": run.seed,
            **{metric: run.figure(scorer, metric) for metric in ("average", "learning", "bwt", "forgetting")},
        }
        for run in list_runs(*folders)
    ]
    return pl.DataFrame(rows, infer_schema_length=None)

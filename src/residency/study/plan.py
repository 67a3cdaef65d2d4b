"""A study file -> cells. Nothing here runs a model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser

from residency.errors import UserError

__all__ = ["Cell", "Study", "load_study", "plan_cells"]


@dataclass(frozen=True, kw_only=True)
class Study:
    """A factorial study.

    Args:
        name: Its folder is studies/<name>.
        base: Config of a run, relative to the study file.
        axes: {axis: {value: {dotted key: preset file or literal}}}. A preset file is relative to the study file;
            `{}` changes nothing.
        seeds: One run per combination and seed.
        baseline: Which value of the first axis the others are compared with; the first one by default.
        scorer: Which score the comparison is about.
    """

    name: str
    base: str
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    baseline: str | None = None
    scorer: str = "nll"


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study.

    Args:
        id: Safe folder name, unique in the study.
        axes: {axis: value}.
        seed: Its seed.
        words: Command line of `residency fit` that overrides the base config.
    """

    id: str
    axes: Mapping[str, str]
    seed: int
    words: tuple[str, ...]


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Raises:
        UserError: Missing, malformed, unknown keys, or presets that do not exist.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(
            f"cannot read the study {path}: {error}",
            why="a study is a YAML file with name, base and axes",
            fix="start from configs/studies/quickstart.yaml",
        ) from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Study, "study")
    try:
        parsed = parser.parse_object({"study": content})
    except Exception as error:  # the parser has its own exception types per kind of mistake
        raise UserError(
            f"{path}: {' '.join(str(error).split())}",
            why="the study file has a key or a value that is not as described",
            fix="keys are name, base, axes, seeds, baseline, scorer; see configs/studies/quickstart.yaml",
        ) from error
    study = Study(**{key: value for key, value in vars(parsed.study).items()})
    _check(study, path)
    return study


def _check(study: Study, path: Path) -> None:
    if not (path.parent / study.base).is_file():
        raise UserError(
            f"{path}: base is {study.base!r}, and there is no file {path.parent / study.base}",
            why="the base config is looked for relative to the study file",
            fix="correct base",
        )
    empty = [axis for axis, values in study.axes.items() if not values]
    if empty or not study.seeds or len({*study.seeds}) < len(study.seeds):
        raise UserError(
            f"{path}: axes without values {empty}, seeds {study.seeds}",
            why="every axis needs a value and every seed is given once",
            fix="add values, or leave the axis out",
        )
    first = next(iter(study.axes.values()), {})
    if study.baseline is not None and study.baseline not in first:
        raise UserError(
            f"{path}: baseline is {study.baseline!r}; the first axis has {', '.join(first) or 'no values'}",
            why="cells are compared along the first axis",
            fix="name one of its values",
        )


def plan_cells(study: Study, path: Path) -> list[Cell]:
    """Every combination of axis values and seeds, in the order of the file.

    Args:
        study: Checked.
        path: Of its file; presets are relative to it.

    Raises:
        UserError: Two cells would share a folder.
    """
    cells = []
    for values in itertools.product(*(axis.items() for axis in study.axes.values())):
        axes = dict(zip(study.axes, (name for name, _ in values), strict=True))
        for seed in study.seeds:
            cell = "-".join([*(_slug(value) for value in axes.values()), f"s{seed}"])
            words = [word for _, overrides in values for word in _words(overrides, path.parent)]
            words += [f"--seed_everything={seed}", f"--name={cell}", f"--axes={json.dumps(axes)}"]
            cells.append(Cell(id=cell, axes=axes, seed=seed, words=tuple(words)))
    if len({cell.id for cell in cells}) < len(cells):
        raise UserError(
            f"{path}: two axis values give the same folder name",
            why="names are reduced to letters, digits, '.', '_' and '-'",
            fix="rename one of the values",
        )
    return cells


def _words(overrides: Mapping[str, Any], folder: Path) -> list[str]:
    words = []
    for key, value in overrides.items():
        if isinstance(value, str) and value.endswith((".yaml", ".yml", ".json")):
            preset = folder / value
            if not preset.is_file():
                raise UserError(
                    f"{key}: {value}, and there is no file {preset}",
                    why="presets are looked for relative to the study file",
                    fix="correct the path",
                )
            value = str(preset)
        words.append(f"--{key}={value if isinstance(value, str) else json.dumps(value)}")
    return words


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text).strip("._") or "value"

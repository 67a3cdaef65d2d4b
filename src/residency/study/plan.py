"""A study file -> cells. Nothing here runs a model."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from residency.errors import UserError
from residency.written import read_yaml

__all__ = ["Cell", "Study", "load_study", "plan_cells"]

_PRESET = (".yaml", ".yml", ".json")
_LONGEST = 60  # characters of one value in a folder name


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
        words: Command line of `residency fit` without the verb.
    """

    id: str
    axes: Mapping[str, str]
    seed: int
    words: tuple[str, ...]


def load_study(path: Path) -> Study:
    """Read and check a study file.

    Returns:
        The study with absolute paths: it means the same wherever it is stored.

    Raises:
        UserError: Missing, malformed, unknown keys, or presets that do not exist.
    """
    from residency.class_names import class_names
    from residency.mistakes import Refusal, explain
    from residency.parser import ResidencyParser

    content = read_yaml(path, what="the study")
    _check_keys(content, path)
    parser = ResidencyParser()
    parser.add_class_arguments(Study)
    try:
        parsed = parser.parse_object(content)
    except Refusal as refusal:
        raise explain(refusal, ["sweep", "--config", str(path)], class_names()) from refusal
    folder = path.resolve().parent
    axes = {
        _name(axis, path): {_name(value, path): _absolute(keys, folder, path) for value, keys in values.items()}
        for axis, values in parsed.axes.items()
    }
    study = Study(**{**vars(parsed), "axes": axes, "base": str(folder / parsed.base)})
    _check(study, path)
    return study


def _check_keys(content: Any, path: Path) -> None:
    if not isinstance(content, dict):
        raise UserError(
            f"{path} holds {'nothing' if content is None else type(content).__name__}",
            why="a study has name, base and axes",
            fix="start from configs/studies/quickstart.yaml",
        )
    keys = [entry.name for entry in fields(Study)]
    if unknown := [key for key in content if key not in keys]:
        near = get_close_matches(str(unknown[0]), keys, 1)
        raise UserError(
            f"{path} has the key {unknown[0]!r}",
            why=f"a study has only {', '.join(keys)}",
            fix=f"did you mean {near[0]!r}?" if near else "leave it out; what a run is goes into base or axes",
        )


def _name(key: Any, path: Path) -> str:
    """A name of an axis or a value; YAML makes numbers of `8` and truth values of `no`."""
    if isinstance(key, bool) or not isinstance(key, str | int | float):
        raise UserError(
            f"{path}: an axis or one of its values has the name {key!r}",
            why="YAML reads words such as yes, no, on, off and null as something else than text",
            fix="put the name in quotes",
        )
    return str(key)


def _absolute(keys: Mapping[str, Any] | None, folder: Path, path: Path) -> dict[str, Any]:
    """Overrides with absolute paths of their preset files."""
    found = {}
    for key, value in (keys or {}).items():
        if isinstance(value, str) and value.endswith(_PRESET):
            if not (folder / value).is_file():
                raise UserError(
                    f"{path}: {key}: {value}, and there is no file {folder / value}",
                    why="presets are looked for relative to the study file",
                    fix="correct the path",
                )
            value = str(folder / value)
        found[str(key)] = value
    return found


def _check(study: Study, path: Path) -> None:
    from residency.scorers import check_scorers

    if Path(study.name).name != study.name or study.name in ("", ".", ".."):
        raise UserError(
            f"{path}: name is {study.name!r}",
            why="studies/<name> must be one folder in studies",
            fix="give a name without slashes; --study_dir chooses another place",
        )
    if not Path(study.base).is_file():
        raise UserError(
            f"{path}: base is {study.base!r}, and there is no such file",
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
    check_scorers([study.scorer], where=str(path))


def plan_cells(study: Study) -> list[Cell]:
    """Every combination of axis values and seeds, in the order of the file.

    Args:
        study: As `load_study` gives it.

    Raises:
        UserError: Two cells would share a folder.
    """
    cells: dict[str, Cell] = {}
    for values in itertools.product(*(axis.items() for axis in study.axes.values())):
        axes = dict(zip(study.axes, (name for name, _ in values), strict=True))
        for seed in study.seeds:
            cell = "-".join([*(_slug(value) for value in axes.values()), f"s{seed}"])
            words = ["--config", study.base, *(word for _, keys in values for word in _words(keys))]
            words += [f"--seed_everything={seed}", f"--name={cell}", f"--axes={json.dumps(axes)}"]
            # Some file systems do not tell upper from lower case.
            other = cells.setdefault(cell.casefold(), Cell(id=cell, axes=axes, seed=seed, words=tuple(words)))
            if other.axes != axes:
                raise UserError(
                    f"study {study.name}: {dict(other.axes)} and {axes} would share the folder {cell!r}",
                    why="names are reduced to letters, digits, '.', '_' and '-', and joined by '-'",
                    fix="rename one of the values",
                )
    return list(cells.values())


def _words(overrides: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:_LONGEST].strip("._-") or "value"

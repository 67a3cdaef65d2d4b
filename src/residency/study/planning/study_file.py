"""A study file -> cells. Nothing here runs a model."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.garbage import without_collector
from residency.core.presets import component_kind, find_preset, named_file
from residency.core.yaml_files import read_yaml
from residency.study.planning.search_space import Search, check_search, make_search

__all__ = ["Budget", "Study", "load_study"]

_PRESET = (".yaml", ".yml", ".json")


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What every stage may spend.

    Args:
        steps: Optimizer steps per domain.
        tokens: Training tokens per domain: rows of different lengths, equal work.
    """

    steps: int | None = None
    tokens: int | None = None


@dataclass(frozen=True, kw_only=True)
class Study:
    """A factorial study.

    Args:
        name: Its folder is studies/<name>.
        base: Config of a run: the name of a preset, or a file relative to the study file.
        axes: {axis: {value: {dotted key: preset or literal}}}. A preset is a name or a file beside the study;
            `{}` changes nothing.
        exclude: Combinations that are left out, each as {axis: value, or list of values}.
        seeds: One run per combination, order and seed.
        orders: In which orders the domains are learned: `given`; `all` of them; `latin`: as many as there are domains,
            each of them once at every place (and, for an even number, once after every other one); a number n: n
            different random ones; or lists of names.
        references: Runs to compare with, added for every combination of the axes that are not mitigations: `frozen`
            (trains nothing), `prompted` (the same with `data.shots`, or 4, training rows in every prompt),
            `independent` (every domain alone), `joint` (all domains at once, as many steps as the
            whole stream).
        per_domain: Preset of an adapter that keeps a part for every domain; adds runs with it as a reference.
        budget: What all stages share: `{steps: n}` or `{tokens: n}` per domain; by default what the base config says.
        store: Folder of the stages, which studies may share, relative to where the command runs; `store` in the
            study's own folder by default.
        baseline: Which value of the first axis the others are compared with; the first one by default.
        scorer: Which score the comparison is about.
        search: Parameters that are searched before the cells are run, for every combination of the axes on its own.
        executor: Where stages run: `local`, or `ray` (this machine, or the cluster at RAY_ADDRESS).
    """

    name: str
    base: str
    axes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    exclude: list[dict[str, Any]] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0])
    orders: Literal["given", "all", "latin"] | int | list[list[str]] = "given"
    references: list[Literal["frozen", "prompted", "independent", "joint"]] = field(default_factory=list)
    per_domain: str | None = None
    budget: Budget | None = None
    store: str | None = None
    baseline: str | None = None
    scorer: str = "nll"
    search: Search | None = None
    executor: Literal["local", "ray"] = "local"


@without_collector()
def load_study(path: Path) -> Study:
    """Read and check a study file.

    Returns:
        The study with absolute paths: it means the same wherever it is stored.

    Raises:
        UserError: Missing, malformed, unknown keys, or presets that do not exist.
    """
    from residency.runs.config.class_names import class_names
    from residency.runs.config.explain import ParseFailure, explain
    from residency.runs.config.parser import ResidencyParser

    path = named_file(str(path), kinds=("study",), what="the study")
    content = read_yaml(path, what="the study")
    _check_keys(content, path)
    parser = ResidencyParser()
    parser.add_class_arguments(Study)
    try:
        parsed = parser.parse_object(copy.deepcopy(content))
    except ParseFailure as refusal:
        raise explain(refusal, ["sweep", "--config", str(path)], class_names()) from refusal
    folder = path.resolve().parent
    # As written: the parser makes objects of its own from what looks like a class.
    axes = {
        _name(axis, path): {_name(value, path): _absolute(keys, folder, path) for value, keys in values.items()}
        for axis, values in (content.get("axes") or {}).items()
    }
    base = find_preset("config", parsed.base) or folder / parsed.base
    own: dict[str, Any] = {"axes": axes, "base": str(base), "budget": _budget(parsed.budget, path)}
    if parsed.search is not None:
        own["search"] = make_search(
            parsed.search,
            content["search"],
            absolute=lambda value: _absolute({"search": value}, folder, path)["search"],
        )
    if parsed.per_domain is not None:
        own["per_domain"] = _preset("per_domain", parsed.per_domain, "adapter", folder, path)
    study = Study(**{**vars(parsed), **own})
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
    """Overrides with absolute paths of their preset files, which may be given by name."""
    found = ((str(key), value) for key, value in (keys or {}).items())
    return {key: _preset(key, value, component_kind(key), folder, path) for key, value in found}


def _preset(key: str, value: Any, kind: str | None, folder: Path, path: Path) -> Any:
    """The absolute path of a preset that a study names; any other value as it is.

    Args:
        key: Where in the study it stands, for the message.
        value: What stands there.
        kind: Of the presets that may be given by name.
        folder: Of the study file.
        path: The study file.
    """
    if not isinstance(value, str):
        return value
    if kind is not None and (preset := find_preset(kind, value)) is not None:
        return str(preset)
    if not value.endswith(_PRESET):
        return value
    if not (folder / value).is_file():
        raise UserError(
            f"{path}: {key}: {value}, and there is no file {folder / value}",
            why="presets are looked for relative to the study file",
            fix="correct the path",
        )
    return str(folder / value)


def _check(study: Study, path: Path) -> None:
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
    if study.search is not None:
        check_search(study.search, axes=study.axes, seeds=study.seeds, where=str(path))
    _check_exclusions(study, path)
    if (isinstance(study.orders, int) and study.orders < 1) or study.orders == []:
        raise UserError(
            f"{path}: orders is {study.orders}",
            why="a number says how many random orders there are",
            fix="give at least 1, or one of given, all, latin, or lists of domain names",
        )


def _budget(given: Any, path: Path) -> Budget | None:
    if given is None:
        return None
    budget = Budget(**vars(given))
    values = [value for value in (budget.steps, budget.tokens) if value is not None]
    if len(values) != 1 or values[0] < 1:
        raise UserError(
            f"{path}: budget is {{steps: {budget.steps}, tokens: {budget.tokens}}}",
            why="the budget of a domain is counted in steps or in tokens, and is at least 1",
            fix="give one of them, for example budget: {steps: 100}",
        )
    return budget


def _check_exclusions(study: Study, path: Path) -> None:
    for combination in study.exclude:
        for axis, values in combination.items():
            known = study.axes.get(axis, {})
            named = [str(v) for v in (values if isinstance(values, list) else [values])]
            if unknown := [value for value in named if value not in known]:
                near = get_close_matches(unknown[0], known, 1) or get_close_matches(axis, study.axes, 1)
                raise UserError(
                    f"{path}: exclude has {axis}: {unknown[0]}",
                    why=f"the axes are {', '.join(study.axes) or 'none'}; {axis} has {', '.join(known) or 'no values'}",
                    fix=f"did you mean {near[0]!r}?" if near else "name an axis and one of its values",
                )

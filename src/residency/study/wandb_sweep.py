"""A study as a W&B sweep file: a stock agent runs its cells through the flags of `residency fit`, no code of ours.

Parameters arrive on the command line, where DDP and a shell see the same; `wandb.config` configures nothing. Names are
flat and have at most three dots, more than which W&B does not filter by.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from residency.core.errors import UserError
from residency.core.tensor_files import replace_file
from residency.runs.views.flat_config import MAX_DOTS
from residency.study.planning.cells import Cell
from residency.study.planning.search_space import Parameter, Search
from residency.study.planning.study_file import Study

__all__ = ["wandb_sweep", "write_wandb_sweep"]


_COMMAND = ["${env}", "${interpreter}", "-m", "${program}", "fit"]
_HEAD = """\
# {command}
# Start it:  wandb sweep {file}     then, on every machine, in the folder that holds studies/:  wandb agent SWEEP_ID
# Set WANDB_AGENT_DISABLE_FLAPPING=true if first runs may fail. What agents have finished, `residency sweep` finds done.
"""


def write_wandb_sweep(
    study: Study, cells: Sequence[Cell], *, source: Path, path: Path, overwrite: bool = False
) -> None:
    """Write the file.

    Args:
        study: As `load_study` gives it.
        cells: Its cells; references are left to `residency sweep`.
        source: The study file.
        path: Where to write.
        overwrite: Replace a file that is no sweep file of residency.

    Raises:
        UserError: The study cannot be a W&B sweep, or something else lies at `path`.
    """
    if path.exists() and not overwrite and not _is_ours(path):
        raise UserError(
            f"--emit-wandb {path} is there, and no sweep file of residency",
            why="it would be lost",
            fix="choose another name, or add --overwrite to replace it",
        )
    content = wandb_sweep(study, cells, source=source)
    head = _HEAD.format(command=f"residency sweep {source} --emit-wandb {path}", file=path)
    text = head + yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    replace_file(path, lambda temporary: _write(temporary, text))


def wandb_sweep(study: Study, cells: Sequence[Cell], *, source: Path) -> dict[str, Any]:
    """The sweep: a grid over cells, or W&B's own search where the study has a search section.

    Args:
        study: As `load_study` gives it.
        cells: Its cells.
        source: The study file.

    Raises:
        UserError: The study cannot be a W&B sweep.
    """
    own = [cell for cell in cells if cell.reference is None]
    command = [*_COMMAND, f"--study={source.resolve()}"]
    found: dict[str, Any] = {"name": study.name, "project": study.name, "program": "residency"}
    if study.search is None:
        return found | {"method": "grid", "command": [*command, "${args}"], "parameters": _grid(own)}
    search = study.search
    metric = {"name": f"final/{search.scorer or study.scorer}/{search.metric}", "goal": search.towards}
    found |= {"method": "bayes" if search.sampler == "tpe" else "random", "metric": metric, "run_cap": search.trials}
    # Trials start from the first cell of their combination, on other seeds and judged by validation rows.
    command += [f"--cell={own[0].id}", "--split=validation", "${args}"]
    return found | {"command": command, "parameters": _space(search, own)}


def _grid(cells: Sequence[Cell]) -> dict[str, Any]:
    """One parameter per axis, if every combination of their values is a cell; else the cells by name."""
    axes = list(cells[0].axes)
    points = [(*(cell.axes[axis] for axis in axes), cell.seed) for cell in cells]
    columns = [list(dict.fromkeys(column)) for column in zip(*points, strict=True)]
    names = [f"axes.{axis}" for axis in axes]
    simple = all(name.count(".") <= MAX_DOTS and "=" not in name for name in names)
    if not simple or len(points) != len([*itertools.product(*columns)]):
        return {"cell": {"values": [cell.id for cell in cells]}}
    return {name: {"values": values} for name, values in zip([*names, "seed_everything"], columns, strict=True)}


def _space(search: Search, cells: Sequence[Cell]) -> dict[str, Any]:
    if len({tuple(sorted(cell.axes.items())) for cell in cells}) > 1:
        raise UserError(
            "the study has a search section and several combinations of its axes",
            why="every combination is searched on its own, and a W&B sweep is one search",
            fix="leave the axes out of the file for W&B, or let `residency sweep` search",
        )
    return {_flat(key): _parameter(parameter) for key, parameter in search.parameters.items()} | {
        "seed_everything": {"values": list(search.seeds)}
    }


def _flat(key: str) -> str:
    """A key without `init_args`, which the command line does not need."""
    short = ".".join(part for part in key.split(".") if part != "init_args")
    if short.count(".") > MAX_DOTS:
        raise UserError(
            f"search.parameters has {key}",
            why=f"W&B does not filter by names with more than {MAX_DOTS} dots",
            fix="let `residency sweep` search this parameter",
        )
    return short


def _parameter(parameter: Parameter) -> dict[str, Any]:
    if parameter.choices is not None:
        return {"values": [_word(choice) for choice in parameter.choices]}
    low, high = parameter.low, parameter.high
    bounds: Mapping[str, Any] = {"min": low, "max": high}
    if isinstance(low, int) and isinstance(high, int):
        return {"distribution": "q_log_uniform_values", "q": 1, **bounds} if parameter.log else {**bounds}
    return {"distribution": "log_uniform_values" if parameter.log else "uniform", **bounds}


def _word(choice: Any) -> Any:
    """A choice as the command line reads it; an agent would write None and the repr of a list."""
    return choice if isinstance(choice, str | int | float) and choice is not None else json.dumps(choice)


def _is_ours(path: Path) -> bool:
    try:
        return path.read_bytes()[:200].decode(errors="replace").startswith("# residency sweep ")
    except OSError:
        return False


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")

"""`residency fit --study FILE`: one cell of a study by its name or its place, as a command line of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path

from residency.core.errors import UserError
from residency.study.planning.cells import Cell, plan_cells
from residency.study.planning.study_file import Study, load_study

__all__ = ["expand_cell"]

_AXES = "axes."
_SEED = "seed_everything"


def expand_cell(words: Sequence[str]) -> list[str]:
    """Replace `--study` and what chooses a cell by the words of that cell.

    A cell is chosen by `--cell ID`, or by `--axes.<axis> VALUE` for every axis that has several values and
    `--seed_everything`. It runs in its folder of the study, with the study's store; whatever else is given counts more
    than the study, and then the run gets a folder of its own beside the cells.

    Args:
        words: What follows `residency fit`.

    Returns:
        The words, unchanged if they name no study.

    Raises:
        UserError: The study is wrong, or does not have such a cell.
    """
    if not any(word.partition("=")[0] == "--study" for word in words):
        return list(words)
    every = list(_options(words))
    flags = [f"--{key}" for key, value in every if value is None]
    options = [(key, value) for key, value in every if value is not None]
    studies = [value for key, value in options if key == "study"]
    if empty := [flag for flag in flags if _chooses(flag.lstrip("-"), {})]:
        raise UserError(empty[0], why="it has no value", fix=f"write {empty[0]}=VALUE")
    study = load_study(Path(studies[-1]))
    folder = Path("studies") / study.name
    given = dict(options)
    store = given.get("store") or (study.store if study.store else str(folder / "store"))
    cell = _choose(_cells(study, Path(store)), given, Path(studies[-1]))
    rest = [(key, value) for key, value in options if not _chooses(key, given)]
    changes = [(key, value) for key, value in rest if key not in ("run_dir", "store", "name", "wandb.study")]
    name = f"{cell.id}-{_digest(changes)}" if changes else cell.id
    own = {"name": name, "run_dir": str(folder / ("cells" if not changes else "more") / name), "store": store}
    own |= {"wandb.study": study.name} | dict(rest)
    final = [*changes, *((key, own[key]) for key in ("name", "run_dir", "store", "wandb.study"))]
    return [*cell.words, *(f"--{key}={value}" for key, value in final), *flags]


def _options(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(key, value); `--key value` and `--key=value` are the same, and `--key` alone has no value."""
    waiting: str | None = None
    for word in words:
        if waiting is not None and not word.startswith("--"):
            yield waiting, word
            waiting = None
            continue
        if waiting is not None:
            yield waiting, None
            waiting = None
        if not word.startswith("-"):
            raise UserError(
                f"residency fit --study ... {word}",
                why="the word belongs to no option",
                fix="write options as --key=value, and texts with blanks in quotes",
            )
        key, equals, value = word.lstrip("-").partition("=")
        if equals:
            yield key, value
        else:
            waiting = key
    if waiting is not None:
        yield waiting, None


def _chooses(key: str, given: Mapping[str, str]) -> bool:
    """Whether an option says which cell; beside a name, a seed changes the cell instead."""
    by_place = "cell" not in given and (key == _SEED or key.startswith(_AXES))
    return key in ("study", "cell") or by_place


def _digest(changes: Sequence[tuple[str, str]]) -> str:
    from residency.runs.keys import digest

    return digest(sorted(changes))[:10]


def _cells(study: Study, store: Path) -> list[Cell]:
    if study.orders == "given" and not study.references and study.per_domain is None:
        return plan_cells(study)
    from residency.study.planning.prepare import cells_of
    from residency.study.planning.resolve import Resolver

    return cells_of(study, Resolver(study, store))


def _choose(cells: Sequence[Cell], given: Mapping[str, str], path: Path) -> Cell:
    name = given.get("cell")
    if name is not None:
        fits = [cell for cell in cells if cell.id == name]
        near = get_close_matches(name, [cell.id for cell in cells], 1)
        if not fits:
            raise UserError(
                f"--cell={name}",
                why=f"{path} has {len(cells)} cells, and none of that name",
                fix=f"did you mean {near[0]!r}?" if near else f"`residency sweep {path} --dry-run` lists them",
            )
        return fits[0]
    place = {key.removeprefix(_AXES): value for key, value in given.items() if key.startswith(_AXES)}
    own = [cell for cell in cells if cell.reference is None]
    fits = [cell for cell in own if all(cell.axes.get(axis) == value for axis, value in place.items())]
    if _SEED in given:
        fits = [cell for cell in fits if str(cell.seed) == given[_SEED]]
    if len(fits) == 1:
        return fits[0]
    said = ", ".join(f"--{key}={given[key]}" for key in given if _chooses(key, given) and key != "study") or "no choice"
    raise UserError(
        f"{path}: {said}",
        why=f"{len(fits)} of its {len(own)} cells fit" + (f", such as {fits[0].id} and {fits[1].id}" if fits else ""),
        fix=f"give --axes.<axis> for every axis, and --{_SEED}; `residency sweep {path} --dry-run` lists the cells",
    )

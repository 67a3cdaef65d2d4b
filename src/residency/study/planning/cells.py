"""A study -> its cells: every combination of axis values, orders and seeds, and the references. Nothing is run here."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from residency.core.errors import UserError
from residency.study.planning.study_file import Study

__all__ = ["Cell", "Combination", "combinations", "latin_square", "make_cell", "orders_of", "plan_cells", "safe_ids"]

_LONGEST = 60  # characters of one value in a folder name


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a study.

    Args:
        id: Safe folder name, unique in the study.
        axes: {axis: value}.
        seed: Its seed.
        words: Command line of `residency fit` without the verb.
        reference: What kind of reference it is; `None` for a cell of the axes.
    """

    id: str
    axes: Mapping[str, str]
    seed: int
    words: tuple[str, ...]
    reference: str | None = None

    @property
    def place(self) -> dict[str, Any]:
        """What the last words say, in their order: the keys by which a cell differs from another seed of it."""
        return {"seed_everything": self.seed, "name": self.id, "axes": dict(self.axes)}


@dataclass(frozen=True, kw_only=True)
class Combination:
    """One value of every axis.

    Args:
        axes: {axis: value}.
        keys: The overrides of all of them, in the order of the axes.
    """

    axes: Mapping[str, str]
    keys: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """The same for the same place."""
        return json.dumps(dict(self.axes), sort_keys=True)


def combinations(study: Study) -> list[Combination]:
    """Every combination that is not excluded, in the order of the file.

    Raises:
        UserError: All are excluded.
    """
    found = []
    for values in itertools.product(*(axis.items() for axis in study.axes.values())):
        axes = dict(zip(study.axes, (name for name, _ in values), strict=True))
        if not any(_fits(axes, excluded) for excluded in study.exclude):
            found.append(Combination(axes=axes, keys=tuple(keys for _, keys in values)))
    if not found:
        raise UserError(
            f"study {study.name}: every combination is excluded",
            why="there is nothing to run",
            fix="remove an entry of exclude",
        )
    return found


def _fits(axes: Mapping[str, str], excluded: Mapping[str, Any]) -> bool:
    return all(
        axes[axis] in [str(v) for v in (values if isinstance(values, list) else [values])]
        for axis, values in excluded.items()
    )


def plan_cells(
    study: Study, *, domains: Sequence[str] = (), found: Mapping[str, Mapping[str, Any]] | None = None
) -> list[Cell]:
    """Every combination of axis values, orders and seeds, in the order of the file.

    Args:
        study: As `load_study` gives it.
        domains: Names in the given order; needed where `orders` is another than `given`.
        found: {name of a combination: overrides that a search has found for it}.

    Raises:
        UserError: Two cells would share a folder.
    """
    orders = orders_of(study, domains)
    cells = []
    for combination in combinations(study):
        for order in orders:
            axes, keys = dict(combination.axes), [*combination.keys, (found or {}).get(combination.name, {})]
            if order is not None:
                axes["order"] = order_name(order, orders)
                keys.append({"data.order": list(order)})
            cells += [make_cell(study, axes, keys, seed) for seed in study.seeds]
    safe_ids(study, cells)
    return cells


def make_cell(
    study: Study,
    axes: Mapping[str, str],
    keys: Sequence[Mapping[str, Any]],
    seed: int,
    *,
    reference: str | None = None,
    last: Mapping[str, Any] | None = None,
) -> Cell:
    """One cell from its overrides.

    Args:
        study: Base and budget.
        axes: Its place.
        keys: Overrides, later ones count.
        seed: Its seed.
        reference: Kind, for a reference.
        last: Overrides that count more than the study's budget.
    """
    cell = "-".join([*(_slug(value) for value in axes.values()), f"s{seed}"])
    budget = study.budget
    spend: dict[str, Any] = {}
    if budget is not None:
        spend = {"trainer.max_steps": budget.steps} if budget.steps else {"stage_tokens": budget.tokens}
    words = ["--config", study.base, *(word for part in [*keys, spend, last or {}] for word in _words(part))]
    words += [f"--seed_everything={seed}", f"--name={cell}", f"--axes={json.dumps(dict(axes))}"]
    return Cell(id=cell, axes=axes, seed=seed, words=tuple(words), reference=reference)


def safe_ids(study: Study, cells: Sequence[Cell]) -> None:
    """No two cells may share a folder; some file systems do not tell upper from lower case.

    Raises:
        UserError: Two would.
    """
    known: dict[str, Cell] = {}
    for cell in cells:
        other = known.setdefault(cell.id.casefold(), cell)
        if other is not cell:
            raise UserError(
                f"study {study.name}: {dict(other.axes)} and {dict(cell.axes)} would share the folder {cell.id!r}",
                why="names are reduced to letters, digits, '.', '_' and '-', and joined by '-'",
                fix="rename one of the values",
            )


# -- orders -----------------------------------------------------------------------------------------------------


def orders_of(study: Study, domains: Sequence[str]) -> list[tuple[str, ...] | None]:
    """The orders in which domains are learned; `[None]` = as the config says.

    Raises:
        UserError: There are not that many.
    """
    wanted = study.orders
    if wanted == "given":
        return [None]
    if isinstance(wanted, list):
        return [tuple(order) for order in wanted]
    if wanted == "latin":
        return list(latin_square(domains))
    if wanted == "all":
        return list(itertools.permutations(domains))
    if wanted > math.factorial(len(domains)):
        raise UserError(
            f"study {study.name}: orders is {wanted}, and {len(domains)} domains have "
            f"{math.factorial(len(domains))} orders",
            why="the orders of a study are different from each other",
            fix="give a smaller number, or orders: all",
        )
    return list(_random_orders(domains, wanted))


def _random_orders(domains: Sequence[str], count: int) -> Iterator[tuple[str, ...]]:
    """The given order, then drawn ones."""
    from residency.core.randomness import permutation

    # Not the seeds of the runs: order and seed are crossed, so that their effects can be told apart.
    given = tuple(range(len(domains)))
    seen: set[tuple[int, ...]] = {given}
    yield tuple(domains)
    for draw in itertools.count():
        if len(seen) == count:
            return
        order = permutation(len(domains), 0, "orders", draw)
        if order not in seen:
            seen.add(order)
            yield tuple(domains[i] for i in order)


def latin_square(names: Sequence[str]) -> Iterator[tuple[str, ...]]:
    """n orders of n names, each name once at every place; the first one is the given order.

    For even n every name also follows every other one exactly once (Williams 1949), so that what a domain does to the
    next one is balanced.
    """
    n = len(names)
    zigzag = [0] + [(i + 1) // 2 if i % 2 else n - i // 2 for i in range(1, n)]
    # Relabelled so that the first row reads as the names do.
    label = dict(zip(zigzag, names, strict=True))
    for shift in range(n):
        yield tuple(label[(place + shift) % n] for place in zigzag)


def order_name(order: Sequence[str], orders: Sequence[Any]) -> str:
    """A short name of an order."""
    text = ">".join(order)
    return text if len(text) <= _LONGEST else f"order {orders.index(tuple(order)) + 1}"


def _words(overrides: Mapping[str, Any]) -> list[str]:
    return [f"--{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in overrides.items()]


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "_", text)[:_LONGEST].strip("._-") or "value"

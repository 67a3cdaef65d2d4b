"""What `residency store` does: list, verify, collect."""

from __future__ import annotations

import argparse
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from residency.core.errors import EXIT_DONE, EXIT_SOME_FAILED, UserError
from residency.core.markers import owns
from residency.core.text import for_terminal
from residency.runs.store.collect import Item, leftovers, remove, size_of, unneeded
from residency.runs.store.store import KINDS, STORE, Store

__all__ = ["carry_out"]

_MIB = 2**20


def carry_out(options: argparse.Namespace) -> int:
    """Carry out what was asked for.

    Args:
        options: Of `residency store`: the verb, the store, and for `gc` what may go.

    Returns:
        Exit code.
    """
    _check_store(options.store)
    console = Console()
    store = Store(options.store, on_message=lambda text: _say(console, text))
    if options.verb == "ls":
        return _list(store, console)
    if options.verb == "verify":
        return _verify(store, console)
    unused, limit = _days(options.unused), _size(options.max_size)
    return _collect(store, console, unused=unused, limit=limit, sure=options.yes)


def _say(console: Console, text: str) -> None:
    console.print(for_terminal(text), markup=False, highlight=False)


def _check_store(path: Path) -> None:
    if not path.is_dir():
        raise UserError(
            f"no store in {path}",
            why="there is no such folder",
            fix="give the folder that `residency sweep` names, by default studies/<name>/store",
        )
    if not owns(path, STORE):
        raise UserError(
            f"{path} is no store (no {STORE.marker} in it)",
            why="its files belong to something else, and would be moved or deleted",
            fix="give the folder that `residency sweep` names, by default studies/<name>/store",
        )


def _list(store: Store, console: Console) -> int:
    table = Table(title=for_terminal(store.path))
    for column, side in (("kind", "left"), ("entries", "right"), ("MiB", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    total = 0
    for kind in KINDS:
        sizes = [size_of(store.entry_path(kind, key))[0] for key in store.keys(kind)]
        total += sum(sizes)
        table.add_row(kind, str(len(sizes)), f"{sum(sizes) / _MIB:.1f}")
    for name in ("work", "aside"):
        folder = store.path / name
        places = sorted(folder.iterdir()) if folder.is_dir() else []
        size = sum(size_of(place)[0] for place in places)
        total += size
        table.add_row(name, str(len(places)), f"{size / _MIB:.1f}")
    table.add_section()
    table.add_row("all", "", f"{total / _MIB:.1f}")
    console.print(table)
    return EXIT_DONE


def _verify(store: Store, console: Console) -> int:
    good = bad = 0
    unread = []
    for kind in KINDS:
        for key in store.keys(kind):
            try:
                bad, good = (bad + 1, good) if store.find(kind, key) is None else (bad, good + 1)
            except UserError as error:
                unread.append(f"{kind}/{key[:12]}: {error.got}")
    console.print(f"{good} entries are what was written, {bad} were damaged and have been set aside")
    for line in unread:
        _say(console, f"not checked, and left where it is: {line}")
    return EXIT_SOME_FAILED if bad or unread else EXIT_DONE


def _collect(store: Store, console: Console, *, unused: float | None, limit: int | None, sure: bool) -> int:
    left, entries = list(leftovers(store)), unneeded(store, unused=unused, limit=limit)
    for line in _described([*left, *entries]):
        console.print(line, highlight=False)
    if entries and not sure:
        raise UserError(
            f"{len(entries)} complete entries would be removed from {store.path} (listed above); nothing has been",
            why="what they hold would have to be trained or scored again when it is asked for",
            fix="add --yes to remove them",
        )
    freed, failed = remove(store, [*left, *entries])
    for text in failed:
        _say(console, f"not removed: {text}")
    stays = sum(size_of(store.entry_path(kind, key))[0] for kind in KINDS for key in store.keys(kind))
    console.print(
        f"{freed / _MIB:.1f} MiB freed ({len(entries)} entries and what was left over); {stays / _MIB:.1f} MiB stay. "
        "Complete cells keep their own files."
    )
    return EXIT_SOME_FAILED if failed else EXIT_DONE


def _described(items: Sequence[Item]) -> list[str]:
    """What goes, by kind, with number and size."""
    groups: dict[str, list[Item]] = defaultdict(list)
    for item in items:
        groups[item.what].append(item)
    return [
        f"  {what}: {len(own)}, {sum(item.size for item in own) / _MIB:.1f} MiB" for what, own in sorted(groups.items())
    ]


def _days(days: float | None) -> float | None:
    if days is not None and not (math.isfinite(days) and days >= 0):
        raise UserError(
            f"--unused {days}",
            why="it counts days since an entry was last used",
            fix="give 0 (all entries) or a positive number, for example --unused 30",
        )
    return days


def _size(text: str | None) -> int | None:
    if text is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)i?B?", text.strip(), re.IGNORECASE)
    if found is None:
        raise UserError(
            f"--max-size {text}",
            why="a size is a number with K, M, G or T",
            fix="for example --max-size 20G",
        )
    return int(float(found[1]) * 1024 ** " KMGT".index(found[2].upper() or " "))

"""`residency store ls | verify | gc`: what a store holds, whether it can be trusted, and how to shrink it."""

from __future__ import annotations

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from rich.console import Console
from rich.table import Table

from residency.core.errors import EXIT_DONE, EXIT_SOME_FAILED, UserError
from residency.core.leases import owner_is_dead
from residency.runs.store.store import KINDS, RECORD, EntryKind, Store

__all__ = ["store_command"]

_DAY = 86400.0


def store_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency store`.
    """
    parser = argparse.ArgumentParser(prog="residency store", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, text in (
        ("ls", "what there is, by kind, with sizes"),
        (
            "verify",
            "compare every file with its hash; damaged entries are set aside, and made anew when needed",
        ),
        ("gc", "remove what is left over; with --unused or --max-size also entries, those not used for longest first"),
    ):
        one = verbs.add_parser(verb, help=text, description=text)
        one.add_argument("store", type=Path, help="the folder, for example studies/quickstart/store")
    gc = verbs.choices["gc"]
    gc.add_argument("--unused", type=float, metavar="DAYS", help="remove entries that were not used for so many days")
    gc.add_argument("--max-size", metavar="SIZE", help="remove entries until the store is not larger: 500M, 20G")
    options = parser.parse_args(words)
    if not options.store.is_dir():
        raise UserError(
            f"no store in {options.store}",
            why="there is no such folder",
            fix="give the folder that `residency sweep` names, by default studies/<name>/store",
        )
    console, store = Console(), Store(options.store, on_message=lambda text: Console().print(text, highlight=False))
    if options.verb == "ls":
        return _list(store, console)
    if options.verb == "verify":
        return _verify(store, console)
    return _collect(store, console, unused=options.unused, limit=_size(options.max_size))


def _list(store: Store, console: Console) -> int:
    table = Table(title=str(store.path))
    for column, side in (("kind", "left"), ("entries", "right"), ("MiB", "right")):
        table.add_column(column, justify=side)  # type: ignore[arg-type]
    total = 0
    for kind in KINDS:
        sizes = [_bytes(store.entry_path(kind, key)) for key, _ in store.entries(kind)]
        total += sum(sizes)
        table.add_row(kind, str(len(sizes)), f"{sum(sizes) / 2**20:.1f}")
    for name in ("work", "aside"):
        places = _children(store.path / name)
        size = sum(_bytes(place) for place in places)
        total += size
        table.add_row(name, str(len(places)), f"{size / 2**20:.1f}")
    table.add_section()
    table.add_row("all", "", f"{total / 2**20:.1f}")
    console.print(table)
    return EXIT_DONE


def _verify(store: Store, console: Console) -> int:
    good = bad = 0
    for kind in KINDS:
        for key in [key for key, _ in store.entries(kind)]:
            if store.find(kind, key) is None:
                bad += 1
            else:
                good += 1
    console.print(f"{good} entries are what was written, {bad} were damaged and have been set aside")
    return EXIT_SOME_FAILED if bad else EXIT_DONE


def _collect(store: Store, console: Console, *, unused: float | None, limit: int | None) -> int:
    freed = sum(_remove(place) for place in _leftovers(store))
    used = [(_last_use(store, kind, key), kind, key) for kind in KINDS for key, _ in store.entries(kind)]
    total = sum(_bytes(store.entry_path(kind, key)) for _, kind, key in used)
    count = 0
    for when, kind, key in sorted(used):
        old = unused is not None and time.time() - when > unused * _DAY
        if old or (limit is not None and total > limit):
            size = _remove(store.entry_path(kind, key))
            total, freed, count = total - size, freed + size, count + 1
    console.print(
        f"{freed / 2**20:.1f} MiB freed ({count} entries and what was left over); {total / 2**20:.1f} MiB stay. "
        "Complete cells keep their own files."
    )
    return EXIT_DONE


def _leftovers(store: Store) -> Iterator[Path]:
    """What nobody will ask for again: half-written entries and leases of the dead, damaged entries, finished work."""
    yield from _children(store.path / "aside")
    for lease in _children(store.path / "leases"):
        if owner_is_dead(lease):
            yield lease
    held = {lease.name for lease in _children(store.path / "leases")}
    for work in _children(store.path / "work"):
        if f"trained-{work.name}" not in held and store.has("trained", work.name):
            yield work
    for half in _children(store.path / "tmp"):
        with suppress(OSError):
            if time.time() - half.stat().st_mtime > _DAY:
                yield half


def _last_use(store: Store, kind: EntryKind, key: str) -> float:
    with suppress(OSError):
        return (store.entry_path(kind, key) / RECORD).stat().st_mtime
    return 0.0


def _children(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _bytes(place: Path) -> int:
    files = [place] if place.is_file() else [file for file in place.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _remove(place: Path) -> int:
    size = _bytes(place)
    if place.is_dir():
        shutil.rmtree(place, ignore_errors=True)
    else:
        place.unlink(missing_ok=True)
    return size


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

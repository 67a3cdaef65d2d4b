"""What `residency store gc` may remove: only what the store's own naming proves to be its own."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from residency.core.leases import owner_is_dead
from residency.runs.store.store import KEY, KINDS, RECORD, EntryKind, Store

__all__ = ["Item", "leftovers", "remove", "size_of", "unneeded"]

_DAY = 86400.0
_KIND = "|".join(KINDS)
# Every name that the store gives, and no other; `[0-9a-f]` as secrets.token_hex writes them.
_ASIDE = re.compile(rf"({_KIND})-{KEY.pattern}-[0-9a-f]{{8}}")
_LEASE = re.compile(rf"\.?({_KIND})-{KEY.pattern}(\.dead)?(\.[0-9a-f]{{12}})?")
_HALF = re.compile(r"\d+-[0-9a-f]{12}")


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something that may go.

    Args:
        path: The file or folder.
        what: Its kind in words.
        size: Bytes of its files.
        shared: Bytes of those that have another name elsewhere (in the folder of a run), which removing frees not.
    """

    path: Path
    what: str
    size: int
    shared: int = 0


def leftovers(store: Store) -> Iterator[Item]:
    """What nobody will ask for again: half-written entries and leases of the dead, damaged entries, finished work."""
    for place in _named(store.path / "aside", _ASIDE):
        yield _item(place, "damaged entry")
    living = set()
    for lease in _named(store.path / "leases", _LEASE):
        if owner_is_dead(lease):
            yield _item(lease, "lease")
        else:
            living.add(lease.name)
    for work in _named(store.path / "work", KEY):
        if f"trained-{work.name}" not in living and store.has("trained", work.name):
            yield _item(work, "checkpoint")
    for half in _named(store.path / "tmp", _HALF):
        with suppress(OSError):
            if time.time() - half.lstat().st_mtime > _DAY:
                yield _item(half, "half-written entry")


def unneeded(store: Store, *, unused: float | None, limit: int | None) -> list[Item]:
    """Entries that go by age or size, those not used for longest first.

    Args:
        store: The store.
        unused: Days without use after which an entry goes.
        limit: Bytes that the entries may have together.
    """
    kinds: Sequence[EntryKind] = KINDS
    used = sorted((_last_use(store.entry_path(kind, key)), kind, key) for kind in kinds for key in store.keys(kind))
    found = {(kind, key): _item(store.entry_path(kind, key), kind) for _, kind, key in used}
    total = sum(item.size for item in found.values())
    gone = []
    for when, kind, key in used:
        item = found[kind, key]
        if (unused is not None and time.time() - when > unused * _DAY) or (limit is not None and total > limit):
            gone.append(item)
            total -= item.size
    return gone


def remove(store: Store, items: Sequence[Item]) -> tuple[int, list[str]]:
    """Delete; (bytes that are free now, what could not be removed and why)."""
    freed, failed = 0, []
    for item in items:
        grave = store.path / "tmp" / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            # A reader sees a whole entry or none, never one that is half gone.
            grave.parent.mkdir(exist_ok=True)
            os.rename(item.path, grave)
            shutil.rmtree(grave) if grave.is_dir() and not grave.is_symlink() else grave.unlink()
            freed += item.size - item.shared
        except FileNotFoundError:
            continue
        except OSError as error:
            failed.append(f"{item.path}: {error.strerror}")
    return freed, failed


def size_of(place: Path) -> tuple[int, int]:
    """(bytes, bytes of files that have another name too); links are not followed."""
    size = shared = 0
    places = [place] if not place.is_dir() or place.is_symlink() else place.rglob("*")
    for file in places:
        with suppress(OSError):
            if file.is_symlink() or not file.is_dir():
                found = file.lstat()
                size += found.st_size
                shared += found.st_size if found.st_nlink > 1 else 0
    return size, shared


def _named(folder: Path, pattern: re.Pattern[str]) -> list[Path]:
    """Children of a folder of the store whose names the store has given."""
    return sorted(c for c in folder.iterdir() if pattern.fullmatch(c.name)) if folder.is_dir() else []


def _last_use(place: Path) -> float:
    with suppress(OSError):
        return (place / RECORD).stat().st_mtime
    return 0.0


def _item(place: Path, what: str) -> Item:
    size, shared = size_of(place)
    return Item(path=place, what=what, size=size, shared=shared)

"""A content-addressed store of stages: each entry is a folder that is there whole or not at all.

    STORE/
      store.json          says that the folder is a store: nothing is written into or deleted from one without it
      trained/<key>/      weights after training, state of the mitigations that took part, history of the steps
      finished/<key>/     weights and states after what follows training
      evaluations/<key>/  scores of every row of one column
      models/<key>/       size and layout of a backbone with its adapter
      data/<key>/         rows of a domain, so that they are read and checked once per study
      work/<key>/         checkpoints of stages that are being trained
      leases/             who is working on what
      aside/              entries that were damaged, with the reason

An entry is written under a temporary name, synced and renamed. `entry.json` holds the SHA-256 of every file of it and
of itself; it is compared on every read. An entry that does not fit is set aside and made anew, never trusted. One that
cannot be read (permissions, a failing disk) is neither: nothing is known about it, and the command ends.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from residency.core.digests import Damaged, check_files, digest_file, lost_or_unreadable, seal, unseal
from residency.core.errors import UserError
from residency.core.leases import lease
from residency.core.markers import FolderKind, claim, is_marker
from residency.core.tensor_files import explained, sync_folder

__all__ = ["KEY", "KINDS", "STORE", "Entry", "EntryKind", "Store", "link_or_copy"]

EntryKind = Literal["trained", "finished", "evaluations", "models", "data"]
KINDS: tuple[EntryKind, ...] = ("trained", "finished", "evaluations", "models", "data")
SCHEMA = 1
RECORD = "entry.json"
KEY = re.compile(r"[0-9a-f]{64}")
_ROOMS = {*KINDS, "work", "leases", "aside", "tmp"}


def _made_before_markers(path: Path) -> bool:
    """Whether everything in a folder has the names of a store, and one entry is what was written."""
    held = [child for child in path.iterdir() if not is_marker(child.name, STORE)]
    if not held or any(child.name not in _ROOMS or not child.is_dir() for child in held):
        return False
    entries = [entry for kind in KINDS for entry in (path / kind).glob("*") if KEY.fullmatch(entry.name)]
    for entry in entries[:20]:
        with suppress(OSError, Damaged, UserError):
            return bool(_record(entry))
    return False


STORE = FolderKind(name="store", option="--store", proof=_made_before_markers)


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry, checked.

    Args:
        path: Its folder.
        meta: What was stored beside the files; plain JSON.
        files: {name: {"bytes", "sha256"}}.
        made: Seconds since 1970.
    """

    path: Path
    meta: Mapping[str, Any]
    files: Mapping[str, Mapping[str, Any]]
    made: float

    @property
    def size(self) -> int:
        """Bytes of its files."""
        return sum(int(file["bytes"]) for file in self.files.values())


class Store:
    """Entries by kind and key.

    Args:
        path: The folder; made when first written to. May be shared by studies, processes and machines.
        on_message: Called with a sentence when an entry had to be set aside.
    """

    def __init__(self, path: Path, *, on_message: Callable[[str], None] = lambda text: None) -> None:
        self.path = path
        self.on_message = on_message
        self._claimed = False

    def claim(self) -> None:
        """Make the folder, or see that it is a store.

        Raises:
            UserError: Something else lies there.
        """
        if not self._claimed:
            try:
                claim(self.path, STORE)
            except OSError as error:
                raise explained(error, self.path) from error
            self._claimed = True

    def entry_path(self, kind: EntryKind, key: str) -> Path:
        """Folder of an entry, whether or not it is there."""
        return self.path / kind / key

    def has(self, kind: EntryKind, key: str) -> bool:
        """Whether an entry is there; its content is not looked at."""
        return (self.entry_path(kind, key) / RECORD).is_file()

    def find(self, kind: EntryKind, key: str) -> Entry | None:
        """An entry whose every file has been compared with its hash; `None` if there is none that can be trusted.

        Raises:
            UserError: It may be whole, but cannot be read.
        """
        folder = self.entry_path(kind, key)
        if not os.path.lexists(folder):
            return None
        try:
            entry = check_entry(folder)
        except Damaged as damage:
            self.quarantine(kind, key, reason=str(damage))
            return None
        # When it was last of use, for `gc`.
        with suppress(OSError):
            os.utime(folder / RECORD)
        return entry

    def quarantine(self, kind: EntryKind, key: str, *, reason: str) -> None:
        """Take an entry that cannot be trusted out of the way; it is kept to be looked at until `gc`."""
        target = self.path / "aside" / f"{kind}-{key}-{secrets.token_hex(4)}"
        with suppress(OSError):
            target.parent.mkdir(parents=True, exist_ok=True)
            os.rename(self.entry_path(kind, key), target)
            self.on_message(f"store: {kind}/{key[:12]} was damaged and is made anew ({reason[:120]})")
            (target / "reason.txt").write_text(reason + "\n", encoding="utf-8")

    def put(self, kind: EntryKind, key: str, write: Callable[[Path], None], *, meta: Mapping[str, Any]) -> Entry:
        """Add an entry; if somebody was faster, theirs stays.

        Args:
            kind: Its kind.
            key: Its key.
            write: Called with a folder to write files into.
            meta: Plain JSON that is stored beside them.

        Raises:
            UserError: No room on disk, or no permission; nothing half written stays.
        """
        self.claim()
        folder = self.path / "tmp" / f"{os.getpid()}-{secrets.token_hex(6)}"
        try:
            folder.mkdir(parents=True)
            write(folder)
            files = {file.name: digest_file(file, sync=True) for file in sorted(folder.iterdir())}
            entry = {"schema": SCHEMA, "kind": kind, "key": key, "made": time.time(), "meta": meta, "files": files}
            text = json.dumps(seal(entry), ensure_ascii=False, allow_nan=False)
            (folder / RECORD).write_text(text, encoding="utf-8")
            digest_file(folder / RECORD, sync=True)
            sync_folder(folder)
            self._publish(folder, self.entry_path(kind, key))
        except OSError as error:
            raise explained(error, self.entry_path(kind, key)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        found = self.find(kind, key)
        if found is None:
            raise UserError(
                f"{self.entry_path(kind, key)} does not read as it was written",
                why="the disk or the network file system returned other bytes than it was given",
                fix="check the disk; choose another --store",
            )
        return found

    def _publish(self, folder: Path, final: Path) -> None:
        final.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            try:
                os.rename(folder, final)
            except OSError:
                # Somebody else's entry (a folder that is not empty cannot be replaced): equal by construction.
                if not final.is_dir():
                    raise
        sync_folder(final.parent)

    def lease(self, kind: EntryKind, key: str, **options: Any) -> AbstractContextManager[bool]:
        """Hold the right to make an entry (see `residency.core.leases.lease`); not needed once it is there."""
        self.claim()
        path = self.path / "leases" / f"{kind}-{key}"
        return lease(path, already_done=lambda: self.has(kind, key), **options)

    def work(self, key: str) -> Path:
        """Folder for what a stage in training must not lose."""
        return self.path / "work" / key

    def forget_work(self, key: str) -> None:
        """Its stage is complete."""
        shutil.rmtree(self.work(key), ignore_errors=True)

    def keys(self, kind: EntryKind) -> list[str]:
        """Of every entry of a kind, by its name alone; what else lies there is not the store's."""
        folder = self.path / kind
        return sorted(entry.name for entry in folder.iterdir() if KEY.fullmatch(entry.name)) if folder.is_dir() else []

    def entries(self, kind: EntryKind) -> Iterator[tuple[str, Mapping[str, Any] | None]]:
        """(key, record) of every entry of a kind; `None` where the record cannot be read. Files are not compared."""
        for key in self.keys(kind):
            try:
                yield key, _record(self.entry_path(kind, key))
            except (Damaged, UserError):
                yield key, None


def check_entry(folder: Path) -> Entry:
    """Read an entry and compare every file with its hash.

    Raises:
        Damaged: Something does not fit; the message says what.
        UserError: A file cannot be read.
    """
    record = _record(folder)
    check_files(folder, record["files"])
    return Entry(path=folder, meta=record["meta"], files=record["files"], made=record["made"])


def _record(folder: Path) -> Mapping[str, Any]:
    try:
        content = (folder / RECORD).read_bytes()
    except OSError as error:
        raise lost_or_unreadable(error, folder / RECORD) from error
    try:
        return unseal(json.loads(content), name=RECORD)
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{RECORD}: {' '.join(str(error).split())}") from error


def link_or_copy(source: Path, target: Path) -> None:
    """The same file under another name: a hard link where the file system has them, else a copy; atomic.

    Raises:
        UserError: No room on disk.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
            digest_file(temporary, sync=True)
        os.replace(temporary, target)
        sync_folder(target.parent)
    except OSError as error:
        raise explained(error, target) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)

"""What one pass over a large file has kept, on disk: the next process, and a run that goes on, need not read it again.

The file is told by what the system says of it. Its time of change (ctime) is none that a program can set, so every file
that was written to, replaced or moved is read anew.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency.core.assets.cache import cache_folder
from residency.core.digests import Damaged, seal, unseal
from residency.core.errors import UserError
from residency.core.tensor_files import read_json, write_json
from residency.core.types import Row, Split
from residency.domains.kept_files import delete_unused, held, reading_code
from residency.domains.left_out import LeftOut
from residency.domains.row_values import row_of, row_values

__all__ = ["StreamedRows", "stream_key", "streamed_rows"]

_SETTLED = 2.0  # seconds; of a file that changed within them, times may not tell a further change


@dataclass(frozen=True, kw_only=True)
class StreamedRows:
    """What a pass over the files of a domain leaves.

    Args:
        rows: The rows that its limits keep, in hash order.
        given: How many rows there are.
        unread: What makes no row.
    """

    rows: Mapping[Split, Sequence[Row]]
    given: Mapping[Split, int]
    unread: Sequence[LeftOut]

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        rows = {split: [row_values(row) for row in part] for split, part in self.rows.items()}
        return {"rows": rows, "given": {**self.given}, "unread": [one.plain() for one in self.unread]}


def stream_key(files: Iterable[Path], options: Any) -> str | None:
    """SHA-256 of everything that decides what a pass keeps; `None` if it cannot be told yet (a file is new or gone).

    Args:
        files: Everything that is read.
        options: How, as JSON values.
    """
    states = []
    try:
        for path in sorted(files):
            found = path.stat()
            if time.time() - max(found.st_ctime, found.st_mtime) < _SETTLED:
                return None
            states.append([str(path.resolve()), found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns])
    except OSError:
        return None
    return hashlib.sha256(json.dumps([states, options, reading_code()], sort_keys=True).encode()).hexdigest()


def streamed_rows(key: str | None, read: Callable[[], StreamedRows]) -> StreamedRows:
    """What was kept under a key, or what `read` keeps, written there.

    Args:
        key: `stream_key` of the files before they are read; `None` reads them.
        read: Goes through them.

    Raises:
        UserError: Of `read`. Where nothing can be written, every process reads.
    """
    if key is None:
        return read()
    path = cache_folder() / "rows" / f"{key}.json"
    if (found := _read(path)) is not None:
        return found
    with held(path, path.is_file):
        if (found := _read(path)) is not None:
            return found
        found = read()
        with suppress(UserError, OSError):
            delete_unused(path.parent, "*.json")
            write_json(path, seal(found.plain()))
    return found


def _read(path: Path) -> StreamedRows | None:
    """What lies there, if it is whole; a file that is damaged is made again."""
    if not path.is_file():
        return None
    try:
        found = unseal(read_json(path), name=path.name, keys=("rows", "given", "unread"))
        rows = {split: [row_of(values) for values in part] for split, part in found["rows"].items()}
        unread = [LeftOut(**one) for one in found["unread"]]
    except (UserError, Damaged, TypeError, ValueError, IndexError, AttributeError):
        return None
    with suppress(OSError):
        path.touch()
    return StreamedRows(rows=rows, given=found["given"], unread=unread)

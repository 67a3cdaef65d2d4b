"""When files that a config names were written last, so that what has not changed need not be read again; no torch."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

__all__ = ["file_stamps"]

_LONGEST = 1000  # characters of a path


def file_stamps(values: Iterable[Any]) -> dict[str, Any]:
    """{path: size and time of change} of every value that names a file, or a folder with files in it.

    Args:
        values: Of a config; what is no text, or names nothing on this disk, has no stamp.
    """
    stamps: dict[str, Any] = {}
    for value in values:
        if isinstance(value, str) and 0 < len(value) < _LONGEST:
            with suppress(OSError, ValueError):
                files = sorted(Path(value).iterdir()) if Path(value).is_dir() else [Path(value)]
                stats = [(file.name, file.stat()) for file in files if file.is_file()]
                stamps |= {value: [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]} if stats else {}
    return stamps

"""What a model has written for an augmentation, kept: every process and every resumed run learns from equal rows.

Sampling need not repeat on another machine or another version of a library. So the first process writes its attempts
down, in the cache of assets, under a key of all that they depend on; everybody else reads them.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from residency.core.assets.cache import cache_folder
from residency.core.digests import Damaged, seal, unseal
from residency.core.errors import UserError
from residency.core.leases import lease
from residency.core.tensor_files import read_json, write_json
from residency.domains.augmentation.base import Asked, Attempt, Augmentation, Material
from residency.domains.augmentation.children import Written
from residency.domains.row_values import row_values

__all__ = ["attempts_key", "written"]

_VERSION = 1  # of the filters and the requests: another one writes anew


def attempts_key(method: Augmentation, asked: Sequence[Asked], material: Material) -> str:
    """SHA-256 of everything that decides what is written: method, rows, labels, template, model."""
    template: Any = material.template
    parts = [
        _VERSION,
        [method.name, method.identity()],
        [[one.number, *row_values(one.parent)] for one in asked],
        [[row.id, row.prompt] for row in material.rows],  # seeds of new ones
        list(material.labels),
        None if template is None else asdict(template),
        dict(material.base.identity()) if method.needs_base and material.base is not None else None,
    ]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def written(method: Augmentation, asked: Sequence[Asked], material: Material) -> Written:
    """The attempts of a method: those that were written down, or made now and, if a model makes them, written down.

    Args:
        method: The method.
        asked: What it is asked for.
        material: What it works on.

    Raises:
        UserError: Something that it needs is missing, or there is no room for what it wrote.
    """
    if not method.kept_in_cache:
        return Written(attempts=tuple(method.attempts(asked, material)))
    path = cache_folder() / "augmented" / f"{attempts_key(method, asked, material)}.json"
    if (found := _read(path, len(asked))) is not None:
        return found
    try:
        with lease(path.with_suffix(".lease"), already_done=lambda: _read(path, len(asked)) is not None):
            # Whoever waited for another process finds what it wrote; if that was killed, the lease is held now.
            if (found := _read(path, len(asked))) is None:
                found = _made(method, asked, material)
                costs = {"tokens": found.tokens, "seconds": found.seconds}
                write_json(path, seal({"attempts": [asdict(one) for one in found.attempts], **costs}))
            return found
    except OSError as error:
        raise UserError(
            f"{path.parent} cannot be written: {error.strerror or error}",
            why="what a model writes is kept there, so that every process learns from the same rows",
            fix="set RESIDENCY_CACHE to a folder that you may write to",
        ) from error


def _made(method: Augmentation, asked: Sequence[Asked], material: Material) -> Written:
    base = material.base if method.needs_base else None
    begun, before = time.perf_counter(), method.tokens + (base.tokens if base else 0)
    try:
        attempts = tuple(method.attempts(asked, material))
    finally:
        if base is not None:
            base.release()
    tokens = method.tokens + (base.tokens if base else 0) - before
    return Written(attempts=attempts, tokens=tokens, seconds=round(time.perf_counter() - begun, 3))


def _read(path: Path, count: int) -> Written | None:
    """What lies there, if it is whole; a file that is damaged is made again."""
    if not path.is_file():
        return None
    try:
        found = unseal(read_json(path), name=path.name, keys=("attempts", "tokens", "seconds"))
        attempts = tuple(Attempt(**one) for one in found["attempts"])
    except (UserError, Damaged, TypeError):
        return None
    if len(attempts) != count:
        return None
    return Written(attempts=attempts, tokens=found["tokens"], seconds=found["seconds"])

"""What examinations of models have found, kept in the assets cache: the same model is not examined twice."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

from residency.backbones.exactness import Subject, Verdict, examine, put_in_place
from residency.backbones.padded_generation import leaves_padding_out
from residency.core.assets.cache import cache_folder
from residency.core.environment import numerics
from residency.core.tensor_files import write_json

__all__ = ["recall", "remember", "settled", "verdict_key"]


def verdict_key(identity: Mapping[str, str], *options: object) -> str:
    """SHA-256 of everything that can change a verdict: the model, the options, this machine, our code.

    Args:
        identity: Hashes of the weights and how they are held.
        options: What it was loaded with.
    """
    here = {name: value for name, value in numerics().items() if name not in ("threads", "residency")}
    parts = [dict(identity), [str(option) for option in options], here, _code()]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@cache
def _code() -> str:
    folder = Path(__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*folder.rglob("*.py"), *folder.parent.joinpath("core").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def settled(subject: Subject, key: str) -> Verdict:
    """Put kernels in place on a model: those of an earlier examination, or of one now.

    Args:
        subject: The model.
        key: From `verdict_key`.

    Raises:
        UserError: See `examine`.
    """
    known = recall(key)
    if known is not None:
        put_in_place(subject, known)
        return known
    found = examine(subject)
    if not found.packed:
        # Where packed rows are exact, attention is all that reads other tokens.
        pads = leaves_padding_out(subject.model, vocabulary=subject.vocabulary, positions=subject.positions)
        found = replace(found, pads=pads)
    remember(key, found)
    return found


def recall(key: str) -> Verdict | None:
    """What was found before, or `None`: never examined, or the note cannot be read."""
    try:
        return Verdict(**json.loads(_place(key).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def remember(key: str, verdict: Verdict) -> None:
    """Write it down; where nothing can be written the model is examined again next time."""
    place = _place(key)
    try:
        write_json(place, asdict(verdict))
    except OSError:
        return


def _place(key: str) -> Path:
    return cache_folder() / "verdicts" / f"{key}.json"

"""The config that a run folder keeps: whose folder it is, and whether a run may go on in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.markers import FolderKind, is_marker
from residency.core.yaml_files import YamlRefused, parse_yaml

__all__ = ["ONE_RANK", "RUN", "config_digest", "differences", "differences_today", "kept_config"]

# What may differ between the call that started a run and the one that goes on with it.
_FREE_KEYS = ("run_dir", "name", "store", "wandb", "checkpoint_every_n_steps", "progress")
# Of the Trainer's options, how many processes train: the same stages but for rounding.
ONE_RANK = {"devices": 1, "num_nodes": 1, "strategy": "auto"}
_OWN_KEYS = {"model", "data", "trainer", "seed_everything"}


def _made_before_markers(path: Path) -> bool:
    """Whether a folder holds what `residency fit` has always written: a resolved config, and stages or results."""
    try:
        config = parse_yaml((path / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    known = isinstance(config, dict) and config.keys() >= _OWN_KEYS
    return known and ((path / "stages").is_dir() or (path / "results.json").is_file() or not _others(path))


def _others(path: Path) -> list[str]:
    names = [child.name for child in path.iterdir() if not is_marker(child.name, RUN)]
    return [name for name in names if name not in ("config.yaml", ".lock")]


RUN = FolderKind(name="run", option="--run_dir", proof=_made_before_markers)


def kept_config(path: Path) -> dict[str, Any]:
    """The config in a file; `{}` if the file is damaged.

    Raises:
        OSError: It cannot be read.
    """
    try:
        old = parse_yaml(path.read_bytes().decode())
    except (YamlRefused, UnicodeDecodeError):
        return {}
    return old if isinstance(old, dict) else {}


def config_digest(config: Mapping[str, Any]) -> str:
    """SHA-256 (hex) of what of a config must not change while a run is made."""
    text = json.dumps(_fixed(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Keys, with dots, whose values differ and must not."""
    return sorted(_differences(_fixed(old), _fixed(new)))


def differences_today(path: Path, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`differences` from a config that may have been kept before some arguments existed.

    An argument that came later leaves what was there as it was by its default: where that is all, the file is read once
    more as today's code reads it. What the rows and their tokens are is compared beside the config, by fingerprints.

    Args:
        path: Of the kept config.
        old: Its content.
        new: The config that is to go on.
    """
    found = differences(old, new)
    if not found or any(_named(old, key) for key in found):
        return found
    from residency.runs.cli import parse

    try:
        return differences(parse(["fit", "--config", str(path)]).resolved, new)
    except UserError:
        return found


def _named(config: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(config, Mapping) or part not in config:
            return False
        config = config[part]
    return True


def _fixed(config: Mapping[str, Any]) -> dict[str, Any]:
    fixed = {key: value for key, value in config.items() if key not in _FREE_KEYS}
    if isinstance(trainer := fixed.get("trainer"), Mapping):
        fixed["trainer"] = {key: ONE_RANK.get(key, value) for key, value in trainer.items()}
    return fixed


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in [*old, *(k for k in new if k not in old)]:
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
    elif old != new:
        yield prefix

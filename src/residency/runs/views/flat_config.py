"""A config under names that are short enough for a table or a filter."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import dropwhile
from pathlib import Path
from typing import Any

__all__ = ["MAX_DOTS", "Scalar", "flat_config"]

Scalar = str | int | float | bool | None

MAX_DOTS = 3  # W&B does not filter by names with more.
_LEFT_OUT = ("name", "run_dir", "store", "wandb", "checkpoint_every_n_steps")
_PARTS = (r"domain\.[^.]+", r"mitigation\.[^.]+")
_RENAMED = {"mitigations": "mitigation", "domains": "domain", "probes": "probe", "seed_everything": "seed"}


def flat_config(config: Mapping[str, Any]) -> dict[str, Scalar]:
    """A resolved config under short names: `seed`, `stream`, `adapter`, `adapter.r`, `mitigation.ewc.strength`, ...

    Classes go by their short names, local paths by their last part. What is null, long, nested deeper than W&B can
    filter by, or only says where things lie, is left out.
    """
    flat: dict[str, Scalar] = {}
    for path, value in _leaves(config, ()):
        names = [re.sub(r"[^A-Za-z0-9_-]+", "_", p) for p in dropwhile(("fit", "model", "data").__contains__, path)]
        if names and len(names) <= MAX_DOTS + 1 and names[0] not in _LEFT_OUT:
            flat[".".join([_RENAMED.get(names[0], names[0]), *names[1:]])] = value
    domains, active = ([k.split(".")[1] for k in flat if re.fullmatch(kind, k)] for kind in _PARTS)
    stream = flat.pop("order", ",".join(domains))
    return {"stream": stream, "mitigation": "+".join(active) or "none"} | flat


def _leaves(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Scalar]]:
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield path, str(value["class_path"]).rpartition(".")[2]
            value = value.get("init_args") or {}
        for name, part in value.items():
            # A part that only wraps the config object of a library goes by that object: `adapter.r`.
            wraps = name == "config" and isinstance(part, Mapping) and "class_path" in part
            yield from _leaves(part, path if wraps else (*path, str(name)))
    elif isinstance(value, list) and all(isinstance(v, str | int | float) for v in value):
        yield from _leaves(",".join(map(str, value)), path)
    elif isinstance(value, bool | int | float):
        yield path, value
    elif isinstance(value, str) and 0 < len(value) <= 120:
        yield path, Path(value).name if value.startswith(("/", "~")) else value

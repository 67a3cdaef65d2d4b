"""Names, numbers and pages in the form that W&B takes."""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping
from itertools import count
from pathlib import Path
from typing import Any

__all__ = ["html", "keys_of", "numbers", "safe", "safe_path"]


def html(path: Path) -> Any:
    """A page, or a PNG as one."""
    import wandb

    if path.suffix != ".png":
        return wandb.Html(path.read_text(encoding="utf-8"), inject=False)
    # wandb.Image needs Pillow, which nothing else here does.
    png = base64.b64encode(path.read_bytes()).decode()
    html = f'<img alt="score matrix" style="max-width:100%" src="data:image/png;base64,{png}">'
    return wandb.Html(html, inject=False)


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What is a number: null and NaN are missing, text and booleans are no metrics."""
    return {k: v for k, v in values.items() if type(v) in (int, float) and not math.isnan(v)}


def safe(name: object) -> str:
    """A name W&B accepts in a key: letters, digits, underscores."""
    return re.sub(r"[^A-Za-z0-9_]+", "_", str(name))[:60].strip("_") or "unnamed"


def keys_of(names: Iterable[str]) -> dict[str, str]:
    """Each name's key; names that look the same to W&B are numbered."""
    keys: dict[str, str] = {}
    for name in names:
        key = safe(name)
        candidates = (key if number == 1 else f"{key}_{number}" for number in count(1))
        keys[name] = next(candidate for candidate in candidates if candidate not in keys.values())
    return keys


def safe_path(key: str) -> str:
    """A key of several parts, each of them safe."""
    return "/".join(map(safe, key.split("/")))

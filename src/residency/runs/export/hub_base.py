"""Which model of a hub an export belongs to: id and commit, from where its snapshot lies in the hub's cache."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

from residency.core.tensor_files import write_json

__all__ = ["HubModel", "hub_model", "name_base"]

_SNAPSHOT = re.compile(r"models--(?P<id>[\w.-]+?(?:--[\w.-]+)?)/snapshots/(?P<commit>[^/]+)$")


@dataclass(frozen=True, kw_only=True)
class HubModel:
    """A model on a hub.

    Args:
        id: `owner/name`, or `name`.
        commit: The revision that was loaded, as a commit.
    """

    id: str
    commit: str


def hub_model(folder: Path) -> HubModel | None:
    """The model whose snapshot this folder is; `None` for any other folder."""
    match = _SNAPSHOT.search(folder.as_posix())
    return HubModel(id=match["id"].replace("--", "/"), commit=match["commit"]) if match else None


def name_base(folder: Path, base: HubModel | None) -> None:
    """Write the base model into every `adapter_config.json` of an export.

    PEFT writes the path from which the model was loaded, which means nothing on another machine. A base without a hub
    id is `null`: `PeftModel.from_pretrained(base, FOLDER)` does not need it.

    Args:
        folder: The export.
        base: The hub's model, if it is one.
    """
    for path in folder.rglob("adapter_config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = base.id if base else None
        config["revision"] = base.commit if base else None
        write_json(path, config)

"""A hub's cache without a network, which holds one model under its id."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from residency.runs.export.hub_base import HubModel

__all__ = ["offline_hub"]


@contextmanager
def offline_hub(model: Path, folder: Path) -> Iterator[HubModel]:
    """Inside, the hub's client finds a local model by an id, and nothing else.

    Args:
        model: Folder of the model.
        folder: Where the cache is made.
    """
    hub = HubModel(id="lab/tiny-model", commit="0123456789abcdef0123456789abcdef01234567")
    repo = folder / f"models--{hub.id.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(hub.commit)
    (repo / "snapshots").mkdir()
    (repo / "snapshots" / hub.commit).symlink_to(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield hub

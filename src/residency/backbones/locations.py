"""Where a model lies: a local folder, or the hub's cache."""

from __future__ import annotations

from pathlib import Path

from residency.core.errors import UserError

__all__ = ["model_folder"]


def model_folder(path: str, revision: str | None) -> Path:
    """The folder of a model.

    Args:
        path: A folder in the format of `save_pretrained`, or a hub id, which is downloaded where it is not cached.
        revision: Branch, tag or commit of a hub id.

    Raises:
        UserError: There is no such folder, or the hub id is neither cached nor reachable.
    """
    local = Path(path).expanduser()
    if (local / "config.json").is_file():
        return local
    if local.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise UserError(
            f"model.backbone.path is {path!r}, and there is no config.json in that folder",
            why="a local model is a folder as `save_pretrained` writes it",
            fix="give the folder that holds config.json and *.safetensors, a hub id, or `packaged`",
        )
    return _from_hub(path, revision)


def _from_hub(path: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
    try:
        return Path(snapshot_download(path, revision=revision, allow_patterns=wanted))
    except Exception as error:  # the hub client raises a dozen unrelated types
        raise UserError(
            f"cannot get the model {path!r} (revision {revision or 'main'}): {type(error).__name__}",
            why="it is neither in the local hub cache nor could it be downloaded",
            fix="check the id and the network (HF_TOKEN for a gated model), or give a folder, or `packaged`",
        ) from error

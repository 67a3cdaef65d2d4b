"""Atomic files: tensors in safetensors, the rest in JSON. Nothing is ever unpickled.

A tree (nested mappings, lists and tuples of tensors and JSON values) becomes ONE safetensors file whose header holds
the structure, so that a tree is there whole or not at all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from residency.core.digests import lost_or_unreadable
from residency.core.errors import UserError
from residency.core.trees import flatten_tree, unflatten_tree

__all__ = [
    "append_line",
    "explained",
    "load_tree",
    "load_whole_tree",
    "read_json",
    "read_lines",
    "replace_file",
    "save_tree",
    "sync_folder",
    "write_json",
    "write_lines",
]

# It cannot be asked for without being set; while it is, new files are for their owner alone.
_UMASK = os.umask(0o077)
os.umask(_UMASK)
# Keys of mappings in a tree never begin with `$` (they are stored as `$items` then).
_HEADER, _TREE, _SUMS = "residency", "$tree", "$sums"


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file so that a reader sees the old one or the whole new one.

    Args:
        path: Final name. Missing folders are made.
        write: Called with a temporary path in the same folder.

    Raises:
        UserError: No room on disk, or no permission; the temporary file is gone and an old file is untouched.
    """
    # Two machines that share the folder may have equal process ids.
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with open(temporary, "rb+") as handle:
            # safetensors gives its files to their owner alone; a store or a run may be shared like everything else.
            os.chmod(handle.fileno(), 0o666 & ~_UMASK)
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, SafetensorError) as error:
        raise explained(error, path) from error
    finally:
        # A read-only file system refuses to remove even what is not there.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Bring a rename inside of a folder to the disk."""
    # The rename itself must survive a power cut: what follows it (a "done" marker) must not outlive it.
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def explained(error: Exception, path: Path) -> Exception:
    """What the user can mend about a failed write; any other error as it is."""
    text = str(error)
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "No space" in text:
        return UserError(
            f"no room on the disk for {path}",
            why="the file could not be written; what was there before is untouched",
            fix="free some space and run the same command again: it goes on from the last complete state",
        )
    if getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EROFS):
        return UserError(
            f"cannot write {path}: {text}",
            why="the folder is not writable for this user",
            fix="choose another folder with --run_dir, or change its permissions",
        )
    return error


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Add one JSON line to a file.

    Raises:
        UserError: No room on disk.
    """
    try:
        with path.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
    except OSError as error:
        raise explained(error, path) from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """All JSON lines of a file, none if it is not there; a last line that a kill cut off is dropped."""
    if not path.is_file():
        return []
    lines: list[dict[str, Any]] = []
    # Only a line feed ends a line: a name may hold what Unicode calls separators.
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON lines, all or none."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    replace_file(path, lambda temporary: _write_text(temporary, text))


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; NaN is refused (missing values are null)."""
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    replace_file(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: The file is not there or is damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"cannot read {path}: {' '.join(str(error).split())}",
            why="it is missing, or something else than residency wrote it",
            fix="check the path; if the file is damaged, delete it and run the same command again",
        ) from error


def save_tree(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree of tensors and JSON values as one safetensors file, atomically.

    Args:
        path: Final name, by convention `*.safetensors`.
        tree: Nested mappings, lists, tuples of tensors, str, int, float, bool, None.

    Raises:
        TypeError: A leaf is neither a tensor nor a JSON value; the message names it.
        UserError: No room on disk.
    """
    encoded, tensors = flatten_tree(tree)
    structure = json.dumps({_TREE: encoded, _SUMS: _sums(tensors)})
    header = {_HEADER: _checksum(structure) + structure}
    replace_file(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def load_tree(path: Path) -> dict[str, Any]:
    """Read a tree back; tensors are bit-equal to what was saved, on the CPU.

    Raises:
        UserError: The file is not there, truncated or damaged.
    """
    try:
        with safe_open(path, framework="pt") as handle:
            checksum, brace, rest = (handle.metadata() or {})[_HEADER].partition("{")
            tensors = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 (not a dict)
        structure = brace + rest
        # A flipped bit in a name or a number is still JSON.
        if checksum and checksum != _checksum(structure):
            raise ValueError("its structure does not fit its checksum")
        content = json.loads(structure)
        if _SUMS in content and content[_SUMS] != _sums(tensors):
            raise ValueError("its tensors do not fit their checksums")
        # States of versions that kept no checksums of tensors hold the tree alone.
        tree: dict[str, Any] = unflatten_tree(content.get(_TREE, content), tensors)
    except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise UserError(
            f"cannot read the state {path}: {' '.join(str(error).split())}",
            why="the file is missing, cut off, or was not written by residency",
            fix="delete it and run the same command again: the stage it belongs to is trained anew",
        ) from error
    return tree


def load_whole_tree(path: Path, *, on_message: Callable[[str], None]) -> dict[str, Any] | None:
    """Read a tree back if it is there and whole; one that is damaged is deleted, so that it is made again.

    Args:
        path: The file.
        on_message: Called with a sentence about a damaged one.

    Raises:
        UserError: It is there and cannot be read: whether it is damaged is not known then.
    """
    if not path.is_file():
        return None
    try:
        with path.open("rb"):
            pass
    except OSError as error:
        raise lost_or_unreadable(error, path) from error
    try:
        return load_tree(path)
    except UserError as damage:
        on_message(f"{damage.got}; it is made again")
        path.unlink(missing_ok=True)
        return None


def _checksum(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _sums(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """CRC-32 of every tensor with its type and shape: safetensors itself notices no flipped bit."""
    sums = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        content = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        sums[name] = f"{content:08x} {tensor.dtype} {tuple(tensor.shape)}"
    return sums

"""What went wrong, for whoever typed the command: errors of the system and of libraries become got, why and fix.

A bug stays a traceback: it is for whoever wrote the code.
"""

from __future__ import annotations

import errno
import os

from residency.core.errors import UserError

__all__ = ["LIBRARIES", "explain_error"]

LIBRARIES = frozenset(
    {"safetensors", "polars", "pyarrow", "yaml", "json", "jsonargparse", "lightning", "huggingface_hub", "httpx"}
    | {"datasets", "tokenizers", "filelock", "wandb", "jinja2", "argparse", "zipfile", "gzip", "tarfile"}
)
"""Packages whose own exceptions say what is wrong with what they were given."""

_FULL = "free some space and run the same command again: it goes on from the last complete state"
_SYSTEM: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("there is no room on the disk", _FULL),
    errno.EDQUOT: ("your quota on this disk is used up", _FULL),
    errno.EFBIG: ("the file system takes no file of that size", "choose a folder on another disk"),
    errno.EACCES: ("this user may not", "change its permissions, or choose another path"),
    errno.EPERM: ("this user may not", "change its permissions, or choose another path"),
    errno.EROFS: ("the file system is read-only", "choose a path that can be written"),
    errno.ENOENT: ("there is no such file or folder", "correct the path"),
    errno.EISDIR: ("it is a folder, and a file was expected", "correct the path, or move the folder away"),
    errno.ENOTDIR: ("a part of the path is a file, and a folder was expected", "correct the path"),
    errno.EEXIST: ("it exists already", "choose another path, or move it away"),
    errno.ENOTEMPTY: ("the folder is not empty", "choose another path, or move it away"),
    errno.ENAMETOOLONG: ("the name is longer than the file system takes", "choose a shorter path"),
    errno.ELOOP: ("links lead back to where they start", "remove the link, or choose another path"),
    errno.EIO: ("the disk or the network file system failed", "check the disk and run the same command again"),
    errno.ESTALE: ("the network file system lost the file", "run the same command again"),
    errno.EMFILE: ("this process has too many files open", "raise the limit (ulimit -n) and run the command again"),
    errno.ENFILE: ("this machine has too many files open", "close other programs and run the command again"),
    errno.ENOMEM: ("there is not enough memory", "close other programs, or make the model or the batch smaller"),
    errno.EADDRINUSE: ("the network address is taken", "wait a moment and run the same command again"),
}


def explain_error(error: BaseException) -> UserError | None:
    """What the user can do about an error; `None` for what is a bug.

    Args:
        error: Anything but `UserError`.
    """
    if isinstance(error, UserError):
        return error
    if isinstance(error, OSError):
        return _system(error)
    if isinstance(error, RecursionError):
        return UserError(
            "a config or a record is nested too deep, or contains itself",
            why="reading it would have no end",
            fix="look for a preset that names itself, an alias inside of its own anchor, or a thousand brackets",
        )
    if isinstance(error, MemoryError):
        return UserError(
            "there is not enough memory",
            why=_one_line(error) or "this process may not take more",
            fix="make the model, the batch or the rows smaller, or close other programs",
        )
    if _about_a_path(error):
        return UserError(f"a path that cannot be: {_one_line(error)}", why="no file has such a name", fix="correct it")
    library = type(error).__module__.partition(".")[0]
    if library in LIBRARIES:
        return UserError(
            f"{library} refuses: {_one_line(error)}",
            why="the library cannot go on with what it was given",
            fix="correct the value or the file that it names; what is complete is kept",
        )
    return None


def _about_a_path(error: BaseException) -> bool:
    """A NUL in a name, a home folder of nobody (`~nouser`), bytes that are no text."""
    text = str(error)
    return (
        (isinstance(error, ValueError) and "null byte" in text)
        or (isinstance(error, RuntimeError) and "home directory" in text)
        or isinstance(error, UnicodeEncodeError)
    )


def _system(error: OSError) -> UserError:
    name = f"{error.filename}" if error.filename else ""
    why, fix = _SYSTEM.get(error.errno or 0, ("the operating system refuses", "correct the path or the machine"))
    # Libraries in Rust and C raise plain ones, with everything in the text.
    said = os.strerror(error.errno) if error.errno else _one_line(error) or type(error).__name__
    return UserError(f"{said}: {name}" if name else said, why=why, fix=fix)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:400]

"""Which code a config may name, and which code it has named: a config comes from somebody else more often than not.

A class path is imported only where a key has a type, and only a class of that type is built (`jsonargparse_patch`). On
top of that: nothing of Python's standard library is a part of a run, so `os.system`, `subprocess.Popen` or
`builtins.exec` are refused by name, and under every name that leads to them (`torch.os.system`). With `--allow
PACKAGE` nothing but the known packages, installed plug-ins and the named packages is imported; without it, what else
was imported is told.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from types import ModuleType
from typing import Any

from residency.core.errors import UserError
from residency.core.text import for_terminal

__all__ = ["CodeRefused", "check_path", "import_named", "imported_outside", "note", "take_allow", "tell_outside"]

KNOWN = frozenset({"residency", "torch", "transformers", "peft", "lightning", "torchmetrics"})
PLUGINS = "residency.plugins"
"""Group of entry points by which an installed package says that configs may name it."""
_VARIABLE = "RESIDENCY_ALLOW"  # workers are processes of their own
_outside: dict[str, str] = {}
_told: set[str] = set()


class CodeRefused(UserError, ImportError, ValueError):
    """A config names code that is not imported; jsonargparse takes it for one of its own refusals."""


def take_allow(words: Sequence[str]) -> list[str]:
    """Remember `--allow PACKAGE` of a command line, for this process and its workers; the other words.

    Raises:
        UserError: It has no value.
    """
    rest: list[str] = []
    given: list[str] = []
    waiting = False
    for word in words:
        if waiting or word.startswith("--allow="):
            given += [part.strip() for part in word.removeprefix("--allow=").split(",") if part.strip()]
            waiting = False
        elif word == "--allow":
            waiting = True
        else:
            rest.append(word)
    if waiting or any(not part.isidentifier() for part in given):
        raise UserError(
            f"--allow {' '.join(given)}".rstrip(),
            why="it names packages whose code a config may use, beside " + ", ".join(sorted(KNOWN)),
            fix="give the name of a package, for example --allow mylab; or --allow residency for none",
        )
    if given:
        os.environ[_VARIABLE] = ",".join(given)
    return rest


def check_path(path: str) -> None:
    """Compare an import path with what may be imported.

    Raises:
        CodeRefused: It lies in Python's standard library, or `--allow` does not name its package.
    """
    top = path.partition(".")[0]
    if top in sys.stdlib_module_names or top == "jsonargparse":
        raise CodeRefused(
            f"the config names {path}",
            why="that is Python's own standard library: it can start programs, and is no part of a run",
            fix="name a class of the type that the key takes; if the config is not yours, read it before you use it",
        )
    allowed = os.environ.get(_VARIABLE)
    if allowed is not None and top not in KNOWN | _plugins() | {*allowed.split(",")}:
        raise CodeRefused(
            f"the config names {path}",
            why=f"--allow names {allowed}, and {top} is neither that nor an installed plug-in",
            fix=f"read that code, then add --allow {top}",
        )


def note(path: str, found: Any) -> None:
    """Check what a path has led to, and remember it if it lies outside of the known packages.

    Raises:
        CodeRefused: It is something of the standard library under another name.
    """
    module = found.__name__ if isinstance(found, ModuleType) else getattr(found, "__module__", None) or path
    if isinstance(module, str) and module != "builtins":
        check_path(module)
    elif module == "builtins":
        check_path(f"builtins.{getattr(found, '__qualname__', '')}")
    for name in {str(module), path.rpartition(".")[0]}:
        if (top := name.partition(".")[0]) and top not in KNOWN | _plugins():
            _outside[name] = str(getattr(sys.modules.get(name), "__file__", None) or "")


def import_named(module: str) -> Any:
    """Import a module that a config names; `None` if that is refused or fails."""
    if not all(part.isidentifier() for part in module.split(".")):
        return None
    try:
        check_path(module)
        return import_module(module)
    # Any code may run here, and fail in any way; the caller only looks for names.
    except Exception:
        return None


def imported_outside() -> dict[str, str]:
    """{module: its file} of what configs have named so far and no known package has."""
    return dict(sorted(_outside.items()))


def tell_outside() -> None:
    """Say, once, which code of others the configs of this process have brought in."""
    new = {name: file for name, file in imported_outside().items() if name not in _told}
    _told.update(new)
    if new:
        named = ", ".join(f"{name} ({file})" if file else name for name, file in new.items())
        print(f"residency: code that the config names outside of residency: {for_terminal(named)}", file=sys.stderr)


@cache
def _plugins() -> frozenset[str]:
    return frozenset(entry.value.partition(":")[0].partition(".")[0] for entry in entry_points(group=PLUGINS))

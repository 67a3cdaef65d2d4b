"""The classes of a package that stand for themselves: a new file is enough, no list has to name it."""

from __future__ import annotations

import ast
from collections.abc import MutableMapping
from importlib import import_module
from pathlib import Path
from typing import Any

__all__ = ["load_plug_ins", "plug_ins"]


def plug_ins(folder: Path, *bases: str, below: bool = True) -> dict[str, str]:
    """Public classes below a folder that inherit, directly or not, from one of some bases; read, not imported.

    Args:
        folder: Of a package.
        bases: Names of the classes to inherit from.
        below: Whether folders in it are read as well.

    Returns:
        {class: module, relative to the package ("penalties.ewc")}, sorted by name.

    Raises:
        ImportError: Two files define a public class of one name.
    """
    defined: list[tuple[str, str, set[str]]] = []
    for path in sorted(folder.rglob("*.py") if below else folder.glob("*.py")):
        module = ".".join(path.relative_to(folder).with_suffix("").parts)
        classes = [node for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.ClassDef)]
        defined += [(node.name, module, {_leaf(base) for base in node.bases}) for node in classes]
    known = {*bases}
    while more := {name for name, _, parents in defined if parents & known} - known:
        known |= more
    found: dict[str, str] = {}
    for name, module, parents in defined:
        if not parents & known or name.startswith("_"):
            continue
        if name in found:
            raise ImportError(f"{name} is defined in {module} and in {found[name]}")
        found[name] = module
    return dict(sorted(found.items()))


def _leaf(base: ast.expr) -> str:
    """`Mitigation` of `base.Mitigation[...]`."""
    return ast.unparse(base).partition("[")[0].rpartition(".")[2]


def load_plug_ins(package: MutableMapping[str, Any], *bases: str, below: bool = True) -> list[str]:
    """Import the classes that `plug_ins` finds beside a package's `__init__.py` and make them its attributes.

    Args:
        package: `globals()` of the package.
        bases: Names of the classes to inherit from.
        below: Whether folders in it are read as well.

    Returns:
        The names of the classes, for `__all__`.
    """
    found = plug_ins(Path(package["__file__"]).parent, *bases, below=below)
    for name, module in found.items():
        package[name] = getattr(import_module(f"{package['__name__']}.{module}"), name)
    return [*found]

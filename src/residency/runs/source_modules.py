"""Modules as source: where a module lies, what it imports and what it defines, read without importing it."""

from __future__ import annotations

import ast
import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from functools import cache
from pathlib import Path

__all__ = ["absolute", "defined", "home", "imports", "installed", "is_followed", "source_file", "tree"]

# Their versions are part of every key (`environment.numerics`), so their code is not read.
_VERSIONED = {"torch", "lightning", "transformers", "peft", "bitsandbytes", "safetensors", "numpy"}
OUTSIDE = _VERSIONED | set(sys.stdlib_module_names)


@cache
def source_file(module: str) -> Path | None:
    """Source of a module, found without importing it; `None` if there is none."""
    top, *rest = module.split(".")
    loaded = sys.modules.get(top)
    places = [Path(place) for place in getattr(loaded, "__path__", [])]
    if loaded is not None and not rest:
        return _python_file(getattr(loaded, "__file__", None))
    if loaded is None:
        try:
            spec = importlib.util.find_spec(top)
        except (ImportError, ValueError):
            return None
        if spec is None:
            return None
        if not rest:
            return _python_file(spec.origin)
        places = [Path(place) for place in spec.submodule_search_locations or ()]
    for place in places:
        path = place.joinpath(*rest)
        for candidate in (path.with_suffix(".py"), path / "__init__.py"):
            if candidate.is_file():
                return candidate
    return None


def _python_file(origin: str | None) -> Path | None:
    return Path(origin) if origin and origin.endswith(".py") and Path(origin).is_file() else None


@cache
def installed(path: Path) -> bool:
    homes = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    return any(path.resolve().is_relative_to(home) for home in homes) or "site-packages" in path.parts


def is_followed(module: str, tops: frozenset[str]) -> bool:
    top = module.partition(".")[0]
    if top in OUTSIDE:
        return False
    file = source_file(module)
    return file is not None and (top in tops or not installed(file))


@cache
def tree(module: str) -> ast.Module:
    file = source_file(module)
    return ast.parse(file.read_bytes()) if file is not None else ast.Module([], [])


def _is_package(module: str) -> bool:
    file = source_file(module)
    return file is not None and file.name == "__init__.py"


@cache
def imports(module: str) -> tuple[tuple[str, str | None], ...]:
    """(module, symbol or `None`) of every import statement that can run."""
    found: list[tuple[str, str | None]] = []
    for node in _running(tree(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            found += [(source, alias.name) for alias in node.names]
    return tuple(dict.fromkeys(found))


def _running(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
            for other in child.orelse:
                yield other
                yield from _running(other)
            continue
        yield child
        yield from _running(child)


def absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if _is_package(module) else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


@cache
def home(
    module: str, symbol: str | None, followed: frozenset[str] = frozenset({"residency"}), depth: int = 0
) -> tuple[str, str | None]:
    """The module that defines a name, and the name there; (module, `None`) for a module itself.

    A name of a library stays where it is imported from: its files are never read.

    Args:
        module: From which the name is imported.
        symbol: The name; `None` = the module itself.
        followed: Top packages whose files are read, as in `is_followed`.
        depth: How often the name was passed on.
    """
    top = module.partition(".")[0]
    if symbol is None or top in OUTSIDE:
        return module, symbol
    if not is_followed(module, followed):
        return module, symbol
    if source_file(f"{module}.{symbol}") is not None:
        return f"{module}.{symbol}", None
    if symbol not in defined(module) and depth < 20:
        for node in tree(module).body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == symbol:
                        return home(absolute(module, node), alias.name, followed, depth + 1)
        exported = _submodule_defining(module, symbol) if _is_package(module) else None
        if exported is not None:
            return exported, symbol
    return module, symbol


@cache
def defined(module: str) -> dict[str, ast.stmt]:
    """Top-level definitions of a module by name."""
    found: dict[str, ast.stmt] = {}
    for node in tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return found


def _submodule_defining(package: str, symbol: str) -> str | None:
    """The module below a package that defines a class which the package exports by looking for it."""
    file = source_file(package)
    if file is None:
        return None
    for path in sorted(file.parent.rglob("*.py")):
        relative = path.relative_to(file.parent).with_suffix("").parts
        name = ".".join([package, *(part for part in relative if part != "__init__")])
        if name != package and isinstance(defined(name).get(symbol), ast.ClassDef):
            return name
    return None

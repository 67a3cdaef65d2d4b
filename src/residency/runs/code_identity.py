"""What code computes, as a hash: independent of where it lies and of what it says about itself.

The code of a class is the transitive closure of the imports of its module and of its bases' modules, inside of the
packages that are followed: `residency`, the package of every base class, and whatever else is not installed but lies in
a working tree. Of each module the definitions are hashed, without docstrings, comments, annotations and module names:
`git mv` changes nothing, a changed line of code does.
"""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from copy import deepcopy
from functools import cache
from pathlib import Path

__all__ = ["class_code", "closure", "code_digest", "core_code", "core_modules"]

# Their versions are part of every key (`provenance.numerics`), so their code is not read.
_VERSIONED = {"torch", "lightning", "transformers", "peft", "bitsandbytes", "safetensors", "numpy"}
_OUTSIDE = _VERSIONED | set(sys.stdlib_module_names)
# Training and scoring of a stage, and bringing back what was stored of either, start here.
_CORE_ROOTS = ("residency.runs.stage_runner", "residency.runs.stage_cache")
# What shows a run and never changes it (the core calls these and takes nothing from them), and this file.
_WATCHING = (
    "residency.runs.views",
    "residency.inspection",
    "residency.core.errors",
    "residency.runs.code_identity",
)


def core_modules() -> frozenset[str]:
    """Names of the modules that decide what a stage learns and how a state is scored, whatever classes a run has."""
    return closure(_CORE_ROOTS, followed=frozenset({"residency"}), leaving_out=_WATCHING)


@cache
def core_code() -> str:
    """Hash of `core_modules`."""
    return code_digest(core_modules())


def class_code(kind: type) -> str:
    """Hash of everything in project code that a class can run, beside the core.

    Args:
        kind: A backbone, adapter, objective, mitigation, ... of this package or of a plug-in.

    Returns:
        SHA-256 (hex). A class without a file (made in a notebook) is hashed by its own source alone.
    """
    modules = [b.__module__ for b in kind.__mro__ if b.__module__.partition(".")[0] not in _OUTSIDE]
    missing = [name for name in dict.fromkeys(modules) if _file(name) is None]
    tops = frozenset(name.partition(".")[0] for name in modules) | {"residency"}
    found = closure(modules, followed=tops, leaving_out=_WATCHING) - core_modules()
    sources = [_class_source(base) for base in kind.__mro__ if base.__module__ in missing]
    return hashlib.sha256("\n".join([code_digest(found), *sources]).encode()).hexdigest()


def closure(roots: Iterable[str], *, followed: frozenset[str], leaving_out: tuple[str, ...] = ()) -> frozenset[str]:
    """Modules that are reached from some by import statements, those inside of functions included.

    Args:
        roots: Module names.
        followed: Top packages to stay in; beside them, modules of a working tree are followed wherever they lie.
        leaving_out: Modules and packages that are not entered.

    `if TYPE_CHECKING` is not read. A name that is imported from a package leads to the module that defines it, not to
    all that the package exports.
    """
    seen: set[str] = set()
    waiting = [name for name in roots if _file(name) is not None]
    while waiting:
        name = waiting.pop()
        if name in seen or any(name == left or name.startswith(left + ".") for left in leaving_out):
            continue
        seen.add(name)
        for module, symbol in _imports(name):
            target = _home(module, symbol)[0]
            if _is_followed(target, followed):
                waiting.append(target)
    return frozenset(seen)


def code_digest(modules: Iterable[str]) -> str:
    """SHA-256 (hex) of the definitions of some modules, whatever the modules are called."""
    definitions = sorted(text for name in modules for text in _definitions(name))
    return hashlib.sha256("\n".join(definitions).encode()).hexdigest()


# -- modules and their files ----------------------------------------------------------------------------------------


@cache
def _file(module: str) -> Path | None:
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
def _installed(path: Path) -> bool:
    homes = {Path(sysconfig.get_path(name)).resolve() for name in ("purelib", "platlib", "stdlib")}
    return any(path.resolve().is_relative_to(home) for home in homes) or "site-packages" in path.parts


def _is_followed(module: str, tops: frozenset[str]) -> bool:
    top = module.partition(".")[0]
    if top in _OUTSIDE:
        return False
    file = _file(module)
    return file is not None and (top in tops or not _installed(file))


@cache
def _tree(module: str) -> ast.Module:
    file = _file(module)
    return ast.parse(file.read_bytes()) if file is not None else ast.Module([], [])


def _is_package(module: str) -> bool:
    file = _file(module)
    return file is not None and file.name == "__init__.py"


# -- imports --------------------------------------------------------------------------------------------------------


@cache
def _imports(module: str) -> tuple[tuple[str, str | None], ...]:
    """(module, symbol or `None`) of every import statement that can run."""
    found: list[tuple[str, str | None]] = []
    for node in _running(_tree(module)):
        if isinstance(node, ast.Import):
            found += [(alias.name, None) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            source = _absolute(module, node)
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


def _absolute(module: str, node: ast.ImportFrom) -> str:
    if not node.level:
        return node.module or ""
    package = module.split(".") if _is_package(module) else module.split(".")[:-1]
    base = package[: len(package) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


@cache
def _home(module: str, symbol: str | None, depth: int = 0) -> tuple[str, str | None]:
    """The module that defines a name, and the name there; (module, `None`) for a module itself."""
    if symbol is None:
        return module, None
    if _file(f"{module}.{symbol}") is not None:
        return f"{module}.{symbol}", None
    tree = _tree(module)
    if symbol not in _defined(module) and depth < 20:
        for node in tree.body:
            if isinstance(node, ast.ImportFrom):
                for alias in node.names:
                    if (alias.asname or alias.name) == symbol:
                        return _home(_absolute(module, node), alias.name, depth + 1)
        exported = _submodule_defining(module, symbol) if _is_package(module) else None
        if exported is not None:
            return exported, symbol
    return module, symbol


@cache
def _defined(module: str) -> dict[str, ast.stmt]:
    """Top-level definitions of a module by name."""
    found: dict[str, ast.stmt] = {}
    for node in _tree(module).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {t.id: node for target in targets for t in ast.walk(target) if isinstance(t, ast.Name)}
    return found


def _submodule_defining(package: str, symbol: str) -> str | None:
    """The module below a package that defines a class which the package exports by looking for it."""
    file = _file(package)
    for path in sorted(file.parent.rglob("*.py")) if file is not None else []:
        relative = path.relative_to(file.parent).with_suffix("").parts  # type: ignore[union-attr]
        name = ".".join([package, *(part for part in relative if part != "__init__")])
        if name != package and isinstance(_defined(name).get(symbol), ast.ClassDef):
            return name
    return None


# -- what is hashed -------------------------------------------------------------------------------------------------


@cache
def _definitions(module: str) -> tuple[str, ...]:
    """Every top-level statement of a module as text that does not depend on where it stands."""
    bare = _Bare(module)
    texts = [ast.dump(bare.visit(deepcopy(node))) for node in _statements(module)]
    # Where a name comes from counts, by what it stands for there: two modules may define one name.
    texts += [f"import {text}" for node in _tree(module).body for text in bare.origins(node)]
    return tuple(texts)


def _statements(module: str) -> list[ast.stmt]:
    """Top-level statements that compute: no texts, no export list, no imports."""
    return [
        node
        for node in _tree(module).body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not _is_text(node)
        and not (isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets))
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]


@cache
def _meaning(module: str, symbol: str | None) -> str:
    """What an imported name stands for, without following what that itself imports."""
    home, name = _home(module, symbol)
    top = home.partition(".")[0]
    if _file(home) is None or top in _OUTSIDE or (_installed(_file(home) or Path()) and top != "residency"):
        return f"{module}.{symbol}"
    nodes = [_defined(home)[name]] if name in _defined(home) else _statements(home)
    bare = _Bare(None)
    parts = [ast.dump(bare.visit(deepcopy(node))) for node in nodes]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


class _Bare(ast.NodeTransformer):
    """Takes docstrings and annotations away and replaces import statements by what they bring.

    Args:
        module: Whose statements these are; `None` = import statements are dropped.
    """

    def __init__(self, module: str | None) -> None:
        self.module = module

    def origins(self, node: ast.AST) -> list[str]:
        """ "name: meaning" of everything that an import statement brings; empty for other statements."""
        if self.module is None or not isinstance(node, ast.Import | ast.ImportFrom):
            return []
        if isinstance(node, ast.Import):
            return [f"{a.asname or a.name}: {_meaning(a.name, None)}" for a in node.names]
        source = _absolute(self.module, node)
        if source == "__future__":
            return []
        return [f"{a.asname or a.name}: {_meaning(source, a.name)}" for a in node.names]

    def visit_Import(self, node: ast.Import) -> ast.AST:
        return ast.Expr(ast.Constant("; ".join(self.origins(node))))

    def visit_ImportFrom(self, node: ast.ImportFrom) -> ast.AST:
        return ast.Expr(ast.Constant("; ".join(self.origins(node))))

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self._without_docstring(node)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> ast.AST:
        node.returns = None
        return self._without_docstring(node)

    def visit_ClassDef(self, node: ast.ClassDef) -> ast.AST:
        return self._without_docstring(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = None
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        # A dataclass has its fields from annotations, so the statement stays and its type goes.
        node.annotation = ast.Constant(None)
        return self.generic_visit(node)

    def visit_If(self, node: ast.If) -> ast.AST | list[ast.AST]:
        if "TYPE_CHECKING" in ast.dump(node.test):
            return [self.visit(child) for child in node.orelse]
        return self.generic_visit(node)

    def _without_docstring(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> ast.AST:
        # The texts below attributes are documentation as well.
        node.body = [s for s in node.body if not _is_text(s)] or [ast.Pass()]
        return self.generic_visit(node)


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


def _class_source(kind: type) -> str:
    try:
        return ast.dump(_Bare(None).visit(ast.parse(inspect.getsource(kind).strip())))
    except (OSError, TypeError, SyntaxError):
        return f"{kind.__module__}.{kind.__qualname__}"

"""What code computes, as a hash: independent of where it lies and of what it says about itself.

The code of a class is the transitive closure of the imports of its module and of its bases' modules, inside of the
packages that are followed: `residency`, the package of every base class, and whatever else is not installed but lies in
a working tree. Of each module the definitions are hashed, without docstrings, comments, annotations and module names:
`git mv` changes nothing, a changed line of code does.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
from collections.abc import Iterable
from functools import cache
from pathlib import Path

from residency.runs.source_modules import (
    OUTSIDE,
    absolute,
    defined,
    home,
    imports,
    installed,
    is_followed,
    source_file,
    tree,
)

__all__ = ["class_code", "closure", "code_digest", "core_code", "core_modules", "observer_code"]

# Training and scoring of a stage, and bringing back what was stored of either, start here.
_CORE_ROOTS = ("residency.runs.stage_runner", "residency.runs.stage_cache")
# What shows a run and never changes it (the core calls these and takes nothing from them), and this file.
_WATCHING = (
    "residency.runs.views",
    "residency.inspection",
    "residency.core.errors",
    "residency.runs.code_identity",
    "residency.runs.source_modules",
)


@cache
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
    return _class_code(kind)


@cache
def _class_code(kind: type) -> str:
    modules = [b.__module__ for b in kind.__mro__ if b.__module__.partition(".")[0] not in OUTSIDE]
    missing = [name for name in dict.fromkeys(modules) if source_file(name) is None]
    tops = frozenset(name.partition(".")[0] for name in modules) | {"residency"}
    found = closure(modules, followed=tops, leaving_out=_WATCHING) - core_modules()
    sources = [_class_source(base) for base in kind.__mro__ if base.__module__ in missing]
    return hashlib.sha256("\n".join([code_digest(found), *sources]).encode()).hexdigest()


def observer_code(kind: type) -> str:
    """Hash of the modules of an observer and of its bases: what it finds depends on them, what is learnt does not.

    Args:
        kind: An observer of this package or of a plug-in.
    """
    modules = [b.__module__ for b in kind.__mro__ if b.__module__.partition(".")[0] not in OUTSIDE]
    return code_digest(name for name in dict.fromkeys(modules) if source_file(name) is not None)


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
    waiting = [name for name in roots if source_file(name) is not None]
    while waiting:
        name = waiting.pop()
        if name in seen or any(name == left or name.startswith(left + ".") for left in leaving_out):
            continue
        seen.add(name)
        for module, symbol in imports(name):
            target = home(module, symbol, followed)[0]
            if is_followed(target, followed):
                waiting.append(target)
    return frozenset(seen)


def code_digest(modules: Iterable[str]) -> str:
    """SHA-256 (hex) of the definitions of some modules, whatever the modules are called."""
    definitions = sorted(text for name in modules for text in _definitions(name))
    return hashlib.sha256("\n".join(definitions).encode()).hexdigest()


@cache
def _definitions(module: str) -> tuple[str, ...]:
    """Every top-level statement of a module as text that does not depend on where it stands."""
    bare = _Bare(module)
    texts = [ast.dump(bare.visit(_copy(node))) for node in _statements(module)]
    # Where a name comes from counts, by what it stands for there: two modules may define one name.
    texts += [f"import {text}" for node in tree(module).body for text in bare.origins(node)]
    return tuple(texts)


def _statements(module: str) -> list[ast.stmt]:
    """Top-level statements that compute: no texts, no export list, no imports."""
    return [
        node
        for node in tree(module).body
        if not isinstance(node, ast.Import | ast.ImportFrom)
        and not _is_text(node)
        and not (isinstance(node, ast.Assign) and any(getattr(t, "id", "") == "__all__" for t in node.targets))
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    ]


@cache
def _meaning(module: str, symbol: str | None) -> str:
    """What an imported name stands for, without following what that itself imports."""
    place, name = home(module, symbol)
    top = place.partition(".")[0]
    if source_file(place) is None or top in OUTSIDE or (installed(source_file(place) or Path()) and top != "residency"):
        return f"{module}.{symbol}"
    nodes = [defined(place)[name]] if name in defined(place) else _statements(place)
    bare = _Bare(None)
    parts = [ast.dump(bare.visit(_copy(node))) for node in nodes]
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
        source = absolute(self.module, node)
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


def _copy(node: ast.AST) -> ast.AST:
    """A tree of its own with all that `ast.dump` shows; copy.deepcopy takes most of the time of a first key."""
    copied = type(node)()
    for name, value in ast.iter_fields(node):
        if isinstance(value, list):
            value = [_copy(part) if isinstance(part, ast.AST) else part for part in value]
        setattr(copied, name, _copy(value) if isinstance(value, ast.AST) else value)
    return copied


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

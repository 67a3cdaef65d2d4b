"""Python's standard library: from a function's docstring to its signature.

Source: the source files of the standard library of the Python that runs this (tests, IDLE, demos and installed
packages left out), so rows differ a little between Python versions, and the fingerprint tells.
Licence: Python Software Foundation License, version 2.
Attribution: see `StdlibSignatures.attribution`.
"""

from __future__ import annotations

import ast
import platform
import sysconfig
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group

__all__ = ["StdlibSignatures"]

_LEFT_OUT = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "turtledemo", "ensurepip", "__pycache__"}
)


class StdlibSignatures(Domain):
    """Docstring -> `def` line of a function in Python's standard library (generative). One group per source file."""

    kind = "generative"
    source = f"Python {platform.python_version()} (its standard library)"
    licence = "PSF-2.0"
    attribution = "Copyright (c) 2001 Python Software Foundation; all rights reserved"

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by source file."""
        root = Path(sysconfig.get_path("stdlib"))
        return split_by_group(drop_ambiguous(row for path in _sources(root) for row in _rows(path, root)))


def _sources(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.iterdir()):
        if path.is_dir() and path.name not in _LEFT_OUT:
            yield from _sources(path)
        elif path.suffix == ".py":
            yield path


def _rows(path: Path, root: Path) -> Iterator[Row]:
    module = path.relative_to(root).as_posix()
    try:
        with warnings.catch_warnings():
            # Old escapes in other people's source are no concern of this run.
            warnings.simplefilter("ignore")
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return
    for node in _functions(tree):
        if node.name.startswith("__"):
            continue
        words = (ast.get_docstring(node) or "").split("\n\n")[0].split()
        if 4 <= len(words) <= 60:
            keyword = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
            yield Row(
                id=f"{module}:{node.lineno}",
                prompt=" ".join(words),
                completion=f"{keyword} {node.name}({ast.unparse(node.args)}):",
                group=module,
            )


def _functions(node: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    # Statements only: functions are not found inside expressions, and those are most of a tree.
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield child
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):
            yield from _functions(child)

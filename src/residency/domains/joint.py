"""All domains of a stream as one: what training on everything at once learns (the usual upper reference)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from residency.core.types import Row, Split
from residency.domains.base import Domain, hash_order
from residency.domains.template import Template

__all__ = ["Joint"]


class Joint(Domain):
    """The training rows of several domains, each with the text its own template gives it, as one set to train on.

    It has no scores of its own: its parts are scored as probes, under their own names.

    Args:
        domains: The parts by name.
    """

    kind = "generative"
    source = "several domains at once"
    licence = "those of its parts"
    attribution = "those of its parts"

    def __init__(self, *, domains: dict[str, Domain]) -> None:
        limits = [part.template for part in domains.values()]
        template = Template(
            prompt="{prompt}",
            completion="{completion}",
            max_prompt_tokens=max((t.max_prompt_tokens for t in limits), default=96),
            max_tokens=max((t.max_tokens for t in limits), default=128),
        )
        super().__init__(template=template, max_train=None, max_validation=None, max_test=None, scorers=[])
        self.domains = dict(domains)

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """Training rows of all parts; of the other splits the one row that a domain must have."""
        rows = [_rendered(name, part, row) for name, part in self.domains.items() for row in part.rows("train")]
        prompts = {" ".join(row.prompt.casefold().split()) for row in rows}
        tests = [_rendered(name, part, row) for name, part in self.domains.items() for row in part.rows("test")]
        unseen = [row for row in tests if " ".join(row.prompt.casefold().split()) not in prompts]
        return {"train": hash_order(rows), "validation": (), "test": [replace(row, group="") for row in unseen[:1]]}


def _rendered(name: str, part: Domain, row: Row) -> Row:
    template = part.template
    return Row(
        id=f"{name}/{row.id}",
        prompt=template.prompt.replace("{prompt}", row.prompt),
        completion=template.completion.replace("{completion}", row.completion),
        group=f"{name}/{row.group}" if row.group else "",
    )

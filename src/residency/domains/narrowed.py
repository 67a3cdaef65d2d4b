"""Domains of a stream: with paths from one folder, with at most so many rows, and with rows that none may resemble."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from copy import copy
from pathlib import Path

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain
from residency.domains.joint import Joint

__all__ = ["augmenting", "limited", "share_scored", "under_root"]


def under_root(root: str | None, domains: Mapping[str, Domain]) -> dict[str, Domain]:
    """Domains whose relative paths begin in a folder.

    Raises:
        UserError: There is no such folder.
    """
    if root is None:
        return dict(domains)
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise UserError(
            f"data.root is {root}",
            why="there is no folder of that name",
            fix="give the folder that holds the data sets of the stream, one folder each",
        )
    return {name: domain.under(folder) for name, domain in domains.items()}


def limited(domains: Mapping[str, Domain], most: Mapping[Split, int | None]) -> dict[str, Domain]:
    """Domains with at most so many rows of a split.

    Raises:
        UserError: A limit that leaves nothing.
    """
    for split, limit in most.items():
        if limit is not None and limit < 1:
            raise UserError(
                f"data.max_{split} is {limit}",
                why="it is the most rows that any domain has of a split",
                fix=f"give 1 or more, or leave it out; max_{split}: 0 of a single domain leaves its split out",
            )
    asked = {split: limit for split, limit in most.items() if limit is not None}
    return {name: _shortened(domain, asked) for name, domain in domains.items()} if asked else dict(domains)


def _shortened(domain: Domain, most: Mapping[Split, int]) -> Domain:
    if isinstance(domain, Joint):
        return Joint(domains={name: _shortened(part, most) for name, part in domain.domains.items()})
    own = domain.limits
    shorter = copy(domain)
    shorter.limits = {s: min(most.get(s, 10**9), 10**9 if own[s] is None else own[s] or 0) for s in own}
    return shorter


def augmenting(domains: Mapping[str, Domain]) -> Iterator[tuple[str, Domain]]:
    """(name, domain) of those that make further training rows, parts of a joint one among them."""
    for name, domain in domains.items():
        if isinstance(domain, Joint):
            yield from augmenting(domain.domains)
        elif domain.augment:
            yield name, domain


def share_scored(domains: Mapping[str, Domain], probes: Mapping[str, Domain]) -> None:
    """Tell every domain that makes rows which ones the stream scores: of all domains, learned or not, and probes.

    Raises:
        UserError: A probe makes rows.
    """
    if refused := [name for name, _ in augmenting(probes)]:
        raise UserError(
            f"data.probes.{refused[0]} has augment",
            why="rows are made to train on, and a probe is never trained on",
            fix="leave augment out of the probe",
        )

    def scored() -> Iterable[Row]:
        return (row for domain in (*domains.values(), *probes.values()) for row in domain.unchecked_scored())

    for _, domain in augmenting(domains):
        domain.scored_rows = scored

"""A search space against the configs that it changes."""

from __future__ import annotations

from residency.core.errors import UserError
from residency.study.planning.cells import Combination, combinations, make_cell
from residency.study.planning.resolve import Resolver
from residency.study.planning.search_space import Parameter, Search, applies
from residency.study.planning.study_file import Study

__all__ = ["VALIDATION", "check_space", "parameters_of"]

VALIDATION = {"split": "validation"}
"""What makes a trial of a cell: other rows are scored."""


def parameters_of(search: Search, combination: Combination) -> dict[str, Parameter]:
    """The parameters that exist in a combination."""
    return {key: part for key, part in search.parameters.items() if applies(part, combination.axes)}


def check_space(study: Study, resolver: Resolver) -> None:
    """Parse a config for every choice and both ends of every range, before anything is trained.

    Raises:
        UserError: A key or a value that a cell refuses.
    """
    assert study.search is not None
    for combination in combinations(study):
        values = {
            key: list(part.choices) if part.choices is not None else [part.low, part.high]
            for key, part in parameters_of(study.search, combination).items()
        }
        for index in range(max(map(len, values.values()), default=0)):
            keys = {key: found[min(index, len(found) - 1)] for key, found in values.items()}
            axes = {**combination.axes, "trial": f"check {index}"}
            cell = make_cell(study, axes, [*combination.keys, keys], study.search.seeds[0], last=VALIDATION)
            columns = resolver.parse(cell).datamodule.columns.values()
            known = {scorer for domain in columns for scorer in domain.scorers}
            if (scorer := study.search.scorer or study.scorer) not in known:
                raise UserError(
                    f"search.scorer is {scorer}",
                    why=f"the domains are scored by {', '.join(sorted(known))}",
                    fix="search by one of these, or add the scorer to a domain's scorers",
                )

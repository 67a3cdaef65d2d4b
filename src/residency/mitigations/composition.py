"""What mitigations promise, what they take from each other, and how two of them act together.

Each one declares what it `holds`. Most pairs compose, exactly:

    coordinates   factors that a mixer makes anew are written in the gauge nearest to the remembered ones
    slots         ratios add, no slot has two sources, and every source draws for itself
    rows, columns, inputs
                  the update is put onto their intersection, after all that is added to it (`update_order`)
    gradient      is projected after all that is added to it, then clipped (`gradient_order`)
    end of stage  mixers are folded in the order of the config, each a function of what it is given
                  memories are taken afterwards, at the weights that training goes on from

What does not is refused before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

from residency.core.errors import UserError
from residency.mitigations.base import Mitigation

__all__ = ["check_pairs", "refusal"]

Refusal = tuple[str, str]
"""Why two mitigations exclude each other, and what to type instead."""

_ONE_AND_ANY: Mapping[tuple[str, frozenset[str]], Refusal] = {
    ("directions", frozenset({"directions", "inputs", "columns", "rows"})): (
        "one keeps a step orthogonal to vectors over all parameters at once, the other masks or projects it matrix by "
        "matrix; whichever comes second undoes the first",
        "keep one of the two, or take configs/mitigation/ewc.yaml beside it",
    ),
    ("gradient", frozenset({"gradient"})): (
        "both project the gradient onto half-spaces of their own, and the second projection may leave the first's",
        "keep GEM alone: it meets the constraints of all earlier domains at once",
    ),
    ("last step", frozenset({"last step"})): (
        "each of them replaces the last step of a stage by another state, and the one that comes later has its way",
        "keep one of the two; a moving average needs no early stopping",
    ),
}


def refusal(first: Mitigation, second: Mitigation) -> Refusal | None:
    """Why two mitigations that both act cannot be combined; `None` where they can."""
    for (one, others), found in _ONE_AND_ANY.items():
        if any(one in a.holds and others & b.holds for a, b in ((first, second), (second, first))):
            return found
    taken = [m.rehearsal() for m in (first, second)]
    if taken[0] is None or taken[1] is None:
        return None
    (ratio, every), (other, beside) = taken[0], taken[1]
    if every != beside:
        return (
            f"one fills slots of every batch number {every}, the other of every batch number {beside}, and shares of "
            "different batches do not add",
            "give both the same `every`",
        )
    if ratio + other >= 1:
        return (
            f"their shares of a batch add to {ratio + other:g}, and nothing would be left for the new domain",
            "lower their ratios until the sum is below 1",
        )
    return None


def check_pairs(mitigations: Mapping[str, Mitigation]) -> None:
    """Every pair of mitigations that act.

    Raises:
        UserError: Naming both, and what to do instead.
    """
    late = 1 << 30  # a stage in which everything that can act does
    acting = {name: m for name, m in mitigations.items() if m.touches_training(late) or m.changes_weights(late)}
    for (name, first), (other, second) in combinations(acting.items(), 2):
        if (found := refusal(first, second)) is not None:
            kinds = f"model.mitigations.{name} ({type(first).__name__}) with {other} ({type(second).__name__})"
            raise UserError(kinds, why=found[0], fix=found[1])
    ratios = {name: taken[0] for name, m in acting.items() if (taken := m.rehearsal()) is not None}
    if len(ratios) > 1 and sum(ratios.values()) >= 1:
        raise UserError(
            f"model.mitigations {', '.join(ratios)} with ratios that add to {sum(ratios.values()):g}",
            why="nothing would be left for the new domain",
            fix="lower their ratios until the sum is below 1",
        )

"""A stream whose forgetting is known: closed forms of overlap and conflict, names, wordings."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from residency.core.errors import UserError
from residency.domains.controlled import VALUES, Controlled, ideal_matrix
from residency.metrics.matrix import forgetting

DIALS = list(itertools.product((0.0, 0.25, 0.5), (0.0, 0.5, 1.0), (1, 2, 3)))


def stream(count: int, **dials: Any) -> list[Controlled]:
    return [Controlled(place=k, facts=64, **dials) for k in range(count)]


@pytest.mark.parametrize(("overlap", "conflict", "difficulty"), DIALS)
def test_what_a_perfect_learner_forgets_is_overlap_times_conflict(
    overlap: float, conflict: float, difficulty: int
) -> None:
    """Up to half an overlap a domain meets its neighbours alone: each later neighbour costs it once."""
    R = np.array(ideal_matrix(stream(4, overlap=overlap, conflict=conflict, difficulty=difficulty)))
    assert R.shape == (5, 4)
    assert np.diag(R[1:]).tolist() == [1.0] * 4
    lost = 1 - R[-1, :-1]
    assert lost.tolist() == pytest.approx([overlap * conflict] * 3)
    assert forgetting(R, higher_is_better=True) == pytest.approx(overlap * conflict)
    # What the next domain shares without a conflict is known before it is learnt; the others are guessed.
    ahead = overlap * (1 - conflict) + (1 - overlap) / len(VALUES)
    assert np.diag(R[1:], 1).tolist() == pytest.approx([ahead] * 3)
    assert R[0].tolist() == pytest.approx([1 / len(VALUES)] * 4)


@pytest.mark.parametrize("difficulty", [1, 2, 3, 4])
def test_no_part_of_a_name_tells_its_colour(difficulty: int) -> None:
    """Names differ from each other; of several words each is used by many names."""
    domains = stream(3, overlap=0.5, conflict=0.5, difficulty=difficulty)
    names = {n: domain.name(n) for domain in domains for n in domain.told}
    assert len({*names.values()}) == len(names) == 128
    words = [word for name in names.values() for word in name.split()]
    assert len(words) == difficulty * len(names)
    uses = len(words) / len({*words})
    assert uses == 1 if difficulty == 1 else uses >= 4


def test_a_fact_is_learnt_in_three_wordings_and_asked_in_a_fourth() -> None:
    domain = Controlled(place=1, facts=16)
    train, test = domain.rows("train"), domain.rows("test")
    assert (len(train), len(test)) == (48, 16)
    assert not {row.prompt for row in train} & {row.prompt for row in test}
    assert {row.completion for row in train} <= {*VALUES}
    assert domain.fingerprint() == Controlled(place=1, facts=16).fingerprint()
    for other in ({"seed": 1}, {"overlap": 0.25}, {"conflict": 1.0}, {"difficulty": 2}, {"place": 2}):
        assert domain.fingerprint() != Controlled(**{"place": 1, "facts": 16, **other}).fingerprint()


@pytest.mark.parametrize("bad", [{"place": -1}, {"overlap": 1.5}, {"conflict": -0.1}, {"difficulty": 0}, {"facts": 1}])
def test_dials_have_ranges(bad: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="a controlled domain with"):
        Controlled(**bad)

"""The decision: contrasts equal least squares on the same cells, and what is not there is rarely claimed."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from residency.report.evidence.decision import Claim, decide
from residency.report.evidence.effects import TIMES, claims
from residency.report.evidence.findings import Findings
from support.null_studies import factorial

AXES = {"rank": ["4", "8", "16"], "replay": ["none", "0.1"], "order": ["abc", "cba"]}
TRUTH = {("rank", "16"): 0.3, ("replay", "0.1"): 0.8, ("order", "cba"): -0.5}


def test_effects_of_three_axes_are_those_of_least_squares() -> None:
    """rank × replay × order, 3 seeds: estimates of OLS with two-way terms on the same cells (statsmodels)."""
    pandas, formula = pytest.importorskip("pandas"), pytest.importorskip("statsmodels.formula.api")
    study = factorial(AXES, seeds=(0, 1, 2), truth=TRUTH, draw=4)
    cells = pandas.DataFrame(
        [
            {**e.record["axes"], "seed": e.record["seed"], "y": np.mean(e.record["scores"]["score"]["R"][-1])}
            for e in study.entries
        ]
    )
    terms = "C(rank, Treatment('4')) * C(replay, Treatment('none')) * C(order, Treatment('abc'))"
    main = formula.ols(f"y ~ {terms.replace('*', '+')} + C(seed)", cells).fit().params
    both = formula.ols(f"y ~ ({terms.replace('*', '+')})**2 + C(seed)", cells).fit().params
    base = {"rank": "4", "replay": "none", "order": "abc"}
    found = {(c.axis, c.a): c for c in claims(study, subject="replay", scorer="score") if c.metric == "average"}
    for (axis, value), claim in found.items():
        estimate = np.mean(claim.scores)
        if TIMES not in axis:
            name = f"C({axis}, Treatment('{base[axis]}'))[T.{value}]"
            assert estimate == pytest.approx(main[name], abs=1e-12), (axis, value)
            assert claim.settings == 12 // len(AXES[axis])
        else:
            wanted = [
                coefficient
                for name, coefficient in both.items()
                if name.count("[T.") == 2 and all(f"[T.{v}]" in name for v in value.split(" with "))
            ]
            assert estimate == pytest.approx(wanted[0], abs=1e-12), (axis, value)
    assert len(found) == 2 + 1 + 1 + 2 + 2 + 1


def test_every_axis_is_judged_in_one_family_and_large_effects_are_shown() -> None:
    study = factorial(AXES, seeds=range(6), truth=TRUTH, by_row=0.05, noise=0.1, draw=1)
    found = Findings(study=study, subject="replay", scorer="score")
    words = {(e.claim.axis, e.claim.a): e.word for e in found.evidence if e.claim.metric == "average"}
    assert words["replay", "0.1"] == "better"
    assert words["rank", "16"] == "better"
    assert words["order", "cba"] == "worse"
    assert {e.family for e in found.evidence} == {len(found.evidence)}
    assert found.recommendation.choice == "0.1"


def test_one_seed_in_several_orders_is_repeated_by_the_orders() -> None:
    study = factorial({"m": ["none", "a"], "order": ["1", "2", "3"]}, seeds=(0,), draw=2)
    claim = study.main_effect("m", "a", "average", "score")
    assert (claim.unit, len(claim.scores)) == ("order", 3)
    assert study.main_effect("order", "2", "average", "score").unit == "seed"


def test_a_comparison_uses_only_what_both_sides_have() -> None:
    study = factorial({"m": ["none", "a"]}, seeds=range(5), draw=3)
    study.cells[(("m", "a"),)].pop("4")
    claim = study.main_effect("m", "a", "average", "score")
    last = {
        (e.record["axes"]["m"], str(e.record["seed"])): np.mean(e.record["scores"]["score"]["R"][-1])
        for e in study.entries
    }
    assert claim.scores == pytest.approx([last["a", s] - last["none", s] for s in "0123"])


def test_a_domain_without_the_scorer_leaves_the_average_to_the_others() -> None:
    study = factorial({"m": ["none", "a"]}, seeds=(0, 1, 2))
    for entry in study.entries:
        for row in entry.record["scores"]["score"]["R"]:
            row[1] = None
    claim = study.main_effect("m", "a", "average", "score")
    assert claim.columns == ("law", "code")
    assert len(claim.scores) == 3
    assert claim.parts is not None
    assert {*claim.parts[0]} == {"law", "code"}


@pytest.mark.parametrize(
    ("scores", "word"),
    [
        ((), "missing"),
        ((0.0, 0.0, 0.0), "equal"),
        ((9.0,), "one seed"),
        ((9.0, 9.1), "too few seeds"),
        ((9.0, 9.1, 9.2), "better"),
        ((-9.0, -9.1, -9.2), "worse"),
        ((-9.0, 9.1, 9.2), "open"),
    ],
)
def test_one_word(scores: tuple[float, ...], word: str) -> None:
    assert decide([_claim(scores)])[0].word == word


def test_every_claim_of_the_page_counts_whatever_seeds_it_rests_on() -> None:
    """The correction is Holm's (statsmodels) over all tests, also where some rest on fewer seeds."""
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    rng = np.random.default_rng(0)
    alone = [_claim(tuple(rng.normal(1, 1, n))) for n in (3, 5, 8, 8, 4)]
    found = decide([*alone, _claim((1.0,)), _claim(())])
    wanted = multitest.multipletests([e.found.p for e in found[:5]], method="holm")[1]
    assert [e.p for e in found[:5]] == pytest.approx(list(wanted))
    assert {e.family for e in found} == {5}
    assert all(math.isnan(e.p) for e in found[5:])


def test_the_smallest_p_of_the_exact_test_stands_beside() -> None:
    found = decide([_claim((1.0, 1.1, 1.2))])[0]
    assert (found.smallest_p, found.p_exact) == (0.25, 0.25)


def _claim(scores: tuple[float, ...]) -> Claim:
    place: dict[str, Any] = {"axis": "m", "a": "a", "b": "none", "metric": "average", "scorer": "score"}
    return Claim(**place, columns=("law",), settings=1, scores=scores, parts=None)


# -- simulations ------------------------------------------------------------------------------------------------------


def false_takes(alternatives: int, seeds: int, *, missing: float, studies: int) -> float:
    """Share of studies without any difference of which the page would say "take one of them"."""
    names = ["none", *(f"m{i}" for i in range(alternatives))]
    wrong = 0
    for draw in range(studies):
        study = factorial({"m": names}, seeds=range(seeds), missing=missing, draw=draw)
        choice = Findings(study=study, subject="m", scorer="score").recommendation.choice
        wrong += choice is not None and choice != "none"
    return wrong / studies


@pytest.mark.parametrize(("alternatives", "seeds", "missing"), [(3, 3, 0.0), (8, 1, 0.0), (8, 3, 0.3), (3, 8, 0.3)])
def test_a_false_take_is_rare(alternatives: int, seeds: int, missing: float) -> None:
    # 7 of 60 would be a rate of .05 with a probability of 4 %, 9 of 60 with .3 %.
    assert false_takes(alternatives, seeds, missing=missing, studies=60) <= 0.1


@pytest.mark.slow
@pytest.mark.parametrize("alternatives", [3, 8])
@pytest.mark.parametrize("seeds", [1, 3, 8])
@pytest.mark.parametrize("missing", [0.0, 0.3])
def test_a_false_take_appears_in_at_most_one_of_twenty(alternatives: int, seeds: int, missing: float) -> None:
    assert false_takes(alternatives, seeds, missing=missing, studies=1000) <= 0.05

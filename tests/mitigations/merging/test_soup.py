"""Soups: a mean that knows no order, and greedy choice by the current domain's validation rows alone."""

from __future__ import annotations

from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.errors import UserError
from residency.mitigations import Mitigation, Soup
from residency.mitigations.merging import soup as module_of_soup
from residency.mitigations.merging.soup import greedy, uniform
from support.two_stages import ADAPTERS, equal, randn, two_stages

# -- the mean -------------------------------------------------------------------------------------------------------


def states(n: int) -> list[dict[str, torch.Tensor]]:
    return [{"a": randn(40, seed=k), "b": randn(3, 4, seed=k + 50)} for k in range(n)]


@pytest.mark.parametrize("n", [2, 3, 4])
def test_the_order_does_not_matter(n: int) -> None:
    found = [{**uniform(order)} for order in permutations(states(n))]
    assert all(equal(found[0], other) for other in found)
    for name in "ab":
        mean = torch.stack([state[name].double() for state in states(n)]).mean(0)
        torch.testing.assert_close(found[0][name].double(), mean, rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [2, 3, 5, 7])
def test_a_soup_of_copies_is_the_copy(n: int) -> None:
    one = states(1)[0]
    assert equal({**uniform([one] * n)}, one)


def test_a_soup_of_one_is_that_very_object() -> None:
    one = states(1)[0]
    assert uniform([one]) is one


# -- greedy choice --------------------------------------------------------------------------------------------------


def loss_of(points: list[float], target: float) -> Any:
    return lambda chosen: abs(sum(points[i] for i in chosen) / len(chosen) - target)


@pytest.mark.parametrize(
    ("points", "wanted"),
    [
        ([1.0, -1.0, 5.0], (0, 1)),  # their mean hits 0, the third would spoil it
        ([5.0, 1.0, -1.2], (1, 2)),
        ([0.0, 1.0], (0,)),
        ([2.0, 2.0, 2.0], (0, 1, 2)),  # not worse is good enough
        ([3.0], (0,)),
        ([-1.0, 9.0, 1.5], (0, 2)),
    ],
)
def test_greedy_takes_what_does_not_hurt(points: list[float], wanted: tuple[int, ...]) -> None:
    score_of = loss_of(points, 0.0)
    scores = [score_of((i,)) for i in range(len(points))]
    chosen = greedy(scores, score_of)
    assert chosen == wanted
    assert score_of(chosen) <= min(scores), "never worse than the best single state"


def test_of_equal_states_the_newest_comes_first() -> None:
    assert greedy([1.0, 1.0], lambda chosen: 2.0) == (1,)


# -- in a stream ----------------------------------------------------------------------------------------------------


def over_steps() -> Mitigation:
    return Soup(over="steps", last=3, every=1)


def every_second() -> Mitigation:
    return Soup(over="steps", every=2)


def chosen() -> Mitigation:
    return Soup(over="steps", choose="greedy")


def test_over_stages(llama: Path) -> None:
    """The first stage is as it was, the second the mean of what both have trained."""
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", Soup)
    assert equal(run.weights[0], plain.weights[0])
    assert equal(run.weights[1], {**uniform(plain.weights)})


@pytest.mark.parametrize(("make", "taken"), [(over_steps, (1, 2, 3)), (every_second, (1, 3))])
def test_over_steps(make: Any, taken: tuple[int, ...], llama: Path) -> None:
    """States counted back from the last step of 4; nothing of another stage."""
    run = two_stages(llama, "full", make)
    for k in (0, 1):
        assert equal(run.weights[k], {**uniform([run.steps[k][i] for i in taken])})
    assert not run.tree(2)["mitigations"]["x"]["kept"]


def test_greedy_looks_at_the_current_domain_only(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And takes a soup that is not worse there than the state that training left."""
    seen: list[tuple[str, set[str], float]] = []
    real = module_of_soup.validation_nll

    def watched(module: Any) -> float:
        nll = real(module)
        seen.append((module.stage.domain, {e.domain for e in module.validation()}, nll))
        return nll

    monkeypatch.setattr(module_of_soup, "validation_nll", watched)
    run = two_stages(llama, "lora", lambda: Soup(over="steps", choose="greedy"))
    assert {(domain, *read) for domain, read, _ in seen} == {("a", "a"), ("b", "b")}
    for domain in "ab":
        losses = [nll for of, _, nll in seen if of == domain]
        assert len(losses) == 4 + 3, "4 states, then one by one"
        assert min(losses) <= losses[3]
    assert not any(e.alternatives for e in run.module.validation())


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_greedy_leaves_the_best_mean_in_the_model(adapter: str, llama: Path) -> None:
    run = two_stages(llama, adapter, chosen)
    losses = []
    adapter_of, model = run.module.adapter, run.module.model
    final = run.weights[1]
    for state in [final, *run.steps[1]]:
        adapter_of.load_state(model, state)
        losses.append(module_of_soup.validation_nll(run.module))
    adapter_of.load_state(model, final)
    assert losses[0] <= min(losses[1:]) + 1e-5


@pytest.mark.parametrize("options", [{"last": 0}, {"every": 0}, {"over": "epochs"}, {"choose": "best"}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        Soup(**options)

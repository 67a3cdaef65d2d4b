"""TIES: trim, elect, average what agrees."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.core.errors import UserError
from residency.mitigations import TIES, Mitigation
from residency.mitigations.merging.ties import ties, ties_merge, trim
from support.two_stages import randn, two_stages


def test_by_hand() -> None:
    """Two vectors, density 1/2: 4 and -3 of the first, -2 and 1 of the second survive."""
    one, two = torch.tensor([4.0, -1.0, -3.0, 0.5]), torch.tensor([0.5, -0.2, -2.0, 1.0])
    assert trim(one, density=0.5).tolist() == [4.0, 0.0, -3.0, 0.0]
    assert trim(two, density=0.5).tolist() == [0.0, 0.0, -2.0, 1.0]
    assert ties([one, two], density=0.5).tolist() == [4.0, 0.0, -2.5, 1.0]


def test_the_sign_of_the_sum_is_elected() -> None:
    """The sum decides, not the count; what disagrees is left out of the mean; a draw gives nothing."""
    vectors = [torch.tensor([5.0, 1.0, 2.0]), torch.tensor([-1.0, 2.0, -2.0]), torch.tensor([-1.0, -9.0, 0.0])]
    assert ties(vectors, density=1.0).tolist() == [5.0, -9.0, 0.0]


def test_one_vector_at_density_one_is_itself() -> None:
    vector = randn(7, 9)
    assert trim(vector, density=1.0) is vector
    assert torch.equal(ties([vector], density=1.0), vector)


@pytest.mark.parametrize("n", [2, 3, 5])
def test_identical_vectors_are_that_vector(n: int) -> None:
    vector = randn(7, 9)
    assert torch.equal(ties([vector] * n, density=1.0), vector)
    assert torch.equal(ties([vector] * n, density=0.3), trim(vector, density=0.3))


@pytest.mark.parametrize(("density", "kept"), [(0.01, 1), (0.2, 8), (0.21, 9), (0.5, 20), (1.0, 40)])
def test_the_largest_entries_are_kept(density: float, kept: int) -> None:
    vector = randn(5, 8)
    trimmed = trim(vector, density=density)
    assert int((trimmed != 0).sum()) == kept
    assert torch.equal(trimmed[trimmed != 0], vector[trimmed != 0])
    assert kept == 40 or float(vector[trimmed == 0].abs().max()) <= float(trimmed[trimmed != 0].abs().min())
    assert int((trim(torch.ones(5, 8), density=density) != 0).sum()) == kept, "also where all are equal"


def test_the_order_does_not_matter() -> None:
    vectors = [randn(60, seed=k) for k in range(3)]
    assert torch.equal(ties(vectors, density=0.4), ties(vectors[::-1], density=0.4))


def test_the_ends_are_the_very_objects() -> None:
    base, tuned = {"a": randn(5)}, {"a": randn(5, seed=1)}
    assert ties_merge(base, [tuned], density=1.0, strength=1.0) is tuned
    assert ties_merge(base, [tuned, tuned], density=0.5, strength=0.0) is base
    merged = ties_merge(base, [tuned, tuned], density=1.0, strength=0.5)
    torch.testing.assert_close(merged["a"], (base["a"] + tuned["a"]) / 2)


def all_of_it() -> Mitigation:
    return TIES(density=1.0)


def test_in_a_stream_every_stage_votes(llama: Path) -> None:
    plain, run = two_stages(llama, "full"), two_stages(llama, "full", all_of_it)
    start = {name: leaf.detach() for name, leaf in run.module.backbone.load().named_parameters()}
    for name, merged in run.weights[1].items():
        one, two = (weights[name] - start[name] for weights in plain.weights)
        torch.testing.assert_close(merged, start[name] + ties([one, two], density=1.0), rtol=0, atol=1e-6)
        agree = (one.sign() == two.sign()) & (one != 0)
        mean = start[name] + (one + two) / 2
        torch.testing.assert_close(merged[agree], mean[agree], rtol=0, atol=1e-6)


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.1}, {"strength": -1.0}, {"last": 0}])
def test_bad_values_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        TIES(**options)

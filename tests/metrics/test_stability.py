"""A comparison of gradient norms, and when it is refused."""

from __future__ import annotations

import pytest

from residency.errors import UserError
from residency.metrics.stability import GradientTrace, maximum_reduction


def test_reduction_of_the_largest_norm() -> None:
    clipper = {"norm": 1.0}
    run, baseline = (GradientTrace(norms=norms, clipper=clipper) for norms in ([1.0, 3.0], [12.0, 2.0]))
    assert maximum_reduction(run, baseline) == pytest.approx(0.75)
    assert maximum_reduction(baseline, run) == pytest.approx(-3.0)


@pytest.mark.parametrize(
    "other",
    [
        GradientTrace(norms=[1.0, 2.0]),
        GradientTrace(norms=[1.0, 2.0], clipper={"norm": 2.0}),
        GradientTrace(norms=[1.0], clipper={"norm": 1.0}),
    ],
)
def test_different_clippers_are_refused(other: GradientTrace) -> None:
    with pytest.raises(UserError, match="what the clipper does, not what the method does"):
        maximum_reduction(other, GradientTrace(norms=[1.0, 2.0], clipper={"norm": 1.0}))

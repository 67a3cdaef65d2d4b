"""intransigence: see `intransigence`."""

from __future__ import annotations

from residency.metrics.definitions.base import About, Scores, learned, mean, reference, utility

__all__ = ["ABOUT", "intransigence"]

ABOUT = About(
    kind="loss",
    title="intransigence",
    help="what joint training reaches minus score when just learnt; above 0 = learnt less",
    rank=110,
    needs="joint",
)


def intransigence(R: Scores, *, higher_is_better: bool, joint: Scores) -> float:
    """I = (1/T) Σ_j (joint_j - u[j, j]); positive = learnt less than joint training (Chaudhry et al. 2018).

    `joint`: (T,) score on domain j of a model trained on domains 1 to j together, direction as R.
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(reference(joint, "joint", u, higher_is_better=higher_is_better) - learned(u))

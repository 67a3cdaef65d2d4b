"""The same words, other formulas: named variants, kept to reproduce a number "as reported by ...".

Public code calls different quantities "forgetting", "BWT" and "FWT"; on one matrix they differ by
factors. The cited definitions are `forgetting`, `bwt` and `fwt` of `residency.metrics.matrix`; use those
unless a paper has to be matched. Conventions are the same: R (T+1, T) in training order, utility u,
rows and domains numbered from 1, row 0 the base model, missing = NaN.

Each docstring names the code base the formula was read in. Where that code pads unmeasured scores with 0,
this module does not: 0 would be the best possible loss. `upper` says what happens to scores of a domain
from before it was trained on (rows 1 to j-1): "nan" reads them, so a missing one gives NaN;
"ignore" leaves them out, present or not.
"""

from __future__ import annotations

import math
from typing import Literal

import numpy as np

from residency.metrics.matrix import FloatArray, Scores, bwt, learned, mean, reference, utility

__all__ = [
    "average_triangle",
    "bwt_over_T",
    "bwt_triangle",
    "bwt_triangle_skip_neighbour",
    "forgetting_first_last",
    "forgetting_max_all_previous",
    "forgetting_max_including_last",
    "forgetting_max_with_base",
    "forgetting_skip_neighbour",
    "fr_joint_normalised",
    "fwt_diag_minus_constant",
    "fwt_no_baseline",
    "fwt_triangle",
    "fwt_vs_single",
    "remembering",
]

Upper = Literal["nan", "ignore"]


def _best(u: FloatArray, *, last: int, upper: Upper) -> FloatArray:
    """(T-1,) max over rows 1 to `last` of each domain but the newest."""
    if upper not in ("nan", "ignore"):
        raise ValueError(f"upper={upper!r} is unknown. It says what to do above the diagonal: give 'nan' or 'ignore'.")
    first = [1 if upper == "nan" else j for j in range(1, u.shape[1])]
    return np.array([u[start : last + 1, column].max() for column, start in enumerate(first)])


def forgetting_first_last(R: Scores, *, higher_is_better: bool) -> float:
    """mean_{j<T} (u[j, j] - u[T, j]) = -`bwt` (Avalanche; ContinualLM `forgetting_rate.py`). NaN for T = 1."""
    return 0.0 - bwt(R, higher_is_better=higher_is_better)


def forgetting_max_including_last(R: Scores, *, higher_is_better: bool, upper: Upper = "nan") -> float:
    """mean_{j<T} (max_{1≤l≤T} u[l, j] - u[T, j]) (Mammoth, PyCIL). Never negative. NaN for T = 1.

    >>> forgetting_max_including_last([[0, 0], [8, 1], [9, 9]], higher_is_better=True)
    0.0
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(_best(u, last=u.shape[1], upper=upper) - u[-1, :-1])


def forgetting_max_all_previous(R: Scores, *, higher_is_better: bool, upper: Upper = "nan") -> float:
    """mean_{j<T} (max_{1≤l≤T-1} u[l, j] - u[T, j]) (Renate; SAPT on a full matrix). NaN for T = 1.

    Rows from before domain j was trained on count. With `upper="ignore"` it is `forgetting`.
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(_best(u, last=u.shape[1] - 1, upper=upper) - u[-1, :-1])


def forgetting_max_with_base(R: Scores, *, higher_is_better: bool, upper: Upper = "nan") -> float:
    """mean_{j<T} (max_{0≤l≤T-1} u[l, j] - u[T, j]): the base model's score counts as well. NaN for T = 1.

    The reading of Chaudhry et al. in which l starts at 0. Row 0 is read whatever `upper` says.
    """
    u = utility(R, higher_is_better=higher_is_better)
    best = np.maximum(u[0, :-1], _best(u, last=u.shape[1] - 1, upper=upper))
    return mean(best - u[-1, :-1])


def forgetting_skip_neighbour(R: Scores, *, higher_is_better: bool) -> float:
    """Σ_{j≤T-2} (u[j, j] - u[T, j]) / (T-1) (LibContinual `compute_frgt`). NaN for T < 3: no term is left.

    The domain before the last is left out of the sum but not of the divisor.
    """
    u = utility(R, higher_is_better=higher_is_better)
    domains = u.shape[1]
    if domains < 3:
        return math.nan
    return float((learned(u)[:-2] - u[-1, :-2]).sum() / (domains - 1))


def bwt_over_T(R: Scores, *, higher_is_better: bool) -> float:
    """Σ_{j≤T} (u[T, j] - u[j, j]) / T: the newest domain's 0 is averaged in (SAPT, GainLoRA `score.py`).

    NaN for T = 1, where that 0 would be the whole result.
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(u[-1] - learned(u)) if u.shape[1] > 1 else math.nan


def bwt_triangle(R: Scores, *, higher_is_better: bool) -> float:
    """Σ_{i≥2} Σ_{j<i} (u[i, j] - u[j, j]) / (T(T-1)/2) (Díaz-Rodríguez et al. 2018; continuum). NaN for T = 1.

    >>> bwt_triangle([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    -2.0
    """
    u = utility(R, higher_is_better=higher_is_better)
    change = u[1:] - learned(u)
    return mean(change[np.tril_indices(u.shape[1], k=-1)])


def bwt_triangle_skip_neighbour(R: Scores, *, higher_is_better: bool) -> float:
    """Σ_{i≥3} Σ_{j≤i-2} (u[i, j] - u[j, j]) / (T(T-1)/2) (LibContinual `compute_bwt`). NaN for T < 3.

    The terms right below the diagonal are left out of the sum but not of the divisor.
    """
    u = utility(R, higher_is_better=higher_is_better)
    domains = u.shape[1]
    if domains < 3:
        return math.nan
    change = u[1:] - learned(u)
    return float(change[np.tril_indices(domains, k=-2)].sum() / (domains * (domains - 1) / 2))


def fwt_no_baseline(R: Scores, *, higher_is_better: bool) -> float:
    """mean_{j≥2} u[j-1, j]: `fwt` without subtracting the base model (continuum). NaN for T = 1."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(u[1:-1].diagonal(offset=1))


def fwt_triangle(R: Scores, *, higher_is_better: bool) -> float:
    """Σ_{1≤i<j} u[i, j] / (T(T-1)/2), again without a baseline (Díaz-Rodríguez et al. 2018). NaN for T = 1."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(u[1:][np.triu_indices(u.shape[1], k=1)])


def fwt_vs_single(R: Scores, *, higher_is_better: bool, single: Scores, first: Literal[1, 2] = 2) -> float:
    """mean_{j≥first} (u[j, j] - single_j) (DOC, CLArena: j ≥ 2; the SAPT paper: j ≥ 1).

    What the stream adds to learning a domain: plasticity, not transfer to unseen domains. NaN if no j is left.

    Args:
        R: (T+1, T) scores.
        higher_is_better: Direction of R and of `single`.
        single: (T,) score on domain j of a model trained on domain j alone.
        first: The first domain that counts.
    """
    if first not in (1, 2):
        raise ValueError(f"first={first!r} is unknown. Papers start at the first or the second domain: give 1 or 2.")
    u = utility(R, higher_is_better=higher_is_better)
    gain = learned(u) - reference(single, "single", u, higher_is_better=higher_is_better)
    return mean(gain[first - 1 :])


def fwt_diag_minus_constant(R: Scores, *, higher_is_better: bool, constant: float = 50.94) -> float:
    """(1/T) Σ_j u[j, j] - constant: no transfer measure, only the number SAPT's `score.py` prints.

    50.94 is a debugging leftover there (circle-hit/SAPT#7); GainLoRA's copy subtracts 0. `constant` is in
    units of u.
    """
    return mean(learned(utility(R, higher_is_better=higher_is_better))) - constant


def fr_joint_normalised(R: Scores, *, higher_is_better: bool, joint: Scores, random: Scores) -> float:
    """(1/T) Σ_j (u[T, j] - random_j) / (joint_j - random_j) - 1, a ratio (CLArena `cl_full_eval.py`).

    0 = as good as joint training, -1 = as bad as an untrained model. NaN where joint and random are equal.

    Args:
        R: (T+1, T) scores.
        higher_is_better: Direction of R, `joint` and `random`.
        joint: (T,) scores of one model trained on all domains together.
        random: (T,) scores of a randomly initialised model.
    """
    u = utility(R, higher_is_better=higher_is_better)
    floor = reference(random, "random", u, higher_is_better=higher_is_better)
    reach = reference(joint, "joint", u, higher_is_better=higher_is_better) - floor
    return mean((u[-1] - floor) / np.where(reach != 0, reach, np.nan)) - 1.0


def average_triangle(R: Scores, *, higher_is_better: bool) -> float:
    """A = Σ_{j≤i} u[i, j] / (T(T+1)/2): all scores on domains seen so far (Díaz-Rodríguez et al. 2018)."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(u[1:][np.tril_indices(u.shape[1])])


def remembering(R: Scores, *, higher_is_better: bool) -> float:
    """REM = 1 - |min(BWT, 0)| with BWT = `bwt_triangle`; 1 = nothing lost (Díaz-Rodríguez et al. 2018).

    Raises:
        ValueError: A score of a trained domain is outside [0, 1], where REM has no meaning.
    """
    seen = np.tril(utility(R, higher_is_better=True)[1:])
    if ((seen < 0) | (seen > 1)).any():
        raise ValueError("REM needs scores in [0, 1]: elsewhere 1 - |BWT| means nothing. Divide percentages by 100.")
    return 1.0 - abs(float(np.minimum(bwt_triangle(R, higher_is_better=higher_is_better), 0.0)))

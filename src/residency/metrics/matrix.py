"""What was learnt and what was forgotten: pure functions of one score matrix.

`R` has shape (T+1, T): `R[k, j-1]` is the score on the j-th domain after training on the k-th one, row 0 is
the model before any training, columns are in training order. A missing score is NaN (or `None`), never 0.

Every function computes on the **utility** u: u = R if higher is better, u = -R for a loss. So of losses
`average` is minus the mean, and for every scorer `bwt` below 0 and `forgetting` above 0 mean forgot.
Formulas number rows and domains from 1; u[0, j] is the base model. Results have the unit of the scores.

A result that reads a missing cell is NaN; `missing_cells` lists them. With T = 1 nothing can be forgotten
or transferred: NaN too. Other definitions of the same words are in `residency.metrics.variants`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import overload

import numpy as np
import numpy.typing as npt

__all__ = [
    "anytime_average",
    "average",
    "bwt",
    "forgetting",
    "fwt",
    "intransigence",
    "learning",
    "min_accuracy",
    "missing_cells",
    "perplexity_forgetting",
    "plasticity",
    "relative_forgetting",
    "stability",
    "stability_plasticity",
    "summary",
    "utility",
    "worst_case_accuracy",
]

FloatArray = npt.NDArray[np.float64]
Scores = npt.ArrayLike | Sequence[float | None] | Sequence[Sequence[float | None]]
"""What `numpy.asarray(..., dtype=float)` reads; `None`, as in `results.json`, becomes NaN."""


def utility(R: Scores, *, higher_is_better: bool) -> FloatArray:
    """(T+1, T) scores, the sign turned so that higher is better. ValueError if R is no (T+1, T) table, T >= 1."""
    u = _signed(R, "R", higher_is_better)
    if u.ndim != 2 or u.shape[1] < 1 or u.shape[0] != u.shape[1] + 1:
        raise ValueError(
            f"R has shape {u.shape}, not (T+1, T). T domains need a row 0 for the base model and one row after each. "
            "Put a row of NaN on top if the base model was not scored, and leave out the columns of probes."
        )
    return u


def reference(scores: Scores, name: str, u: FloatArray, *, higher_is_better: bool) -> FloatArray:
    """(T,) utility of a model outside the stream, to be compared with u domain by domain."""
    r = _signed(scores, name, higher_is_better)
    if r.shape != u.shape[1:]:
        raise ValueError(f"{name} has shape {r.shape}. It is compared with R column by column: give {u.shape[1:]}.")
    return r


def _signed(scores: Scores, name: str, higher_is_better: bool) -> FloatArray:
    try:
        m = np.asarray(scores, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} is no rectangular table of numbers ({error}). Formulas address it by row and column. "
            "Give an array, with NaN or None where a score is missing."
        ) from error
    # A diverged score is no score either: infinities would turn into NaN in half of the formulas only.
    m = np.where(np.isfinite(m), m, np.nan)
    return m if higher_is_better else 0.0 - m


def mean(values: FloatArray) -> float:
    """Mean of all values; NaN if there are none or if one is missing."""
    return float(values.mean()) if values.size else math.nan


def learned(u: FloatArray) -> FloatArray:
    """(T,) u[j, j]: the score on each domain right after training on it."""
    return u[1:].diagonal()


@overload
def missing_cells(R: Scores, names: None = None, *, trained_only: bool = False) -> list[tuple[int, int]]: ...
@overload
def missing_cells(R: Scores, names: Sequence[str], *, trained_only: bool = False) -> list[tuple[str, str]]: ...
def missing_cells(
    R: Scores, names: Sequence[str] | None = None, *, trained_only: bool = False
) -> list[tuple[int, int]] | list[tuple[str, str]]:
    """The (row, column) of every missing cell of R, row by row; NaN, None and infinite scores are missing.

    With `names`, the T domains, a cell reads (last trained domain or "before training", scored domain).
    `trained_only` leaves out scores of domains that had not been trained on yet, row 0 included.

    >>> missing_cells([[None], [0.5]]), missing_cells([[None], [0.5]], ["law"])
    ([(0, 0)], [('before training', 'law')])
    """
    gaps = np.isnan(utility(R, higher_is_better=True))
    if trained_only:
        gaps = np.tril(gaps, k=-1)
    cells = [(int(k), int(j)) for k, j in np.argwhere(gaps)]
    if names is None:
        return cells
    if len(names) != gaps.shape[1]:
        raise ValueError(f"{len(names)} names for {gaps.shape[1]} columns of R. Give one name per domain.")
    return [(["before training", *names][k], names[j]) for k, j in cells]


def _until(R: Scores, higher_is_better: bool, after: int | None) -> tuple[FloatArray, int]:
    """The utility matrix and k, the number of domains trained on so far."""
    u = utility(R, higher_is_better=higher_is_better)
    k = u.shape[1] if after is None else after
    if not 1 <= k <= u.shape[1]:
        raise ValueError(f"after={k} with {u.shape[1]} domains. It counts trained domains: give 1 to {u.shape[1]}.")
    return u, k


def average(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """ACC_k = (1/k) Σ_{j≤k} u[k, j], k = `after` or T (Lopez-Paz and Ranzato 2017, GEM).

    >>> average([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    7.5
    """
    u, k = _until(R, higher_is_better, after)
    return mean(u[k, :k])


def anytime_average(R: Scores, *, higher_is_better: bool) -> float:
    """AIA = (1/T) Σ_k ACC_k, the average incremental accuracy (Rebuffi et al. 2017, iCaRL)."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(np.array([mean(u[k, :k]) for k in range(1, len(u))]))


def learning(R: Scores, *, higher_is_better: bool) -> float:
    """LA = (1/T) Σ_j u[j, j], learning accuracy (Riemer et al. 2019). Belongs beside every `bwt`."""
    return mean(learned(utility(R, higher_is_better=higher_is_better)))


def bwt(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """BWT = mean_{j<k} (u[k, j] - u[j, j]), k = `after` or T; negative = forgot (GEM). NaN for k = 1.

    >>> bwt([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    -2.0
    """
    u, k = _until(R, higher_is_better, after)
    return mean(u[k, : k - 1] - learned(u)[: k - 1])


def forgetting(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """F = mean_{j<k} (max_{j≤l<k} u[l, j] - u[k, j]), k = `after` or T (Chaudhry et al. 2018). NaN for k = 1.

    Positive is bad; negative if the last row is the best. Never below -`bwt`.

    >>> forgetting([[0, 0], [8, 1], [6, 9]], higher_is_better=True)
    2.0
    """
    u, k = _until(R, higher_is_better, after)
    best = np.array([u[j:k, j - 1].max() for j in range(1, k)])
    return mean(best - u[k, : k - 1])


def fwt(R: Scores, *, higher_is_better: bool) -> float:
    """FWT = mean_{j≥2} (u[j-1, j] - u[0, j]), zero-shot transfer (GEM, there over a random model). NaN for T = 1."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(u[1:-1].diagonal(offset=1) - u[0, 1:])


def relative_forgetting(R: Scores, *, higher_is_better: bool, floor: float = 1e-3) -> float:
    """100 · mean_{j<T} (u[j, j] - u[T, j]) / |u[j, j]|, in percent; positive is bad. NaN for T = 1.

    Of a loss it is the relative increase ("loss-relative drift"). |u[j, j]| under `floor` gives NaN, not noise.
    """
    u = utility(R, higher_is_better=higher_is_better)
    old = learned(u)[:-1]
    size = np.where((np.abs(old) >= floor) & (old != 0), np.abs(old), np.nan)
    return 100.0 * mean((old - u[-1, :-1]) / size)


def min_accuracy(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """min-ACC = mean_{j<k} min_{j<l≤k} u[l, j], k = `after` or T (De Lange et al. 2023). NaN for k = 1."""
    u, k = _until(R, higher_is_better, after)
    return mean(np.array([u[j + 1 : k + 1, j - 1].min() for j in range(1, k)]))


def worst_case_accuracy(R: Scores, *, higher_is_better: bool, after: int | None = None) -> float:
    """WC-ACC = u[k, k]/k + (1 - 1/k) · min-ACC, k = `after` or T (De Lange et al. 2023). u[1, 1] for k = 1."""
    u, k = _until(R, higher_is_better, after)
    worst = min_accuracy(R, higher_is_better=higher_is_better, after=k) if k > 1 else 0.0
    return float(u[k, k - 1]) / k + (1 - 1 / k) * worst


def intransigence(R: Scores, *, higher_is_better: bool, joint: Scores) -> float:
    """I = (1/T) Σ_j (joint_j - u[j, j]); positive = learnt less than joint training (Chaudhry et al. 2018).

    `joint`: (T,) score on domain j of a model trained on domains 1 to j together, direction as R.
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(reference(joint, "joint", u, higher_is_better=higher_is_better) - learned(u))


def _kept(new: FloatArray, old: FloatArray, higher_is_better: bool) -> FloatArray:
    """new/old of scores above 0, or exp(new - old) of log likelihoods: 1 = nothing lost."""
    if higher_is_better:
        return new / np.where(old > 0, old, np.nan)
    with np.errstate(over="ignore"):
        return np.exp(new - old)


def plasticity(R: Scores, *, higher_is_better: bool, single: Scores) -> float:
    """PL = (1/T) Σ_j u[j, j] / single_j, a ratio; 1 = learnt as well as alone.

    `single`: (T,) score of a model trained on domain j alone, direction as R; not above 0 gives NaN.
    For lower-is-better scores, which must be nats: mean of exp(single_j - R[j, j]).
    """
    u = utility(R, higher_is_better=higher_is_better)
    return mean(_kept(learned(u), reference(single, "single", u, higher_is_better=higher_is_better), higher_is_better))


def stability(R: Scores, *, higher_is_better: bool) -> float:
    """ST = mean_{j<T} u[T, j] / u[j, j], the retention ratio; 1 = nothing lost. Directions as in `plasticity`."""
    u = utility(R, higher_is_better=higher_is_better)
    return mean(_kept(u[-1, :-1], learned(u)[:-1], higher_is_better))


def stability_plasticity(R: Scores, *, higher_is_better: bool, single: Scores) -> float:
    """SP = 2·ST·PL / (ST + PL), the harmonic mean; NaN if one is negative or the sum is 0."""
    st = stability(R, higher_is_better=higher_is_better)
    pl = plasticity(R, higher_is_better=higher_is_better, single=single)
    return 2 * st * pl / (st + pl) if min(st, pl) >= 0 and st + pl > 0 else math.nan


def perplexity_forgetting(R: Scores) -> FloatArray:
    """(T-1,) perplexity ratios exp(R[T, j] - R[j, j]) of an R in nats, per domain; above 1 = forgot."""
    nll = utility(R, higher_is_better=True)
    with np.errstate(over="ignore"):
        return np.exp(nll[-1, :-1] - learned(nll)[:-1])


def summary(R: Scores, *, higher_is_better: bool) -> dict[str, float]:
    """The default metrics of one matrix by name, in the form of `results.json`."""
    metrics = (average, learning, bwt, forgetting, fwt, anytime_average, relative_forgetting)
    return {metric.__name__: metric(R, higher_is_better=higher_is_better) for metric in metrics}

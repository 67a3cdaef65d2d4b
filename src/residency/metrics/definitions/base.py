"""The score matrix as arrays, and what the definitions share.

Conventions of `residency.metrics.matrix`: R of shape (T+1, T), row 0 before any training, columns in training order,
missing = NaN or `None`; every definition computes on the **utility** u: u = R if higher is better, u = -R for a loss.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
import numpy.typing as npt

__all__ = ["About", "FloatArray", "Scores", "kept", "learned", "mean", "missing_cells", "reference", "until", "utility"]

FloatArray = npt.NDArray[np.float64]
Scores = npt.ArrayLike | Sequence[float | None] | Sequence[Sequence[float | None]]
"""What `numpy.asarray(..., dtype=float)` reads; `None`, as in `results.json`, becomes NaN."""


@dataclass(frozen=True, slots=True, kw_only=True)
class About:
    """How a metric is read; every file of this folder has one, named `ABOUT`.

    Args:
        kind: `level` reads in the scorer's direction (a loss reads as a loss), `gain` is good above 0, `loss` is bad
            above 0.
        title: Heading of a column.
        help: One sentence for whoever reads it for the first time.
        rank: Place among the others; small first.
        needs: Scores of other models that the function takes besides R: of `single` or `joint` training.
    """

    kind: Literal["level", "gain", "loss"]
    title: str
    help: str
    rank: int = 100
    needs: Literal["joint", "single"] | None = None


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


def until(R: Scores, higher_is_better: bool, after: int | None) -> tuple[FloatArray, int]:
    """The utility matrix and k, the number of domains trained on so far."""
    u = utility(R, higher_is_better=higher_is_better)
    k = u.shape[1] if after is None else after
    if not 1 <= k <= u.shape[1]:
        raise ValueError(f"after={k} with {u.shape[1]} domains. It counts trained domains: give 1 to {u.shape[1]}.")
    return u, k


def kept(new: FloatArray, old: FloatArray, higher_is_better: bool) -> FloatArray:
    """new/old of scores above 0, or exp(new - old) of log likelihoods: 1 = nothing lost."""
    if higher_is_better:
        return new / np.where(old > 0, old, np.nan)
    with np.errstate(over="ignore"):
        return np.exp(new - old)

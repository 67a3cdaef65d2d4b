"""The metrics of a score matrix, found by themselves: a new one is a new file in `residency.metrics.definitions`.

The file `name.py` has a function `name(R, *, higher_is_better) -> float` and an `ABOUT`. Summary, search, report and
gate read this table; none of them is edited for a new metric.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType

from residency.metrics import definitions
from residency.metrics.definitions.base import About, Scores

__all__ = ["MatrixMetric", "matrix_metrics", "printed_sign"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MatrixMetric:
    """A definition with what tables say about it."""

    name: str
    about: About
    function: Callable[..., float]

    def __call__(self, R: Scores, *, higher_is_better: bool, **references: Scores) -> float:
        """The metric of one (T+1, T) matrix, on the utility."""
        return self.function(R, higher_is_better=higher_is_better, **references)


@lru_cache(maxsize=1)
def matrix_metrics() -> Mapping[str, MatrixMetric]:
    """Name -> metric, in the order in which tables show them.

    Raises:
        TypeError: A file of the folder has no function of its name, or no `ABOUT`.
    """
    found = []
    for file in pkgutil.iter_modules(definitions.__path__):
        if file.name == "base":
            continue
        module = import_module(f"{definitions.__name__}.{file.name}")
        function, about = getattr(module, file.name, None), getattr(module, "ABOUT", None)
        if not callable(function) or not isinstance(about, About):
            raise TypeError(f"{module.__name__} needs a function {file.name}(R, *, higher_is_better) and an ABOUT")
        found.append(MatrixMetric(name=file.name, about=about, function=function))
    found.sort(key=lambda metric: (metric.about.rank, metric.name))
    return MappingProxyType({metric.name: metric for metric in found})


def printed_sign(metric: str, *, higher_is_better: bool) -> float:
    """What turns a metric into what tables print: a level of a loss reads as a loss."""
    known = matrix_metrics().get(metric)
    return -1.0 if known is not None and known.about.kind == "level" and not higher_is_better else 1.0

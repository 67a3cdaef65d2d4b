"""The metrics of a score matrix, found by themselves: a new one is a new file in `residency.metrics.definitions`.

The file `name.py` has a function `name(R, *, higher_is_better) -> float` and an `ABOUT`. Summary, search, report and
gate read this table; none of them is edited for a new metric. Files of other packages are found where the environment
variable RESIDENCY_METRICS names the package: `RESIDENCY_METRICS=mylab.metrics`, several with `:` between them (`;` on
Windows).
"""

from __future__ import annotations

import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from types import MappingProxyType, ModuleType

from residency.core.errors import UserError
from residency.metrics import definitions
from residency.metrics.definitions.base import About, Scores

__all__ = ["VARIABLE", "MatrixMetric", "matrix_metrics", "printed_sign"]

VARIABLE = "RESIDENCY_METRICS"
"""Environment variable with packages whose files are metrics as well."""


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
        TypeError: A file of `definitions` has no function of its name, or no `ABOUT`.
        UserError: The same of another package; or it cannot be imported, or has a metric of a name that there is.
    """
    found = {metric.name: metric for metric in _metrics_of(definitions)}
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        for metric in _metrics_elsewhere(name):
            if metric.name in found:
                raise _refused(name, f"{metric.name} is defined in {found[metric.name].function.__module__} as well")
            found[metric.name] = metric
    ordered = sorted(found.values(), key=lambda metric: (metric.about.rank, metric.name))
    return MappingProxyType({metric.name: metric for metric in ordered})


def _metrics_of(package: ModuleType) -> Iterator[MatrixMetric]:
    for file in pkgutil.iter_modules(package.__path__):
        if file.name == "base":
            continue
        module = import_module(f"{package.__name__}.{file.name}")
        function, about = getattr(module, file.name, None), getattr(module, "ABOUT", None)
        if not callable(function) or not isinstance(about, About):
            raise TypeError(f"{module.__name__} needs a function {file.name}(R, *, higher_is_better) and an ABOUT")
        yield MatrixMetric(name=file.name, about=about, function=function)


def _metrics_elsewhere(name: str) -> list[MatrixMetric]:
    try:
        return list(_metrics_of(import_module(name)))
    except (ImportError, TypeError) as error:
        raise _refused(name, str(error)) from error
    except AttributeError as error:
        raise _refused(name, "it is a module: metrics lie in files of a package") from error


def _refused(name: str, why: str) -> UserError:
    return UserError(
        f"{VARIABLE} names {name!r}",
        why=why,
        fix=f"let {VARIABLE} name packages on the path of Python, each file of them one metric under a name of its own",
    )


def printed_sign(metric: str, *, higher_is_better: bool) -> float:
    """What turns a metric into what tables print: a level of a loss reads as a loss."""
    known = matrix_metrics().get(metric)
    return -1.0 if known is not None and known.about.kind == "level" and not higher_is_better else 1.0

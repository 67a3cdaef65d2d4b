"""Packages that others import at their start and seldom use: run when something of them is asked for, not before.

Lightning imports all of torchmetrics for one base class (with it scipy.signal), PEFT all of bitsandbytes where it is
installed (with it torch's compiler), and transformers scipy.optimize for the losses of object detection: a third of the
processor time of a command that only reads a config. The standard library's `LazyLoader` does not do for them: it runs
a module as soon as its `__spec__` is looked at.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec, module_from_spec
from threading import RLock
from types import ModuleType
from typing import Any

__all__ = ["SELDOM_USED", "put_off"]

SELDOM_USED: Mapping[str, Mapping[str, Callable[[], Any]]] = {
    "torchmetrics": {
        # `utilities` comes first: it and `metric` import each other.
        "Metric": lambda: _last("torchmetrics.utilities", "torchmetrics.metric").Metric,
        "MetricCollection": lambda: _last("torchmetrics.utilities", "torchmetrics.collections").MetricCollection,
        "_logger": lambda: logging.getLogger("torchmetrics"),
    },
    "bitsandbytes": {},
    "scipy.optimize": {"linear_sum_assignment": lambda: _called_later("scipy.optimize", "linear_sum_assignment")},
}
"""Package -> those of its names that are to be had without running it, and how."""

_LOCK = RLock()


class _PutOff(ModuleType):
    """A package whose `__init__` has not been run; the first name that it does not have yet runs it."""

    def __getattr__(self, name: str) -> Any:
        own: dict[str, Any] = self.__dict__
        if name == "__version__":
            try:
                return version(own["__name__"])
            except PackageNotFoundError:
                pass  # the package says it itself
        elif name.startswith("__") and name != "__all__":
            raise AttributeError(f"module {own['__name__']!r} has no attribute {name!r}")
        if name in (alone := SELDOM_USED[own["__name__"]]):
            return alone[name]()
        _run(self)
        return getattr(self, name)


def put_off(*packages: str) -> None:
    """Let packages be imported without being run; what is loaded already, or not installed, stays as it is.

    For a process of our own, not for one that merely uses this library: it changes what an import statement does.

    Args:
        packages: Of `SELDOM_USED`; all by default.
    """
    for name in packages or SELDOM_USED:
        if name in sys.modules or (spec := _spec(name)) is None or spec.loader is None:
            continue
        sys.modules[name] = _module(spec)


def _spec(name: str) -> ModuleSpec | None:
    """Where a package lies; the package around it is not run, as `find_spec` would."""
    outer, _, _ = name.rpartition(".")
    around = find_spec(outer) if outer else None
    if not outer:
        return find_spec(name)
    return None if around is None else PathFinder.find_spec(name, around.submodule_search_locations)


def _called_later(package: str, name: str) -> Callable[..., Any]:
    """A function that runs its package when it is called."""

    def call(*args: Any, **options: Any) -> Any:
        module = import_module(package)
        _run(module)
        return getattr(module, name)(*args, **options)

    return call


def _last(*modules: str) -> ModuleType:
    return [import_module(module) for module in modules][-1]


def _module(spec: ModuleSpec) -> ModuleType:
    module = module_from_spec(spec)
    module.__class__ = _PutOff
    return module


def _run(module: ModuleType) -> None:
    with _LOCK:
        if not issubclass(type(module), _PutOff):
            return  # another thread has
        module.__class__ = ModuleType
        spec = module.__spec__
        assert spec is not None
        assert spec.loader is not None
        try:
            if outer := spec.name.rpartition(".")[0]:
                import_module(outer)
            spec.loader.exec_module(module)
        except BaseException:
            module.__class__ = _PutOff
            raise

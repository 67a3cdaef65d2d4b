"""A package that is put off looks like itself, and is run when something of it is asked for."""

from __future__ import annotations

import importlib
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from residency.core import lazy_packages
from residency.core.lazy_packages import put_off

_HEAVY = (
    "altair",
    "bitsandbytes.functional",
    "scipy",
    "scipy.signal",
    "torch._inductor.compile_fx",
    "torchmetrics.functional",
)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that writes down that it has been run."""
    folder = tmp_path / "seldom_used"
    folder.mkdir()
    code = "import builtins\nfrom seldom_used.early import Base\nfrom seldom_used.late import VALUE\n"
    code += "builtins.runs.append(1)\n"
    (folder / "__init__.py").write_text(code)
    (folder / "early.py").write_text("class Base: ...\n")
    (folder / "late.py").write_text("VALUE = 7\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    early = {"Base": lambda: importlib.import_module("seldom_used.early").Base}
    monkeypatch.setattr(lazy_packages, "SELDOM_USED", {"seldom_used": early})
    monkeypatch.setattr("builtins.runs", [], raising=False)
    for name in ("seldom_used", "seldom_used.early", "seldom_used.late"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    put_off("seldom_used")
    return "seldom_used"


def _runs() -> int:
    import builtins

    return len(builtins.runs)  # type: ignore[attr-defined]


def test_what_needs_no_run_gives_none(package: str) -> None:
    module = importlib.import_module(package)
    assert find_spec(package) is module.__spec__
    base = module.Base
    assert importlib.import_module(f"{package}.early").Base is base
    assert not hasattr(module, "__wrapped__")
    assert (_runs(), f"{package}.late" in sys.modules) == (0, False)


def test_any_other_name_runs_it_once(package: str) -> None:
    module = importlib.import_module(package)
    assert (module.VALUE, module.VALUE, _runs()) == (7, 7, 1)
    assert sys.modules[package] is module
    with pytest.raises(AttributeError, match="nothing"):
        _ = module.nothing
    assert module.Base is importlib.import_module(f"{package}.early").Base


def test_what_is_loaded_stays(package: str) -> None:
    module = importlib.import_module(package)
    assert module.VALUE == 7
    put_off(package)
    assert sys.modules[package] is module
    assert _runs() == 1


@pytest.mark.parametrize(
    "first",
    [
        "import scipy.stats; scipy.stats.ttest_rel([1, 2, 3], [2, 3, 5])",
        "import scipy; scipy.optimize.brentq",
        "import scipy.optimize._optimize as own; own._minimize_bfgs",
        "from scipy.optimize import *; minimize",
    ],
)
def test_a_part_of_a_package_is_put_off_without_the_rest(first: str) -> None:
    code = f"""
import sys
from residency.core.lazy_packages import put_off
put_off("scipy.optimize")
assert "scipy.optimize" in sys.modules and "scipy" not in sys.modules
{first}
from scipy import optimize
assert optimize.minimize(lambda x: (x[0] - 3) ** 2, [0.0]).x[0] - 3 < 1e-4
assert optimize is sys.modules["scipy.optimize"] is __import__("scipy").optimize
"""
    result = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_a_config_is_printed_without_what_it_does_not_need() -> None:
    code = f"""
import sys
from residency.__main__ import main
try:
    main(["fit", "--config", "quickstart", "--print_config"])
except SystemExit:
    pass
loaded = [name for name in {_HEAVY!r} if name in sys.modules]
assert not loaded, loaded
import torchmetrics
from torchmetrics import Metric, MetricCollection
assert issubclass(torchmetrics.MeanMetric, Metric)
assert torchmetrics.__version__[0].isdigit() and torchmetrics.functional.accuracy
assert torchmetrics.Metric is Metric and torchmetrics.MetricCollection is MetricCollection
from transformers.loss.loss_for_object_detection import linear_sum_assignment
assert [list(found) for found in linear_sum_assignment([[1, 2], [0, 4]])] == [[0, 1], [1, 0]]
from scipy.optimize import minimize
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "class_path: residency.adapters.Peft" in result.stdout

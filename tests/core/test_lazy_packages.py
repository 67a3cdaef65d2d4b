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

_HEAVY = ("altair", "bitsandbytes.functional", "scipy.signal", "torch._inductor.compile_fx", "torchmetrics.functional")


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
"""
    result = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "class_path: residency.adapters.Peft" in result.stdout

"""What a mitigation remembers has a bound, or a run says before its first step how it grows."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from residency.core.tensor_files import load_tree
from residency.core.tensors import size_in_bytes
from residency.runs.views.base import RunInfo
from residency.runs.views.console import ConsoleView
from residency.testing.tiny_runs import train
from support.two_stages import ADAPTERS
from table import MITIGATIONS

BEYOND = 64  # numbers that a state holds beside its tensors of parameters, in bytes: counters and shares


GROWING = ("soup", "ties", "ogd")
BOUNDED = ("dare", "task_arithmetic", "ewc", "si", "mas", "fisher_merge", "magmax")


FEW = ("soup", "ogd", "ewc", "magmax", "si")  # the others come with the pairs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in FEW else pytest.mark.pairs) for n in (*GROWING, *BOUNDED)]
)
def test_a_state_grows_as_it_says(name: str, llama: Path, tmp_path: Path) -> None:
    """Between the second and the third of four stages: what depends on the number of parameters."""
    mitigation = MITIGATIONS[name].make()
    kinds = dict.fromkeys("abcd", "generative")
    record, _ = train(tmp_path / "run", llama, ADAPTERS["lora"](), {"x": mitigation}, steps=2, kinds=kinds)
    paths = sorted((tmp_path / "run" / "stages").glob("[23]-*/state.safetensors"))
    sizes = [size_in_bytes(load_tree(path)["mitigations"].get("x", {})) for path in paths]
    told = mitigation.grows_by(record["cost"]["trainable_parameters"])
    grown = sizes[1] - sizes[0]
    assert grown == pytest.approx(told, rel=0.02, abs=BEYOND)
    assert (told > 0) == (name in GROWING)


def test_growth_is_told_before_a_run(tmp_path: Path) -> None:
    out = io.StringIO()
    view = ConsoleView(folder=tmp_path, console=Console(file=out, width=200))
    common = {"cell": "c", "seed": 0, "axes": {}, "probes": [], "layout": "packed", "trainable": 1, "total": 2}
    view.start(RunInfo(**common, resumed=0, domains=list("abc"), growth={"soup": 2_500_000}), [], [])
    assert "soup keeps 2.50 MB more after every stage, 7.50 MB in the end" in out.getvalue()

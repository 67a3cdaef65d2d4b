"""The gate: exit codes for scripts, on records with known scores; it speaks beyond the noise of the rows only."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.report.gate_command import gate_command
from support.synthetic_studies import write_study

BASE = [[5.5, 11.5, 4.0], [1.5, 9.6, 4.3], [3.1, 0.8, 4.6], [3.8, 4.4, 2.0]]
KEPT = [[5.5, 11.5, 4.0], [1.5, 9.6, 4.3], [1.5, 0.8, 4.6], [1.5, 0.8, 2.0]]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_study(
        tmp_path_factory.mktemp("gate") / "s", {"none": BASE, "kept": KEPT}, seeds=(0, 1, 2), spread=0.01
    )


def test_a_run_that_keeps_to_its_limits_passes(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = study / "cells" / "kept-s0"
    assert gate_command([str(run), "--max", "forgetting=0.1", "--min", "accuracy=0.5"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(line.startswith("ok") for line in lines)


def test_a_crossed_limit_is_exit_code_4_with_a_line_and_json(study: Path, tmp_path: Path) -> None:
    out = tmp_path / "gate.json"
    assert gate_command([str(study), "--max", "forgetting=0.1", "--json", str(out)]) == 4
    found = json.loads(out.read_text())
    assert found["passed"] is False
    assert {one["method"]: one["state"] for one in found["limits"]} == {"none": "crossed", "kept": "ok"}
    forgot = found["limits"][0]["value"]
    assert forgot == pytest.approx((3.8 - 1.5 + 4.4 - 0.8) / 2, rel=0.05), "printed as a cost: above 0 is bad"


def test_a_record_that_names_no_cell_is_told(study: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(study / "cells" / "kept-s0", run)
    record = json.loads((run / "results.json").read_text())
    del record["cell"]
    (run / "results.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="names no cell"):
        gate_command([str(run), "--max", "forgetting=0.1"])


def test_against_a_baseline_the_limit_is_on_the_paired_difference(
    study: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    none, kept = (str(study / "cells" / f"{name}-s0") for name in ("none", "kept"))
    assert gate_command([str(study), "--max", "forgetting=0", "--against", "none"]) == 0
    assert "more than none" in capsys.readouterr().out
    assert gate_command([kept, "--max", "forgetting=0", "--against", none]) == 0
    assert gate_command([none, "--max", "average=0.5", "--against", kept]) == 4


def test_what_the_test_rows_cannot_tell_does_not_fail(study: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = str(study / "cells" / "none-s0")
    assert gate_command([run, "--max", "forgetting=2.9"]) == 0
    assert capsys.readouterr().out.startswith("noise"), "2.95 of 32 rows is not beyond 2.9"
    assert gate_command([run, "--max", "forgetting=0.5"]) == 4


@pytest.mark.parametrize("limit", ["forgetting", "forgetting=much", "zorgetting=1", "bleu/average=1"])
def test_a_limit_that_cannot_be_judged_is_refused(study: Path, limit: str) -> None:
    with pytest.raises(UserError, match="--max"):
        gate_command([str(study), "--max", limit])


def test_a_score_that_no_run_has_does_not_pass(tmp_path: Path) -> None:
    matrix: list[list[float]] = [[float("nan"), 1.0], [1.0, 1.0], [1.0, 1.0]]
    study = write_study(tmp_path / "s", {"none": matrix}, domains=("a", "b"), rows=0)
    assert gate_command([str(study), "--max", "fwt=1"]) == 0
    assert gate_command([str(study), "--max", "general=1"]) == 4, "no probe was scored"


def test_a_script_needs_no_torch_and_gets_the_code(study: Path) -> None:
    code = "import sys; from residency.__main__ import main; c = main(sys.argv[1:])\n"
    code += "sys.exit(99 if 'torch' in sys.modules else c)"
    command = [sys.executable, "-c", code, "gate", str(study), "--max", "forgetting=0.1"]
    assert subprocess.run(command, capture_output=True).returncode == 4

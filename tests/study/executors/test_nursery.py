"""A task's process is clean, its end is told as it was, and nothing of it outlives its owner."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import chores
from chores import gone, note
from residency.study.executors.nursery import Nursery

HERE = Path(chores.__file__).parent


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    """One server for all tests: it survives whatever its tasks do."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]))
        patch.setenv("FROM_THE_OWNER", "yes")
        found = Nursery(call="chores.run_task", preload=())
        yield found
        found.close()


def run(nursery: Nursery, folder: Path, *, environment: dict[str, str | None] | None = None, **spec: Any) -> int:
    """Carry a chore out."""
    devices = spec.pop("devices", 0)
    options = {key: spec.pop(key) for key in ("stopping", "grace") if key in spec}
    log = folder / "logs" / "task.log"
    return nursery.run(spec, environment=environment or {}, log=log, devices=devices, **options)


@pytest.mark.parametrize("code", [0, 1, 2, 71, 75])
def test_the_exit_code_is_that_of_the_task(nursery: Nursery, tmp_path: Path, code: int) -> None:
    assert run(nursery, tmp_path, code=code) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_signal_is_a_negative_code(nursery: Nursery, tmp_path: Path, number: int) -> None:
    assert run(nursery, tmp_path, signal=int(number)) == -number


def test_a_bug_is_code_1_and_its_traceback_is_in_the_log(nursery: Nursery, tmp_path: Path) -> None:
    assert run(nursery, tmp_path, **{"raise": True}) == 1
    assert "RuntimeError: a bug" in (tmp_path / "logs" / "task.log").read_text()


def test_nothing_of_one_task_is_left_in_the_next(nursery: Nursery, tmp_path: Path) -> None:
    for name in ("one", "two"):
        assert run(nursery, tmp_path, environment={f"OF_{name}": "1"}, name=name, note=str(tmp_path / name)) == 0
    one, two = note(tmp_path / "one"), note(tmp_path / "two")
    assert (one["seen"], two["seen"]) == (["one"], ["two"])
    assert one["pid"] != two["pid"]
    assert "OF_one" in one["environment"]
    assert "OF_one" not in two["environment"]


def test_the_environment_is_the_owners_with_changes(nursery: Nursery, tmp_path: Path) -> None:
    changes = {"CUDA_VISIBLE_DEVICES": "", "FROM_THE_OWNER": None}
    assert run(nursery, tmp_path, environment=changes, note=str(tmp_path / "note")) == 0
    seen = note(tmp_path / "note")["environment"]
    assert seen["CUDA_VISIBLE_DEVICES"] == ""
    assert "FROM_THE_OWNER" not in seen
    assert run(nursery, tmp_path, note=str(tmp_path / "again")) == 0
    assert note(tmp_path / "again")["environment"]["FROM_THE_OWNER"] == "yes"


def test_what_a_task_prints_goes_into_its_log(
    nursery: Nursery, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(nursery, tmp_path, name="me") == 0
    assert (tmp_path / "logs" / "task.log").read_text() == "printed by me\n"
    assert capfd.readouterr() == ("", "")


def test_what_a_task_leaves_running_ends_with_it(nursery: Nursery, tmp_path: Path) -> None:
    assert run(nursery, tmp_path, child=True, note=str(tmp_path / "note")) == 0
    assert gone(note(tmp_path / "note")["child"])


def test_several_devices_get_a_command_line_of_their_own(nursery: Nursery, tmp_path: Path) -> None:
    assert run(nursery, tmp_path, devices=2, code=7, note=str(tmp_path / "note")) == 7
    argv = note(tmp_path / "note")["argv"]
    assert argv[0] == str(HERE / "chores.py")
    assert json.loads(Path(argv[1]).read_text())["code"] == 7
    Path(argv[1]).unlink()


@pytest.mark.parametrize(("on_stop", "code"), [("finish", 75), ("die", -signal.SIGTERM), ("ignore", -signal.SIGKILL)])
def test_a_task_is_asked_to_stop_and_killed_if_it_does_not(
    nursery: Nursery, tmp_path: Path, on_stop: str, code: int
) -> None:
    path = tmp_path / "note"
    options = {"stopping": path.exists, "grace": 0.3, "on_stop": on_stop, "seconds": 60, "child": True}
    begin = time.monotonic()
    assert run(nursery, tmp_path, note=str(path), **options) == code
    assert time.monotonic() - begin < 20
    assert gone(note(path)["child"])


OWNER = """
import sys
from pathlib import Path
from residency.study.executors.nursery import Nursery
spec = {"note": sys.argv[1], "seconds": 60, "child": True, "on_stop": "ignore"}
Nursery(call="chores.run_task", preload=()).run(spec, environment={}, log=Path(sys.argv[1] + ".log"))
"""


def test_a_task_dies_with_its_owner_however_that_dies(tmp_path: Path) -> None:
    path = tmp_path / "note"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")])}
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(path)], env=environment)
    found = note(path)
    owner.kill()
    owner.wait()
    assert gone(found["pid"])
    assert gone(found["child"])


def test_the_server_is_started_again_if_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    nursery = Nursery(call="chores.run_task", preload=())
    assert run(nursery, tmp_path) == 0
    server = nursery._server
    assert server is not None
    server.kill()
    server.wait()
    assert run(nursery, tmp_path, code=5) == 5
    nursery.close()
    nursery.close()

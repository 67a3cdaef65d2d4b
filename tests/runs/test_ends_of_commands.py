"""Impossible paths, text from data, readers that go away and signals: a command ends cleanly."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from residency.core.yaml_files import read_yaml
from residency.testing.tiny_models import write_domain
from support.cli import Result, call, tiny_config, write_yaml
from support.synthetic_studies import QUICKSTART, write_cell
from support.tiny_sweeps import write_study


@pytest.mark.parametrize("path", ["~nouser/x", "x" * 5000, "a/" * 3000, "/dev/null/x", "/proc/self/mem/x"])
def test_a_path_that_cannot_be_is_told(path: str, llama: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "data", llama)
    file = write_yaml(tmp_path / "c.yaml", config)
    for words in (
        ("report", path),
        ("store", "ls", path),
        ("sweep", path),
        ("test", path),
        ("fit", "--config", path),
        ("fit", "--config", file, "--run_dir", f"{path}/run"),
        ("fit", "--config", file, f"--data.domains.a.test={path}", "--run_dir", tmp_path / "run"),
    ):
        if path.startswith("~") and words[:2] == ("fit", "--config") and words[-1] == f"{path}/run":
            continue  # a name like any other where the shell has left it
        assert call(*words).code == 2, words


def test_no_text_of_data_reaches_the_terminal_raw(llama: Path, tmp_path: Path) -> None:
    # What a reader refuses (C0: rests of binary files) and what it accepts: C1 also begins escape sequences.
    refused, accepted = "\x1b[2J\x1b]0;owned\x07", "\x9b2J\x9d0;owned\x9c\u202e\x85\x7f"
    config = tiny_config(tmp_path / "data", llama)
    config["data"]["domains"] = {"a": write_domain(tmp_path / "data", "a")}
    config["trainer"]["max_steps"] = 1
    rows = Path(config["data"]["domains"]["a"]["init_args"]["test"])
    prompt, *others = [json.loads(text) for text in rows.read_text().splitlines()]
    file = write_yaml(tmp_path / "c.yaml", config)

    def fit_with(attack: str) -> Result:
        lines = [{**prompt, "prompt": attack + prompt["prompt"]}, *others]
        rows.write_text("".join(json.dumps(line) + "\n" for line in lines))
        return call("fit", "--config", file, "--run_dir", tmp_path / "run")

    told = [fit_with(refused)]
    assert told[0].code == 2
    assert "control character U+001B" in told[0].err
    told += [fit_with(accepted), call("predict", tmp_path / "run", "--limit=100")]
    assert [result.code for result in told[1:]] == [0, 0], told[1].err
    assert "\\x9b2J" in told[-1].out, "it is shown, not left out"
    for attack in (refused, accepted):
        told += [call("fit", "--config", file, f"--run_dir={tmp_path}/{attack}", "--name=a/b")]
        told += [call("report", f"{tmp_path}/{attack}"), call(attack), call("sweep", f"{tmp_path}/{attack}.yaml")]
    for result in told:
        assert not {*"\x07\x7f\x85\x9b\x9c\x9d\u202e"} & {*result.out, *result.err}
        assert not re.search(r"\x1b\]0|\x1b\[2J", result.out + result.err)


def test_no_name_of_a_record_reaches_the_terminal_raw(llama: Path, tmp_path: Path) -> None:
    """Records and studies of others: names of cells, axes, mitigations, domains, scorers and of the study."""
    attack = "a\x1b[2J\x1b]0;owned\x07\x9b31m\u2028\u202e"
    runs = [tmp_path / f"run{n}" for n in (0, 1)]
    for run in runs:
        write_cell(run, attack, QUICKSTART["none"], {"mitigation": attack}, 0, (attack, "b", "c"), rows=4)
    study = write_study(tmp_path, llama, axes={"m": {attack: {}}}, domains="ab", seeds=[0])
    named = write_yaml(tmp_path / "named.yaml", {**read_yaml(study, what="the study"), "name": attack})
    for words in (
        ("ls", tmp_path),
        ("show", runs[0]),
        ("compare", *runs),
        ("ab", *runs),
        ("gate", runs[0], "--max", "forgetting=0"),
        ("gate", runs[0], "--against", runs[1], "--max", "forgetting=1"),
        ("report", *runs, "--output", tmp_path / "report"),
        ("sweep", named, "--study_dir", tmp_path / "study", "--dry-run"),
        ("rm", runs[0]),
    ):
        result = call(*words)
        assert result.code in (0, 4), (words, result.err)
        assert not {*"\x07\x9b\u2028\u202e"} & {*result.out, *result.err}, words
        assert not re.search(r"\x1b\]0|\x1b\[2J", result.out + result.err), words


def test_a_reader_that_goes_away_ends_a_command(tmp_path: Path) -> None:
    command = f"{sys.executable} -m residency --help | true; echo ${{PIPESTATUS[0]}}"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert ended.stdout.strip() in ("0", "75")
    assert "Traceback" not in ended.stderr
    assert "BrokenPipe" not in ended.stderr


def test_a_closed_terminal_ends_a_command_and_nohup_does_not(tmp_path: Path) -> None:
    program = (
        "import time, sys; from residency.core.signals import Stopped, stop_on_signals\n"
        "try:\n"
        "    with stop_on_signals():\n        print('ready', flush=True); time.sleep(30)\n"
        "except Stopped as stopped:\n    print(stopped); sys.exit(75)"
    )
    heard = f"import signal; signal.signal(signal.SIGHUP, signal.SIG_DFL)\n{program}"  # whoever started the tests
    process = subprocess.Popen([sys.executable, "-c", heard], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "SIGHUP\n"
    assert process.returncode == 75
    ignoring = f"import signal, runpy, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n{program}"
    process = subprocess.Popen([sys.executable, "-c", ignoring], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    os.kill(process.pid, signal.SIGTERM)
    process.communicate(timeout=20)
    assert process.returncode == 75

"""Small files and numbers that mean something without end: told by the command that meets them, at once."""

from __future__ import annotations

import gzip
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest

from support.cli import Result, call, tiny_config, write_yaml
from support.forked_commands import start
from support.tiny_sweeps import matrices, write_study

SECONDS = 20.0  # of processor time
LAUGHS = "x0: &x0 [1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"x{n}: &x{n} [{', '.join([f'*x{n - 1}'] * 9)}]\n" for n in range(1, 9)
)
TEXTS = {
    "aliases": LAUGHS,
    "an alias inside of its own anchor": "model: &m {adapter: *m}\n",
    "lists": "model: " + "[" * 3000 + "]" * 3000,
    "mappings": "model: " + "{a: " * 3000 + "1" + "}" * 3000,
}
PLACES = ["config", "preset", "study", "base", "domain"]


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bombs")
    content = tiny_config(folder / "data", llama)
    content["trainer"]["max_steps"] = 1
    return write_yaml(folder / "config.yaml", content)


def refused(*words: object) -> Result:
    """The result of a command that must refuse in time, with what to do."""
    memory, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    result = call(*words)
    assert time.process_time() - begin < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500_000, "KiB"
    assert result.code == 2, (words, result.out, result.err)
    assert "  fix: " in result.err
    return result


def words_with(bomb: Path, place: str, config: Path, folder: Path) -> list[object]:
    """A command that reads a file as one part of what it needs."""
    fit: list[object] = ["fit", "--config", config, "--run_dir", folder / "run"]
    axes = {"m": {"none": {}}}
    return {
        "config": ["fit", "--config", bomb],
        "preset": [*fit, "--model.adapter", bomb],
        "domain": [*fit, f"--data.domains.a={bomb}"],
        "study": ["sweep", bomb, "--study_dir", folder / "study"],
        "base": [
            "sweep",
            write_yaml(folder / "study.yaml", {"name": "s", "base": str(bomb), "axes": axes, "seeds": [0]}),
        ],
    }[place]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", TEXTS)
def test_yaml_that_has_no_end(name: str, place: str, config: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    bomb.write_text(TEXTS[name])
    assert len(TEXTS[name]) < 20_000
    assert "bomb.yaml" in refused(*words_with(bomb, place, config, tmp_path)).err
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "study.yaml") == ["bomb.yaml"]


@pytest.mark.parametrize(
    "text",
    ["itself.yaml\n", "class_path: residency.adapters.Peft\ninit_args: {config: itself.yaml}\n", "a: itself.yaml\n"],
    ids=["alone", "as an argument", "as a key"],
)
@pytest.mark.parametrize("place", PLACES)
def test_a_preset_that_names_itself(text: str, place: str, config: Path, tmp_path: Path) -> None:
    (tmp_path / "itself.yaml").write_text(text)
    refused(*words_with(tmp_path / "itself.yaml", place, config, tmp_path))


def test_two_presets_that_name_each_other(config: Path, tmp_path: Path) -> None:
    for one, other in (("a.yaml", "b.yaml"), ("b.yaml", "a.yaml")):
        text = f"class_path: residency.adapters.Peft\ninit_args: {{config: {other}}}\n"
        (tmp_path / one).write_text(text)
    refused("fit", "--config", config, "--run_dir", tmp_path / "run", "--model.adapter", tmp_path / "a.yaml")


@pytest.mark.slow
def test_a_table_of_sixty_million_rows_in_195_kilobytes(config: Path, tmp_path: Path) -> None:
    run, bomb = tmp_path / "run", tmp_path / "bomb.parquet"
    assert call("fit", "--config", config, "--run_dir", run).code == 0
    ones = pl.DataFrame({"prompt": pl.repeat(1, 1_000_000, dtype=pl.Int8, eager=True)})
    # Row group by row group: writing must not take the memory that reading would.
    with bomb.open("wb") as file:
        pl.concat([ones] * 60).write_parquet(file, row_group_size=5_000_000)
    assert bomb.stat().st_size < 200_000
    refused("fit", "--config", config, "--run_dir", tmp_path / "other", f"--data.domains.a.train={bomb}")
    for stage in ("1-a", "2-b"):
        shutil.copyfile(bomb, run / "stages" / stage / "scores.parquet")
    # A report goes on without the rows, and says so.
    begin = time.process_time()
    result = call("report", run, "--output", tmp_path / "report")
    assert time.process_time() - begin < SECONDS
    assert result.code == 0, result.err
    assert "scores.parquet" in (tmp_path / "report" / "index.html").read_text()


def test_seventy_megabytes_in_seventy_kilobytes(config: Path, tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.jsonl.gz"
    bomb.write_bytes(gzip.compress(bytes(70 * 2**20)))
    assert bomb.stat().st_size < 80_000
    result = refused("fit", "--config", config, "--run_dir", tmp_path / "run", f"--data.domains.a.train={bomb}")
    assert "unpack" in result.err


@pytest.mark.parametrize(
    "word",
    [
        "--data.batch_size=1000000000",
        "--data.batch_size=-1",
        "--trainer.accumulate_grad_batches=1000000000",
    ],
)
def test_numbers_without_an_end(word: str, config: Path, tmp_path: Path) -> None:
    told = refused("fit", "--config", config, "--run_dir", tmp_path / "run", word).err
    assert word.partition("=")[0].rpartition(".")[2] in told


@pytest.mark.parametrize("path", ["a\0b", "a/\0", "~nouser/x", "x" * 5000, "/".join(["x" * 200] * 30)])
def test_a_path_that_no_system_takes(path: str, config: Path, tmp_path: Path) -> None:
    fit: list[object] = ["fit", "--config", config]
    for words in (
        [*fit, "--run_dir", f"{tmp_path}/{path}"],
        [*fit, "--run_dir", tmp_path / "run", f"--store={tmp_path}/{path}"],
        [*fit, "--run_dir", tmp_path / "run", f"--data.domains.a.train={path}"],
        [*fit, "--run_dir", tmp_path / "run", f"--model.backbone.path={path}"],
        ["sweep", config, "--study_dir", path],
        ["report", path, "--output", tmp_path / "report"],
        ["gate", path, "--max", "forgetting=1"],
        ["store", "gc", path],
        ["export", path],
    ):
        if path.startswith("~") and str(words[-1]).startswith((str(tmp_path), f"--store={tmp_path}")):
            continue  # a name like any other
        refused(*words)
    assert not list(tmp_path.rglob("stages"))


@pytest.mark.parametrize("words", ["--help", "presets", "fit --help"])
def test_a_reader_that_has_read_enough(words: str, tmp_path: Path) -> None:
    command = f"{sys.executable} -m residency {words} | head -n 1; echo ${{PIPESTATUS[0]}}"
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, env=environment)
    line, code = ended.stdout.splitlines()
    assert line
    assert code in ("0", "75")
    assert ended.stderr == ""


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["fit", "sweep"])
def test_a_terminal_that_is_closed(verb: str, llama: Path, tmp_path: Path) -> None:
    """SIGHUP: stopped like by Ctrl-C, and the same command goes on to the same scores."""
    study = write_study(tmp_path, llama, domains="ab", steps=6, axes={"mitigation": {"none": {}}}, seeds=[0])
    log = tmp_path / "log.txt"
    fit: list[object] = ["fit", "--config", tmp_path / "base.yaml", "--checkpoint_every_n_steps=1", "--run_dir"]
    sweep: list[object] = ["sweep", study, "--workers", 1, "--threads", 1, "--study_dir"]
    words = {"fit": fit, "sweep": sweep}[verb]
    begun = {"fit": "run/stages/1-a/checkpoint.safetensors", "sweep": "run/store/trained/*"}[verb]
    process = start([*words, tmp_path / "run"], cwd=tmp_path, log=log)
    while process.is_alive() and not list(tmp_path.glob(begun)):
        time.sleep(0.005)
    assert process.is_alive(), log.read_text()
    assert process.pid
    os.kill(process.pid, signal.SIGHUP)
    process.join(600)
    assert process.exitcode == 75, log.read_text()
    assert "SIGHUP" in log.read_text()
    assert "the same command goes on" in log.read_text()
    for folder in ("run", "whole"):
        process = start([*words, tmp_path / folder], cwd=tmp_path, log=log)
        process.join(600)
        assert process.exitcode == 0, log.read_text()
    if verb == "sweep":
        assert matrices(tmp_path / "run") == matrices(tmp_path / "whole")
    else:
        scores = [pl.read_parquet(tmp_path / name / "stages/2-b/scores.parquet") for name in ("run", "whole")]
        assert scores[0].equals(scores[1])

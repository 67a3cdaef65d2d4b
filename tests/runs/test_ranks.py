"""Two and four processes within a stage: the learning of one, one writer, and no process that outlives the others."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from residency.core.errors import EXIT_SIGNAL, EXIT_USER
from residency.engine.sharding import LEFT_OUT
from support import rank_functions
from support.cli import call, read_json
from support.rank_commands import command, members, start, stream_config, wait_for
from support.rank_learning import SINGLE, assert_equal_learning
from support.rank_runs import Group, apart, group
from table import ADAPTERS, MITIGATIONS

DRAWS = ("lora_dropout", "o_lora", "pvera")  # in every micro-batch, as large as it: it must be the same
QUICK = ["ewc", "gem"]  # what is remembered as a sum over the ranks, and rows and gradients that each has its part of


@pytest.fixture(scope="module")
def four() -> Iterator[Group]:
    """Four ranks."""
    with group(4) as found:
        yield found


@pytest.mark.parametrize("mitigation", QUICK)
def test_two_ranks_learn_what_one_does(mitigation: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", *filter(None, [mitigation]))


def test_each_of_two_ranks_keeps_half_of_the_base(two: Group, llama: Path, tmp_path: Path) -> None:
    """And learns and writes what one does with all of it; more of these in `test_sharded`."""
    record = assert_equal_learning(two, llama, tmp_path, "lora", "replay", shards=True)
    assert record["provenance"]["layout"].endswith(LEFT_OUT)
    for found, error in two.call(rank_functions.kept_bytes, backbone=llama):
        assert not error
        assert found["kept"] - found["leaves"] <= 0.55 * found["frozen"], "the rest is of tables of positions"


def test_full_fine_tuning_in_parts(two: Group, llama: Path, tmp_path: Path) -> None:
    """More of these in `test_full_in_parts`."""
    assert_equal_learning(two, llama, tmp_path, "full", "replay", shards=True)


@pytest.mark.slow
@pytest.mark.parametrize("mitigation", ["", *(name for name in MITIGATIONS if name not in QUICK)])
def test_with_every_mitigation(mitigation: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", *filter(None, [mitigation]))


@pytest.mark.slow
@pytest.mark.parametrize("adapter", [name for name, row in ADAPTERS.items() if not row.make().steps_in_backward])
def test_with_every_adapter(adapter: str, two: Group, llama: Path, tmp_path: Path) -> None:
    data = {"micro_batch_size": 2} if adapter in DRAWS else {}
    assert_equal_learning(two, llama, tmp_path, adapter, data=data)


@pytest.mark.slow
@pytest.mark.parametrize("mitigation", ["", "replay", *QUICK, "der", "self_distillation", "ogd"])
def test_four_ranks(mitigation: str, four: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(four, llama, tmp_path, "lora", *filter(None, [mitigation]))


@pytest.mark.slow
def test_dropout_is_that_of_the_place_in_the_stage(two: Group, llama_dropout: Path, tmp_path: Path) -> None:
    micro = {"data": {"micro_batch_size": 2}}
    assert_equal_learning(two, llama_dropout, tmp_path, "lora", "replay", **micro)


def test_an_adapter_that_steps_in_the_backward_pass_is_refused(two: Group, llama: Path, tmp_path: Path) -> None:
    row = {"backbone": llama, "adapter": "galore_layerwise", "folder": tmp_path / "run"}
    found = two.run(row)
    assert [("nothing is averaged" in error, "layerwise to false" in error) for _, error in found[:1]] == [(True, True)]
    assert not (tmp_path / "run" / "stages").exists()
    assert found[1] == ({}, ""), "one rank tells it"


def test_a_batch_that_the_ranks_cannot_share_is_refused(two: Group, llama: Path, tmp_path: Path) -> None:
    row = {"backbone": llama, "adapter": "lora", "folder": tmp_path / "run", "data": {"batch_size": 3}}
    (_, error), other = two.run(row)
    assert "multiple of devices x micro-batch" in error
    assert other == ({}, "")


# -- the command itself -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stream with EWC."""
    return stream_config(tmp_path_factory.mktemp("config"), llama)


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["first", "second"])
def test_a_killed_rank_ends_all_and_another_number_goes_on(victim: str, config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    # So many steps that there is time to kill in the middle of the second stage.
    long = ["--trainer.max_steps=60"]
    process = start(command(config, run, 2, *long))
    wait_for(run / "stages" / "2-b" / "checkpoint.safetensors", process)
    first, *others = members(process)
    assert first == process.pid
    os.kill(first if victim == "first" else others[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode in ((-signal.SIGKILL,) if victim == "first" else (EXIT_SIGNAL, -signal.SIGKILL))
    end = time.monotonic() + 60
    while members(process):
        assert time.monotonic() < end, "a rank has outlived the others"
        time.sleep(0.2)
    assert not (run / "results.json").exists()
    assert call("fit", "--config", config, "--run_dir", run, *long).code == 0, "the same command on one rank"
    whole = tmp_path / "whole"
    assert call("fit", "--config", config, "--run_dir", whole, *long).code == 0
    assert max(apart(whole, run).values()) <= SINGLE
    assert read_json(run / "results.json")["summary"].keys() == read_json(whole / "results.json")["summary"].keys()


@pytest.mark.slow
@pytest.mark.parametrize(("first", "then"), [(1, 2), (1, 4), (4, 1)])
def test_another_number_of_ranks_goes_on(first: int, then: int, config: Path, tmp_path: Path) -> None:
    """Killed as a whole in the middle of the second stage."""
    run, long = tmp_path / "run", ["--trainer.max_steps=60"]
    process = start(command(config, run, first, *long))
    wait_for(run / "stages" / "2-b" / "checkpoint.safetensors", process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert not (run / "results.json").exists()
    resumed = start(command(config, run, then, *long))
    _, told = resumed.communicate(timeout=600)
    assert resumed.returncode == 0, told
    whole = tmp_path / "whole"
    assert call("fit", "--config", config, "--run_dir", whole, *long).code == 0
    assert max(apart(whole, run).values()) <= SINGLE


@pytest.mark.slow
def test_the_command_starts_its_ranks(config: Path, tmp_path: Path) -> None:
    store = ["--store", str(tmp_path / "store")]
    process = start(command(config, tmp_path / "two", 2, *store))
    alone = call("fit", "--config", config, "--run_dir", tmp_path / "one", "--store", tmp_path / "other")
    assert alone.code == 0, alone.err
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err
    assert not members(process)
    assert out.count("complete") <= 1
    assert "warn" not in err.lower()
    assert "GLOBAL_RANK" not in err
    distances = apart(tmp_path / "one", tmp_path / "two")
    assert max(distances.values()) <= SINGLE, distances
    # One stage has one key, however many ranks train it: the run on one rank finds every one in the store.
    shared = call("fit", "--config", config, "--run_dir", tmp_path / "again", *store)
    assert shared.code == 0
    again = read_json(tmp_path / "again" / "stages" / "1-a" / "stage.json")
    assert again["ranks"] == 2, "what another run has trained"


def test_a_program_that_calls_residency_starts_no_ranks(config: Path, tmp_path: Path) -> None:
    result = call("fit", "--config", config, "--run_dir", tmp_path / "run", "--trainer.devices=2")
    assert result.code == EXIT_USER
    assert "torchrun" in result.err
    assert "trainer.devices and num_nodes to 1" in result.err
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    ("strategy", "instead"),
    [("ddp_spawn", "end with the first stage"), ("fsdp", "parts of them"), ("ddp_fork", "stage")],
)
def test_strategies_that_cannot_work_are_refused(strategy: str, instead: str, config: Path, tmp_path: Path) -> None:
    words = ["--trainer.devices=2", f"--trainer.strategy={strategy}"]
    result = call("fit", "--config", config, "--run_dir", tmp_path / "run", *words)
    assert result.code == EXIT_USER, result.err
    assert instead in result.err or "accelerator" in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_torchrun(config: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    words = command(config, run, 2)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *words[1:]]
    process = start(torchrun)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert call("fit", "--config", config, "--run_dir", tmp_path / "one").code == 0
    assert max(apart(tmp_path / "one", run).values()) <= SINGLE

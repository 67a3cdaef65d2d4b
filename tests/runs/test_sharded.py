"""Two processes with a part of the frozen base each learn what one process learns with all of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.parts_and_whole import HOW, assert_goes_on
from support.rank_commands import stream_config
from support.rank_learning import assert_equal_learning
from support.rank_runs import Group
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

pytestmark = pytest.mark.slow

TAKING_PART = [name for name, row in MITIGATIONS.items() if row.make().shardable]

LEARNT_BY = [name for name, row in OBJECTIVES.items() if row.make().reads == "completion"]
LORA = [name for name, row in ADAPTERS.items() if row.make().shardable and "quantisation" not in row.loading]


@pytest.fixture(scope="module")
def config(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny stream with EWC."""
    return stream_config(tmp_path_factory.mktemp("config"), llama)


def test_who_takes_part() -> None:
    """As `docs/devices.md` says."""
    assert all(OBJECTIVES[name].make().shardable for name in LEARNT_BY)
    assert {*MITIGATIONS} - {*TAKING_PART} == {"source_shielding", "intruder_reduction"}


@pytest.mark.parametrize("mitigation", ["", *TAKING_PART])
def test_with_every_mitigation(mitigation: str, two: Group, llama: Path, tmp_path: Path) -> None:
    assert_equal_learning(two, llama, tmp_path, "lora", *filter(None, [mitigation]), shards=True)


@pytest.mark.parametrize("adapter", LORA)
def test_with_every_kind_of_lora(adapter: str, two: Group, llama: Path, tmp_path: Path) -> None:
    """Dropout is drawn per micro-batch, which must be equally large."""
    assert_equal_learning(two, llama, tmp_path, adapter, shards=True, data={"micro_batch_size": 2})


@pytest.mark.parametrize("objective", LEARNT_BY)
def test_with_every_objective_that_learns_what_to_write(
    objective: str, two: Group, llama: Path, tmp_path: Path
) -> None:
    row = {"objective": OBJECTIVES[objective].make(), "kinds": {"a": "generative", "b": "label"}}
    assert_equal_learning(two, llama, tmp_path, "lora", shards=True, **row)


def test_with_activations_that_are_computed_again(two: Group, llama: Path, tmp_path: Path) -> None:
    loading = {"dtype": "float64", "gradient_checkpointing": True}
    assert_equal_learning(two, llama, tmp_path, "lora", "replay", shards=True, loading=loading)


@pytest.mark.parametrize(("first", "then"), HOW)
def test_a_killed_run_goes_on_in_parts_and_whole(first: str, then: str, config: Path, tmp_path: Path) -> None:
    assert_goes_on(first, then, config, tmp_path)

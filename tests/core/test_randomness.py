"""Every draw is a function of seed, purpose and place: nothing else can change the data of a run."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from residency.core.randomness import choice, generator, permutation, seed_devices, seed_of
from residency.core.types import Example, Stage
from residency.domains.sampler import StageBatches, StageExamples, learned_examples
from residency.mitigations import EWC, Mitigation, Replay, WeightMixing
from residency.mitigations.rehearsal.memory import pack_examples


def make_stage(*, index: int = 1, domain: str = "b", seed: int = 0, steps: int = 6, batch_size: int = 8) -> Stage:
    return Stage(index=index, domain=domain, stages=3, seed=seed, steps=steps, batch_size=batch_size)


def make_example(row: int, domain: str = "b") -> Example:
    return Example.of(domain=domain, row=str(row), prompt=(row + 1,), completion=(row + 2, 0))


def examples_of(stage: Stage, rows: int = 7) -> StageExamples:
    return StageExamples(rows=rows, encode=lambda row: make_example(row, stage.domain), stage=stage)


def order(examples: Sequence[Example]) -> list[int]:
    return [int(examples[position].row) for position in range(len(examples))]


# --- draws ------------------------------------------------------------------------------------------------------------

# Computed once, in another process: a change here is a change of every recorded run.
SEEDS: list[tuple[tuple[Any, ...], int]] = [
    ((0,), 4761921975702974394),
    ((0, "order", "a", 3), 8154008467863870170),
    ((17, "replay", 2, 5), 4986554124308167630),
    ((2**40, "é", "\n"), 669590886181297321),
]


@pytest.mark.parametrize(("words", "value"), SEEDS)
def test_seeds_are_the_same_in_every_process(words: tuple[Any, ...], value: int) -> None:
    assert seed_of(*words) == value


def test_draws_are_the_same_in_every_process() -> None:
    assert permutation(8, 0, "order", "medical", 0) == (7, 1, 3, 5, 2, 0, 6, 4)
    assert [choice(10, 0, "replay", i) for i in range(8)] == [9, 9, 8, 9, 8, 7, 4, 8]
    assert torch.randint(1000, (4,), generator=generator(0, "init")).tolist() == [896, 503, 721, 313]


def test_words_are_kept_apart() -> None:
    """Neither joining words nor writing a number as text gives the same seed."""
    words: list[tuple[Any, ...]] = [(), ("a",), ("b",), ("a", "b"), ("ab",), ("b", "a"), (1,), ("1",), (1, 1), (11,)]
    seeds = [seed_of(seed, *w) for seed in (0, 1) for w in words]
    assert len({*seeds}) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in seeds)


DRAWS: dict[str, Callable[[], Any]] = {
    "seed_of": lambda: seed_of(3, "x"),
    "choice": lambda: choice(1000, 3, "x"),
    "permutation": lambda: permutation.__wrapped__(100, 3, "x"),
    "generator": lambda: torch.rand(5, generator=generator(3, "x")).tolist(),
    "stage order": lambda: order(examples_of(make_stage())),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_do_not_touch_the_global_generator_nor_depend_on_it(name: str) -> None:
    found = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        torch.rand(seed)
        before = torch.get_rng_state()
        found.append(DRAWS[name]())
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1]


@pytest.mark.parametrize("n", [0, 1, 2, 17, 1000])
def test_permutations_hold_every_number_once(n: int) -> None:
    first, second = (permutation(n, seed, "p") for seed in (0, 1))
    assert sorted(first) == sorted(second) == list(range(n))
    assert n < 3 or first != second


def test_permutations_and_choices_are_uniform() -> None:
    """Chi-square of 6000 draws from 6; the bound of 31 is passed by chance once in 100,000."""
    draws = 6000
    orders = Counter(permutation.__wrapped__(3, 0, "u", i) for i in range(draws))
    picks = Counter(choice(6, 0, "u", i) for i in range(draws))
    assert {*orders} == {*itertools.permutations(range(3))}
    for counts in (orders, picks):
        assert sum((n - draws / 6) ** 2 / (draws / 6) for n in counts.values()) < 31


# --- which example a step sees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 7, 8, 48, 100])
def test_stage_examples_are_shuffled_epochs(rows: int) -> None:
    """Every epoch is a permutation, and the stage is as long as steps x batch size whatever the number of rows."""
    stage = make_stage()
    seen = order(examples_of(stage, rows))
    assert len(seen) == len(examples_of(stage, rows)) == 48
    epochs = [seen[start : start + rows] for start in range(0, 48, rows)]
    for epoch in epochs:
        assert len({*epoch}) == len(epoch) == min(rows, len(epoch))
    whole = {tuple(epoch) for epoch in epochs if len(epoch) == rows}
    assert rows != 7 or len(whole) == len(seen) // rows, "two epochs of seven rows came in the same order"


def test_a_position_is_a_function_of_seed_domain_and_position() -> None:
    seen = order(examples_of(make_stage()))
    fresh = examples_of(make_stage())
    assert [int(fresh[position].row) for position in reversed(range(48))] == seen[::-1]
    # A longer stage, another batch size, another place in the stream: the same rows in the same order, so that an
    # effect of the order of domains is no effect of their data.
    assert order(examples_of(make_stage(steps=12)))[:48] == seen
    assert order(examples_of(make_stage(steps=12, batch_size=4))) == seen
    assert order(examples_of(make_stage(index=0))) == seen
    assert order(examples_of(make_stage(seed=1))) != seen
    assert order(examples_of(make_stage(domain="c"))) != seen


@pytest.mark.parametrize("position", [-1, 48, 1000])
def test_positions_outside_of_the_stage(position: int) -> None:
    with pytest.raises(IndexError):
        examples_of(make_stage())[position]


def test_learned_examples_are_the_distinct_ones_of_the_domain() -> None:
    stage = make_stage()
    mixed = [*examples_of(stage), make_example(99, "a")]
    learned = learned_examples(mixed, "b")
    assert [int(e.row) for e in learned] == order(examples_of(stage))[:7]
    assert [e.row for e in learned_examples(mixed, "a")] == ["99"]


# --- which positions a rank sees --------------------------------------------------------------------------------------

SHAPES = [(8, 1), (4, 1), (1, 1), (4, 2), (2, 2), (2, 4), (1, 8)]


@pytest.mark.parametrize(("micro", "ranks"), SHAPES)
def test_ranks_share_every_global_batch(micro: int, ranks: int) -> None:
    """The union over ranks and micro-batches of a step is the same set of positions however it is cut."""
    stage = make_stage()
    samplers = [StageBatches(stage=stage, micro_batch=micro, rank=rank, ranks=ranks) for rank in range(ranks)]
    per_step = 8 // (micro * ranks)
    cut = [list(sampler) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {len(batches) for batches in cut} == {6 * per_step}
    assert all(len(batch) == micro for batches in cut for batch in batches)
    for step in range(6):
        mine = [p for batches in cut for batch in batches[step * per_step : (step + 1) * per_step] for p in batch]
        assert sorted(mine) == list(range(step * 8, step * 8 + 8))


@pytest.mark.parametrize(("micro", "ranks"), SHAPES)
@pytest.mark.parametrize("start", [0, 1, 5])
def test_a_resume_sees_the_tail(micro: int, ranks: int, start: int) -> None:
    for rank in range(ranks):
        options = {"stage": make_stage(), "micro_batch": micro, "rank": rank, "ranks": ranks}
        whole, tail = StageBatches(**options), StageBatches(**options, start=start)
        assert list(tail) == list(whole)[start:]
        assert len(tail) == len(whole), "Lightning counts what is done against the whole stage"
        assert list(whole) == list(whole), "a sampler is read again by every iterator"


# --- global generators ------------------------------------------------------------------------------------------------


def test_devices_are_seeded_as_torch_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(3, "step", 1))
        drawn = torch.rand(5)
        seed_devices(3, "step", 1)
        assert torch.equal(torch.rand(5), drawn)
        seeds: list[int] = []
        monkeypatch.setattr(torch, "manual_seed", seeds.append)
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        seed_devices(3, "step", 1)
    assert seeds == [seed_of(3, "step", 1)], "an accelerator has generators of its own"


# --- mitigations do not change the data -------------------------------------------------------------------------------


def with_memory(ratio: float) -> Replay:
    replay = Replay(ratio=ratio)
    replay.state["buffer"] = pack_examples([make_example(row, "a") for row in range(5)])
    return replay


@pytest.mark.parametrize(
    "mitigation", [with_memory(0.0), Replay(ratio=0.5), EWC(), WeightMixing(), Mitigation()], ids=lambda m: m.name
)
def test_data_order_does_not_depend_on_mitigations(mitigation: Mitigation) -> None:
    """Strength 0, an empty memory, or a mitigation of something else: the very same object, not an equal one."""
    dataset = examples_of(make_stage())
    assert mitigation.transform_dataset(dataset, make_stage()) is dataset


def test_replay_leaves_the_other_positions_as_they_were() -> None:
    stage = make_stage()
    dataset = examples_of(stage)
    mixed = with_memory(0.25).transform_dataset(dataset, stage)
    kept = [p for p in range(48) if mixed[p].domain == "b"]
    assert len(kept) == 36
    assert all(mixed[p] == dataset[p] for p in kept)

"""Replay: a fair reservoir, an exact share of old examples, and the gradient of joint training."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, save_tree
from residency.core.types import Branch, Example, Stage
from residency.domains.sampler import StageExamples
from residency.domains.stream_data import StreamData
from residency.mitigations import Replay
from residency.mitigations.rehearsal.memory import (
    Mixture,
    Source,
    into_reservoir,
    pack_examples,
    replayed_position,
    replayed_slot,
    unpack_examples,
)
from residency.mitigations.rehearsal.model_views import mean_hidden
from residency.scorers.find import scorers_by_name
from residency.testing.tiny_runs import domains, make_module, train

RATIOS = [0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.99]


def make_stage(*, index: int = 1, domain: str = "new", seed: int = 0, steps: int = 10, batch_size: int = 8) -> Stage:
    return Stage(index=index, domain=domain, stages=3, seed=seed, steps=steps, batch_size=batch_size)


def make_examples(domain: str, rows: int) -> list[Example]:
    return [Example.of(domain=domain, row=str(i), prompt=(i, 1), completion=(i + 1, 0)) for i in range(rows)]


# --- the reservoir ----------------------------------------------------------------------------------------------------


def run_reservoir(items: int, capacity: int, *, seed: int) -> list[int]:
    """The items that are left after all of them have been offered, one by one."""
    kept: list[int] = []
    for n in range(items):
        kept = into_reservoir(kept, [n], seen=n, capacity=capacity, seed=seed)
        assert len(kept) == min(n + 1, capacity)
    return kept


def test_every_item_is_equally_likely_to_be_kept() -> None:
    """Chi-square over 10⁴ reservoirs of 5 out of 20; chance passes 64 once in a million."""
    runs, items, capacity = 10_000, 20, 5
    counts = torch.zeros(items)
    for seed in range(runs):
        counts[run_reservoir(items, capacity, seed=seed)] += 1
    share = capacity / items
    # Counts of draws without replacement vary less than multinomial ones, by (1 - share) n / (n - 1).
    spread = runs * share * (1 - share) * items / (items - 1)
    assert int(counts.sum()) == runs * capacity
    assert float(((counts - runs * share) ** 2).sum() / spread) < 64


@pytest.mark.parametrize(("items", "capacity"), [(0, 3), (1, 1), (3, 3), (7, 100)])
def test_a_reservoir_with_room_keeps_all_in_order(items: int, capacity: int) -> None:
    assert run_reservoir(items, capacity, seed=0) == list(range(items))


def test_reservoirs_of_two_seeds_differ() -> None:
    assert run_reservoir(100, 10, seed=0) == run_reservoir(100, 10, seed=0) != run_reservoir(100, 10, seed=1)


# --- the mixture ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", RATIOS)
def test_the_share_is_exact_in_every_window(ratio: float) -> None:
    """Of any consecutive positions, as many are old as the ratio says, to within one."""
    old = [0]
    for position in range(400):
        old.append(old[-1] + replayed_slot(position, ratio))
    for start in range(0, 400, 7):
        for end in range(start, 401):
            assert abs(old[end] - old[start] - ratio * (end - start)) < 1 + 1e-6


@pytest.mark.parametrize(("ratio", "per_batch"), [(0.25, 2), (0.5, 4), (0.125, 1), (0.0, 0)])
def test_every_batch_has_its_share(ratio: float, per_batch: int) -> None:
    for step in range(100):
        assert sum(replayed_slot(step * 8 + slot, ratio) for slot in range(8)) == per_batch


@pytest.mark.parametrize(("ratio", "every"), [(1.0, 10), (0.5, 3), (0.1, 2), (1 / 16, 2)])
def test_every_kth_batch_holds_the_old_ones(ratio: float, every: int) -> None:
    """The batches in between are new; over the others the share is exact."""
    size, batches = 8, 60
    old = [
        sum(replayed_position(step * size + i, ratio=ratio, every=every, batch_size=size) for i in range(size))
        for step in range(batches)
    ]
    due = [n for step, n in enumerate(old, start=1) if step % every == 0]
    assert not any(n for step, n in enumerate(old, start=1) if step % every)
    assert sum(due) == int(ratio * size * len(due) + 1e-9)
    assert max(due) - min(due) <= 1


def test_every_batch_is_the_plain_schedule() -> None:
    for ratio in RATIOS:
        plain = [replayed_slot(p, ratio) for p in range(200)]
        assert [replayed_position(p, ratio=ratio, every=1, batch_size=8) for p in range(200)] == plain


def mixture(current: Sequence[Example], memory: Sequence[Example], ratio: float, *, seed: int = 0) -> Mixture:
    """Of one source."""
    return Mixture(current=current, sources=[Source(name="x", memory=memory, ratio=ratio)], stage=make_stage(seed=seed))


@pytest.mark.parametrize("ratio", [0.1, 0.5])
def test_a_mixture_is_a_function_of_the_position(ratio: float) -> None:
    """Read in any order, again, or by another object: the same example; the others are the stage's own."""
    current, memory = make_examples("new", 80), make_examples("old", 9)
    first, second = (mixture(current, memory, ratio) for _ in range(2))
    found = [first[i] for i in range(len(first))]
    assert [second[i] for i in reversed(range(80))] == found[::-1]
    assert [first[i] for i in range(80)] == found
    for position, example in enumerate(found):
        assert example.domain == ("old" if replayed_slot(position, ratio) else "new")
        assert example.domain == "old" or example == current[position]
    drawn = [e.row for e in found if e.domain == "old"]
    assert len({*drawn}) > 1
    other = mixture(current, memory, ratio, seed=1)
    assert [other[i].row for i in range(80) if replayed_slot(i, ratio)] != drawn


@pytest.mark.parametrize("position", [-1, 80])
def test_positions_outside_of_the_stage(position: int) -> None:
    with pytest.raises(IndexError):
        mixture(make_examples("new", 80), make_examples("old", 1), 0.5)[position]


@pytest.fixture(scope="module")
def module(llama: Path) -> Any:
    """A tiny model with LoRA, as it is between two stages."""
    built = make_module(llama, lora(target_modules=["q_proj"], r=2), {})
    built.build(seed=0)
    return built


def at(module: Any, dataset: list[Example]) -> Any:
    """The module after a stage on these examples."""
    module.dataset = dataset
    return module


def remembering(examples: list[Example], **options: Any) -> Replay:
    """A replay after a domain of the given examples."""
    replay = Replay(**options)
    dataset = [*examples, *examples[:3], *make_examples("other", 4)]
    replay.on_domain_end(SimpleNamespace(dataset=dataset), make_stage(index=0, domain=examples[0].domain))
    return replay


def test_full_memory_has_the_gradient_of_joint_training() -> None:
    """C5: with ρ = n_old / (n_old + n_new) and all old examples kept; half and half would be another gradient."""
    torch.manual_seed(0)
    olds, news, steps = 12, 36, 4000
    x, y = torch.randn(48, 3, dtype=torch.float64), torch.randn(48, dtype=torch.float64)
    x[:olds] += 2
    theta = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    gradients = {
        (domain, str(i - first)): (x[i] @ theta - y[i]) * x[i]
        for domain, first, last in (("old", 0, olds), ("new", olds, 48))
        for i in range(first, last)
    }
    joint = torch.stack([*gradients.values()]).mean(0)
    rows = make_examples("new", news)
    stage = make_stage(steps=steps)
    current = StageExamples(rows=news, encode=rows.__getitem__, stage=stage)
    errors = {}
    for ratio in (olds / (olds + news), 0.5):
        mixed = remembering(make_examples("old", olds), ratio=ratio).transform_dataset(current, stage)
        seen = torch.stack([gradients[mixed[i].domain, mixed[i].row] for i in range(len(mixed))])
        errors[ratio] = float((seen.mean(0) - joint).norm())
        noise = float((seen.var(0) / len(seen)).sum().sqrt())
    assert errors[0.25] < 4 * noise
    assert errors[0.5] > 40 * noise


# --- the memory -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "examples",
    [
        [],
        make_examples("old", 5),
        [
            Example.of(domain='心臓 🫀\n"quoted"', row="ä/1", prompt=(0,), completion=(1,)),
            Example.of(domain="", row="\u2028", prompt=tuple(range(300)), completion=(2**31 - 1, 0, 70_000)),
        ],
        [
            Example(domain="a", row="1", prompt=(1, 2), branches=(), extra={"solution": "4", "tests": [1, "ü"]}),
            Example(domain="a", row="2", prompt=(3,), branches=()),
            Example(domain="a", row="3", prompt=(3,), branches=(Branch(tokens=(5, 6)),), extra={"solution": 7}),
        ],
    ],
    ids=["empty", "plain", "unicode", "prompts"],
)
def test_examples_survive_packing_and_a_file(examples: list[Example], tmp_path: Path) -> None:
    packed = pack_examples(examples)
    assert unpack_examples(packed) == examples
    assert [e.extra for e in unpack_examples(packed)] == [e.extra for e in examples]
    save_tree(tmp_path / "state.safetensors", {"buffer": packed})
    assert unpack_examples(load_tree(tmp_path / "state.safetensors")["buffer"]) == examples


def test_memory_holds_each_row_of_the_domain_once() -> None:
    """Rows seen twice count once, rows of other domains (replayed ones) not at all."""
    replay = remembering(make_examples("old", 20))
    assert replay.memory() == make_examples("old", 20)
    assert int(replay.state["seen"]) == 20


@pytest.mark.parametrize("capacity", [1, 5, 19])
def test_memory_never_exceeds_its_capacity(capacity: int) -> None:
    replay = remembering(make_examples("old", 20), capacity=capacity)
    assert len(replay.memory()) == capacity
    assert {*replay.memory()} <= {*make_examples("old", 20)}


def test_the_reservoir_goes_on_over_domains_and_after_a_restart(tmp_path: Path) -> None:
    """Two domains one after another, with a file in between, leave the reservoir of one long sequence."""
    first, second = make_examples("a", 30), make_examples("b", 30)
    replay = remembering(first, capacity=8)
    save_tree(tmp_path / "state.safetensors", replay.state_dict())
    back = Replay(capacity=8)
    back.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    back.on_domain_end(SimpleNamespace(dataset=second), make_stage(domain="b"))
    assert back.memory() == [[*first, *second][i] for i in run_reservoir(60, 8, seed=0)]
    assert int(back.state["seen"]) == 60
    assert {e.domain for e in back.memory()} == {"a", "b"}


@pytest.mark.parametrize("policy", ["balanced", "ring", "herding", "kmeans"])
@pytest.mark.parametrize("capacity", [2, 7, 30])
def test_fair_memories_hold_as_much_of_each_domain(policy: Any, capacity: int, module: Any) -> None:
    """After every domain: never above the capacity, no two domains apart by more than one, each row once."""
    replay = Replay(policy=policy, capacity=capacity)
    for index, name in enumerate("abc"):
        examples = make_examples(name, 12)
        replay.on_domain_end(at(module, examples), make_stage(index=index, domain=name))
        kept = replay.memory()
        counts = Counter(e.domain for e in kept)
        sizes = [counts[known] for known in "abc"[: index + 1]]
        assert sum(sizes) == len({*kept}) == min(capacity, 12 * (index + 1))
        assert max(sizes) - min(sizes) <= 1
        assert {e for e in kept if e.domain == name} <= {*examples}


def test_a_ring_keeps_the_last_that_were_seen() -> None:
    replay = Replay(policy="ring", capacity=4)
    a, b = make_examples("a", 9), make_examples("b", 9)
    # Row 0 comes again at the end: it was seen last.
    replay.on_domain_end(SimpleNamespace(dataset=[*a, a[0]]), make_stage(index=0, domain="a"))
    assert replay.memory() == [a[0], a[8], a[7], a[6]]
    replay.on_domain_end(SimpleNamespace(dataset=b), make_stage(index=1, domain="b"))
    assert replay.memory() == [a[0], a[8], b[8], b[7]]


@pytest.mark.parametrize("policy", ["herding", "kmeans"])
def test_choices_by_features_ignore_the_order_of_training(policy: Any, module: Any) -> None:
    found = []
    for order in (slice(None), slice(None, None, -1)):
        replay = Replay(policy=policy, capacity=5)
        replay.on_domain_end(at(module, make_examples("a", 20)[order]), make_stage(index=0, domain="a"))
        found.append(replay.memory())
    assert found[0] == found[1]
    assert len(found[0]) == 5


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_features_are_what_the_head_reads(layout: Any, module: Any) -> None:
    """Against transformers' own hidden states, and without a trace in the model."""
    examples = [
        Example.of(domain="a", row=str(i), prompt=(9, 8, i), completion=(i, 7, 0)[: 2 + i % 2]) for i in range(5)
    ]
    examples[3] = Example.of(domain="a", row="3", prompt=(4,) * 7, completion=(5, 6))
    was, module.layout = module.layout, layout
    module.model.eval()
    before = module.forward(make_batch(examples, layout=layout))
    found = mean_hidden(module, examples)
    for example, row in zip(examples, found, strict=True):
        ids = torch.tensor([[*example.prompt, *example.completion[:-1]]])
        with torch.inference_mode():
            states = module.model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        torch.testing.assert_close(row, states[len(example.prompt) - 1 :].mean(0), rtol=1e-4, atol=1e-4)
    assert torch.equal(module.forward(make_batch(examples, layout=layout)), before)
    module.layout = was


def test_losses_are_those_of_the_memory_and_decide_the_draws(module: Any) -> None:
    replay = Replay(ratio=0.5, capacity=6, draw="loss", exponent=2.0)
    examples = make_examples("old", 6)
    replay.on_domain_end(at(module, examples), make_stage(index=0, domain="old"))
    losses = replay.state["losses"]
    assert isinstance(losses, torch.Tensor)
    alone = [module.objective(module.forward, make_batch([e], layout=module.layout), None).loss for e in examples]
    torch.testing.assert_close(losses, torch.stack(alone).detach(), rtol=1e-5, atol=1e-5)
    replay.state["losses"] = torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0, 0.0])
    stage = make_stage(steps=1000)
    mixed = replay.transform_dataset(make_examples("new", stage.steps * stage.batch_size), stage)
    drawn = Counter(e.row for e in mixed if e.domain == "old")
    assert {*drawn} == {"1", "4"}
    # p = 9 / 10: four standard deviations of 4000 draws.
    assert abs(drawn["1"] / 4000 - 0.9) < 4 * math.sqrt(0.09 / 4000)


def test_the_numbers_are_what_is_stored(module: Any) -> None:
    replay = remembering(make_examples("old", 20), capacity=7)
    assert replay.metrics_to_log(module) == {"examples": 7, "bytes": replay.state_bytes()}
    sizes = [t.numel() * t.element_size() for t in pack_examples(replay.memory()).values()]
    assert replay.state_bytes() == sum(sizes) + 8


# --- what may never be kept -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", ["validation", "test"])
def test_rows_that_are_scored_are_refused(split: Any, llama: Path, tmp_path: Path) -> None:
    """By where they come from, whatever mistake brings them into a training set."""
    data = StreamData(domains={**domains(tmp_path, {"a": "generative"})})
    tokenizer = CausalLM(path=str(llama)).tokenizer
    stage = make_stage(index=0, domain="a")
    scored = data.evaluation_examples("a", split, tokenizer)
    assert {e.split for e in scored} == {split}
    learned = list(data.examples(stage, tokenizer))
    replay = Replay()
    strange = replace(scored[0], row="strange")  # its id may be that of a training row
    with pytest.raises(UserError, match=f"row 'strange' of the {split} split of 'a'"):
        replay.on_domain_end(SimpleNamespace(dataset=[*learned, strange]), stage)
    assert not replay.memory(), "nothing half done"
    replay.on_domain_end(SimpleNamespace(dataset=learned), stage)
    assert replay.memory()


def test_memory_holds_training_rows_only(llama: Path, tmp_path: Path) -> None:
    """A real stream: what is remembered are training rows as the model read them, never a row of a test."""
    replay = Replay(ratio=0.25, capacity=1000)
    readers = domains(tmp_path / "data")
    for reader in readers.values():
        reader.scorers = scorers_by_name(["nll"], where="test")
    adapter = lora(target_modules=["q_proj"], r=2)
    record, _ = train(tmp_path / "run", llama, adapter, {"replay": replay}, data={"domains": readers}, steps=8)
    tokenizer = CausalLM(path=str(llama)).tokenizer

    def encoded(name: str, split: Any) -> set[Example]:
        reader = readers[name]
        return {reader.template.encode(tokenizer, domain=name, row=row) for row in reader.rows(split)}

    kept = {name: {e for e in replay.memory() if e.domain == name} for name in readers}
    prompts = {name: {e.prompt for e in kept[name]} for name in readers}
    *learned, last = readers
    assert not kept[last], "nothing is remembered where nothing follows"
    for name in learned:
        assert kept[name]
        assert kept[name] <= encoded(name, "train")
        assert not prompts[name] & {e.prompt for split in ("test", "validation") for e in encoded(name, split)}
    # The first domain had all 32 positions of 24 rows for itself, later ones share them with old rows.
    assert len(kept["a"]) == 24
    assert sum(map(len, kept.values())) == len(replay.memory()) == int(replay.state["seen"])
    assert record["cost"]["mitigation_state_bytes"]["replay"] == replay.state_bytes()


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [{"exponent": -1.0}, {"candidates": 0}, {"virtual_step": 0.0}, {"draw": "mir", "ratio": 1.0, "every": 2}],
    ids=str,
)
def test_wrong_draws_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        Replay(**options)


def test_a_whole_replay_batch_needs_others_between() -> None:
    assert Replay(ratio=1.0, every=2).ratio == 1.0
    with pytest.raises(UserError, match="every=0"):
        Replay(every=0)


@pytest.mark.parametrize("options", [{"ratio": -0.1}, {"ratio": 1.0}, {"ratio": math.nan}, {"capacity": 0}], ids=str)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}=") as caught:
        Replay(**options)
    assert "ratio: 0.25" in caught.value.fix

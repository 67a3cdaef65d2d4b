"""Generative replay: how prompts are cut, that nothing but weights and seed decide, and what is dropped."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import Full
from residency.adapters.peft import lora
from residency.backbones.base import Sampling
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, save_tree
from residency.core.tensors import snapshot
from residency.core.types import Example, Outputs, Stage
from residency.mitigations import GenerativeReplay
from residency.mitigations.rehearsal.generation import (
    Shape,
    close,
    degenerate,
    label,
    pack_shapes,
    shape_of,
    unpack_shapes,
)
from residency.testing.tiny_runs import make_module, train

HEAD, TAIL = (50, 51), (60,)


def make_examples(domain: str, rows: int) -> list[Example]:
    """Prompts head - body of one to four tokens - tail."""
    return [
        Example.of(
            domain=domain, row=str(i), prompt=(*HEAD, *range(70 + i, 71 + i + i % 4), *TAIL), completion=(i + 1, 2, 0)
        )
        for i in range(rows)
    ]


def make_stage(index: int = 0, domain: str = "a", seed: int = 0) -> Stage:
    return Stage(index=index, domain=domain, stages=3, seed=seed, steps=4, batch_size=4)


@pytest.fixture(scope="module")
def module(llama: Path) -> Any:
    built = make_module(llama, lora(target_modules=["q_proj", "v_proj"], r=2), {})
    built.build(seed=0)
    built.model.eval()
    return built


def finished(module: Any, *domains: str, seed: int = 0, rows: int = 12, **options: Any) -> GenerativeReplay:
    """The mitigation after these domains."""
    replay = GenerativeReplay(**{"examples": 12, "kept": 5, "shots": 2, **options})
    for index, name in enumerate(domains):
        module.dataset = make_examples(name, rows)
        replay.on_domain_end(module, make_stage(index, name, seed))
    return replay


# --- the shape of prompts ---------------------------------------------------------------------------------------------


def test_a_domain_shows_head_and_tail() -> None:
    shape = shape_of(make_examples("a", 9))
    assert shape == Shape(head=HEAD, tail=TAIL, prompt=7, completion=3)
    single = make_examples("a", 1)
    assert shape_of(single * 2) == Shape(head=(), tail=(), prompt=4, completion=3)
    nested = [Example.of(domain="a", row=str(n), prompt=(5,) * n, completion=(1,)) for n in (2, 4)]
    found = shape_of(nested)
    assert len(found.head) + len(found.tail) == 1, "something of the shortest prompt is its own"
    assert unpack_shapes(pack_shapes({"a": shape, "心": found})) == {"a": shape, "心": found}
    assert unpack_shapes(pack_shapes({})) == {}


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        ((71, 72, 60, 9, 9), (50, 51, 71, 72, 60)),
        ((71, 60, 72, 60), (50, 51, 71, 60)),
        ((71, 72, 73, 74, 75, 76), (50, 51, 71, 72, 73, 74, 60)),
        ((71,), (50, 51, 71, 60)),
        ((60, 71), None),
        ((), None),
    ],
    ids=["closed", "first", "too long", "ended", "empty", "nothing"],
)
def test_prompts_end_where_the_domains_do(written: tuple[int, ...], prompt: tuple[int, ...] | None) -> None:
    assert close(written, Shape(head=HEAD, tail=TAIL, prompt=7, completion=3)) == prompt


@pytest.mark.parametrize(
    ("tokens", "is_degenerate"),
    [((), True), ((5,), False), ((5,) * 7, False), ((5,) * 8, True), ((5, 6) * 4, False), ((5, 6) * 5, True)],
    ids=str,
)
def test_a_text_that_goes_in_circles_is_degenerate(tokens: tuple[int, ...], is_degenerate: bool) -> None:
    assert degenerate(tokens) == is_degenerate


# --- writing ----------------------------------------------------------------------------------------------------------


def test_answers_are_the_models_own(module: Any) -> None:
    """Greedy, ended by the end token or cut at the domain's longest; empty ones go, equal prompts come once."""
    prompts = [e.prompt for e in make_examples("a", 10)]
    answers = {p: module.backbone.generate(module.model, [p], max_new_tokens=4)[0] for p in prompts}
    examples, cut = label(module, [*prompts, *prompts], domain="a", length=4)
    assert {e.prompt: list(e.completion) for e in examples} == {p: [*a, 0][:4] for p, a in answers.items() if a}
    assert cut == sum(len(a) == 4 for a in answers.values())
    assert len({e.row for e in examples}) == len(examples)


class Scripted:
    """A backbone that says what it is told to."""

    def __init__(self, tokenizer: Any, texts: Sequence[list[int]], answers: Sequence[list[int]]) -> None:
        self.tokenizer, self.texts, self.answers = tokenizer, iter(texts), iter(answers)

    def generate(self, model: Any, prompts: Any, *, max_new_tokens: int, sampling: Any = None) -> list[list[int]]:
        source = self.answers if sampling is None else self.texts
        return [next(source)[:max_new_tokens] for _ in prompts]


def test_what_is_dropped_is_counted(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight asked for: an empty one, one in circles, a double and a copy of a shot go; of four answers an empty one."""
    kept = make_examples("a", 5)
    texts = [[], [7] * 30, [81], [81, 60, 3], list(kept[0].prompt[2:]), [82], [83], [84]]
    replay = GenerativeReplay(examples=8, kept=5)
    long = Example.of(domain="a", row="long", prompt=(*HEAD, *range(100, 120), *TAIL), completion=(1, 2, 0))
    monkeypatch.setattr(
        module, "backbone", Scripted(module.backbone.tokenizer, texts, [[5], [], [6, 7, 8], [9]]), raising=True
    )
    module.dataset = [*kept, long]
    replay.kept = 6
    replay.on_domain_end(module, make_stage())
    assert [e.prompt[2:-1] for e in replay.written()] == [(81,), (83,), (84,)]
    assert [e.completion for e in replay.written()] == [(5, 0), (6, 7, 8), (9, 0)]
    assert replay.state["counts"].tolist() == [8, 3, 1]  # type: ignore[union-attr]
    numbers = replay.metrics_to_log(module)
    assert (numbers["accept_rate"], numbers["cut"], numbers["examples"]) == (3 / 8, 1 / 3, 3)
    assert numbers["bytes"] == replay.state_bytes()


def test_only_weights_and_seed_decide(module: Any) -> None:
    """Again: the same examples, whatever the global generator did, which is left alone; another seed: others."""
    before = snapshot(dict(module.model.named_parameters()))
    first = finished(module, "a")
    torch.manual_seed(123)
    random = torch.get_rng_state()
    assert finished(module, "a").written() == first.written()
    assert torch.equal(random, torch.get_rng_state())
    assert finished(module, "a", seed=1).written() != first.written()
    assert first.written()
    assert all(torch.equal(before[n], p) for n, p in module.model.named_parameters())


@pytest.mark.parametrize("options", [{}, {"oversample": 3}, {"shots": 0, "kept": 0}], ids=["ssr", "kmeans", "nothing"])
def test_every_domain_so_far_is_written_about(options: dict[str, Any], module: Any) -> None:
    """In equal numbers, less what was dropped; in the domain's own shape; kept examples are never among them."""
    replay = finished(module, "a", "b", **options)
    written = replay.written()
    for name in "ab":
        own = [e for e in written if e.domain == name]
        assert 0 < len(own) <= 6
        assert all(e.prompt[:2] == HEAD and e.prompt[-1:] == TAIL and len(e.prompt) <= 7 for e in own)
        assert len({e.prompt for e in own}) == len({e.row for e in own}) == len(own)
    shots = replay._packed("shots")
    assert [sum(e.domain == name for e in shots) for name in "ab"] == [replay.kept, replay.kept]
    assert not {e.prompt for e in shots} & {e.prompt for e in written}


def test_state_survives_a_file_and_feeds_the_mixture(module: Any, tmp_path: Path) -> None:
    replay = finished(module, "a", ratio=0.5)
    save_tree(tmp_path / "state.safetensors", replay.state_dict())
    back = GenerativeReplay(ratio=0.5)
    back.load_state_dict(load_tree(tmp_path / "state.safetensors"))
    assert back.written() == replay.written()
    current = make_examples("b", 16)
    mixed = list(back.transform_dataset(current, make_stage(1, "b")))
    assert [e.domain for e in mixed] == ["b", "a"] * 8
    off = finished(module, "a", ratio=0.0)
    assert off.transform_dataset(current, make_stage(1, "b")) is current
    assert not off.touches_training(1)


# --- LAMOL ------------------------------------------------------------------------------------------------------------


def test_the_prompt_loss_is_that_of_prompts_after_their_domains_name(module: Any) -> None:
    replay = GenerativeReplay(shots=0, kept=0, prompt_loss=0.25)
    examples = make_examples("ab", 3)
    nothing = Outputs(loss=torch.zeros(()), logits=None, log={})
    found = replay.loss_terms(module, make_batch(examples, layout=module.layout), nothing)
    start = (0, *module.backbone.tokenizer("ab\n").input_ids)
    total, count = 0.0, 0
    for example in examples:
        ids = torch.tensor([[*start, *example.prompt, 0]])
        scores = module.model(input_ids=ids).logits[0].log_softmax(-1)
        own = [-scores[p - 1, ids[0, p]].item() for p in range(len(start), ids.shape[1])]
        total, count = total + sum(own), count + len(own)
    assert math.isclose(found["prompts"].item(), 0.25 * total / count, rel_tol=1e-4)
    assert GenerativeReplay().loss_terms(module, make_batch(examples, layout=module.layout), nothing) == {}
    assert replay.touches_training(0)
    assert not GenerativeReplay().touches_training(0)


def test_a_model_writes_the_prompts_it_has_learned(llama: Path, tmp_path: Path) -> None:
    """A tiny model that learns a domain's prompts writes letters of its alphabet and closes them itself."""
    replay = GenerativeReplay(examples=24, shots=0, kept=0, prompt_loss=1.0, top_k=0)
    kinds = {"a": "generative"}
    _, trained = train(tmp_path / "run", llama, Full(), {"x": replay}, kinds=kinds, steps=100, lr=1e-2)
    trained.finish_stage()  # as if another domain followed
    decode = trained.backbone.tokenizer.decode
    texts = [decode(list(e.prompt)) for e in replay.written()]
    assert len(texts) >= 12
    assert sum({*text[:-1]} <= {*"abcdefghijklmnop"} and text.endswith(">") for text in texts) >= 0.7 * len(texts)
    lines = [json.loads(line) for line in (tmp_path / "run" / "history.jsonl").read_text().splitlines()]
    assert lines[-1]["loss/x/prompts"] < lines[0]["loss/x/prompts"]
    assert not replay._packed("shots")


# --- drawn continuations ----------------------------------------------------------------------------------------------


def test_continuations_are_drawn_from_the_models_own_distribution(module: Any) -> None:
    """First tokens of 600 draws against the top-k distribution at a temperature; chi-square, 3 degrees of freedom."""
    prompt = make_examples("a", 1)[0].prompt
    single = Example.of(domain="a", row="0", prompt=prompt, completion=(1,))
    with torch.no_grad():
        logits = module.forward(make_batch([single], layout=module.layout))[0]
    top, tokens = logits.topk(4)
    temperature = float(top[0] - top[3]) / 2  # at 1, a random model's four best tokens are all but alike
    expected = (top / temperature).softmax(-1) * 600
    assert expected.max() > 4 * expected.min()
    how = Sampling(seed=3, temperature=temperature, top_k=4)
    texts = module.backbone.generate(module.model, [prompt] * 600, max_new_tokens=1, sampling=how)
    firsts = [text[0] if text else 0 for text in texts]
    counts = torch.tensor([float(firsts.count(int(t))) for t in tokens])
    assert counts.sum() == 600
    assert float(((counts - expected) ** 2 / expected).sum()) < 31
    assert module.backbone.generate(module.model, [prompt] * 600, max_new_tokens=1, sampling=how) == texts


@pytest.mark.parametrize(
    "options",
    [
        {"ratio": 1.0},
        {"examples": 0},
        {"oversample": 0},
        {"temperature": 0.0},
        {"top_k": -1},
        {"shots": 9},
        {"prompt_loss": math.nan},
        {"shots": 2, "prompt_loss": 0.25},
    ],
    ids=str,
)
def test_wrong_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"{next(iter(options))}="):
        GenerativeReplay(**options)

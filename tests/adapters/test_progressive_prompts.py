"""Progressive Prompts: vectors in front, coordinates as without them, nothing forgotten."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn

from attached import EXAMPLES, attach, backbone, learn, logits
from growing import go, observing, stage
from residency.adapters import ProgressivePrompts
from residency.adapters.prompted import Prompted, shift_positions, sizes_with_prompt
from residency.batching import make_batch
from residency.errors import UserError
from running import train

PROMPTS = [list(e.prompt) for e in EXAMPLES]


def prompted(folder: Path, stages: int, **how: Any) -> tuple[ProgressivePrompts, Any]:
    adapter = ProgressivePrompts(length=3)
    return adapter, go(attach(folder, adapter), adapter, stages, lr=0.3, **how)


def test_places_in_closed_form() -> None:
    """Rows of 2 and 3 tokens, the second a prompt of 1 with branches of 1 and 1; two vectors in front of each."""
    segments = ((2,), (1, 1, 1))
    assert sizes_with_prompt(segments, by=2) == ((4,), (3, 1, 1))
    assert shift_positions(torch.arange(5), segments, by=2).tolist() == [2, 3, 6, 7, 8]


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_only_the_newest_prompt_trains(kind: str, request: pytest.FixtureRequest) -> None:
    adapter, model = prompted(request.getfixturevalue(kind), 2)
    assert [*adapter.trainable(model)] == ["prompts.001"]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    learn(model, lr=0.3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"prompts.001"}
    assert all(p.grad is None for p in model.model.parameters())


def test_the_input_grows_by_one_prompt_per_domain(llama: Path) -> None:
    adapter, model = prompted(llama, 3, train=False)
    seen: list[torch.Tensor] = []
    layer = model.model.model.layers[0]
    layer.register_forward_pre_hook(lambda module, args, kwargs: seen.append(args[0]), with_kwargs=True)
    width = make_batch(EXAMPLES, layout="padded").input_ids.shape[1]
    for domain, context in adapter.routes(model).items():
        with context:
            logits(model)
        assert seen[-1].shape[1] == width + 3 * (int(domain[1:]) + 1)
    newest_first = torch.cat([model.prompts[name] for name in ("002", "001", "000")])
    assert torch.equal(seen[-1][0, :9], newest_first)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_padded_and_packed_rows_agree(kind: str, request: pytest.FixtureRequest) -> None:
    _, model = prompted(request.getfixturevalue(kind), 2)
    branched = [
        type(e)(domain="x", row=e.row, prompt=e.prompt, completion=e.completion, alternatives=((9, 8), (7,)))
        for e in EXAMPLES
    ]
    padded, packed = (logits(model, layout, branched) for layout in ("padded", "packed"))  # type: ignore[arg-type]
    torch.testing.assert_close(packed, padded, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_generation_is_that_of_each_prompt_alone(kind: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(kind)
    adapter, model = prompted(folder, 2)
    plain = backbone(folder)
    together = plain.generate(model.eval(), PROMPTS, max_new_tokens=6)
    alone = [plain.generate(model, [p], max_new_tokens=6)[0] for p in PROMPTS]
    assert together == alone
    # Greedy by hand, without a cache.
    ids = list(PROMPTS[0])
    for _ in range(len(together[0])):
        out = model(input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long))
        ids.append(int(out.logits[0, -1].argmax()))
    assert ids[len(PROMPTS[0]) :] == together[0]
    with adapter.reference(model):
        assert plain.generate(model, PROMPTS, max_new_tokens=6) == plain.generate(
            plain.load(), PROMPTS, max_new_tokens=6
        )


def test_a_model_that_returns_all_logits(llama: Path) -> None:
    """Without `logits_to_keep` the wrapper selects, with the same result."""

    class Whole(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model
            self.config = model.config

        def get_input_embeddings(self) -> Any:
            return self.inner.get_input_embeddings()

        def forward(self, **options: Any) -> Any:
            return self.inner(**options)

    _, model = prompted(llama, 1)
    expected = logits(model)
    model.model = Whole(model.model)
    torch.testing.assert_close(logits(model), expected, rtol=0, atol=1e-6)
    model.depth = 0
    torch.testing.assert_close(logits(model), logits(backbone(llama).load()), rtol=0, atol=1e-6)


def test_off_is_the_pretrained_model_in_both_layouts(llama: Path) -> None:
    adapter, model = prompted(llama, 2)
    plain = backbone(llama).load()
    for layout in ("padded", "packed"):
        assert not torch.equal(logits(model, layout), logits(plain, layout))  # type: ignore[arg-type]
        with adapter.reference(model):
            assert torch.equal(logits(model, layout), logits(plain, layout))  # type: ignore[arg-type]
            [(learnt, _)] = adapter.serve(model, "d0", EXAMPLES, lambda rows: torch.zeros(len(rows)))
            with learnt:
                assert torch.equal(logits(model, layout), logits(plain, layout))  # type: ignore[arg-type]


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_nothing_is_forgotten_bit_for_bit(layout: Any, llama: Path, tmp_path: Path) -> None:
    record, module = train(
        tmp_path / "run", llama, ProgressivePrompts(length=3), steps=6, lr=0.3, layout=layout,
        kinds={"a": "generative", "b": "label"},
    )  # fmt: skip
    assert module.layout == layout
    assert record["task_id_at_test"] is True
    for scores in record["scores"].values():
        for j, column in enumerate(zip(*scores["R"], strict=True)):
            assert len({*column[j + 1 :]}) == 1
            assert len({*column[: j + 1]}) == 1
    nll = record["scores"]["nll"]["R"]
    assert nll[2][0] < nll[0][0]
    assert record["routing"]["oracle"]["b"] == pytest.approx(nll[2][1], rel=1e-6)


def test_prompts_begin_in_the_vocabulary_and_load_with_peft(llama: Path, tmp_path: Path) -> None:
    adapter = ProgressivePrompts(length=3)
    model: Any = attach(llama, adapter)
    table = model.model.get_input_embeddings().weight
    assert all((table == vector).all(1).any() for vector in model.prompts["000"])
    go(model, adapter, 2, lr=0.3)
    adapter.export(model, tmp_path)
    loaded = PeftModel.from_pretrained(backbone(llama).load(), tmp_path)
    assert loaded.active_peft_config.num_virtual_tokens == 6
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_a_prompt_has_a_vector() -> None:
    with pytest.raises(UserError, match="choose 1 or more"):
        ProgressivePrompts(length=0)


def test_the_wrapper_is_made_once(llama: Path) -> None:
    adapter = ProgressivePrompts(length=2)
    model = attach(llama, adapter)
    assert adapter.attach(model) is model
    assert isinstance(model, Prompted)
    adapter.begin_stage(model, stage(0), observing(model))
    first = model.prompts["000"].detach().clone()
    adapter.begin_stage(model, stage(0), observing(model))
    assert torch.equal(model.prompts["000"], first), "begun again after a kill, not drawn again"

"""A prompt per domain in front of all earlier ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from residency.adapters import ProgressivePrompts
from residency.adapters.progressive_prompts import prepend
from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.core.types import Example
from residency.testing.tiny_runs import make_module, train

ROWS = [Example.of(domain="x", row=str(i), prompt=(5, 6, 7 + i), completion=(8, 9)) for i in range(2)]


@pytest.fixture(scope="module")
def prompted(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Any, Path]:
    folder = tmp_path_factory.mktemp("prompts") / "run"
    record, module = train(folder, llama, ProgressivePrompts(length=3), lr=0.1)
    return record, module, folder


def test_newest_prompt_stands_first() -> None:
    prompts = [torch.full((2, 3), float(k)) for k in (1, 2)]
    out = prepend(prompts, torch.zeros(4, 5, 3))
    assert out.shape == (4, 9, 3)
    assert out[0, :, 0].tolist() == [2, 2, 1, 1, 0, 0, 0, 0, 0]


def test_nothing_is_forgotten_bit_for_bit(prompted: Any) -> None:
    record, module, _ = prompted
    assert record["task_id_at_test"] is True
    assert module.layout == "padded"
    R = record["scores"]["nll"]["R"]
    for j in range(3):
        assert len({R[i][j] for i in range(j + 1, 4)}) == 1
    assert R[1][1] != R[0][1], "an unknown domain is answered with the prompts there are"


def test_length_grows_and_only_the_newest_prompt_trains(prompted: Any) -> None:
    _, module, folder = prompted
    lengths = []
    for k, name in enumerate("abc", 1):
        state = load_tree(folder / "stages" / f"{k}-{name}" / "state.safetensors")["weights"]
        lengths.append(sum(len(t) for n, t in state.items() if n.startswith("prompts.")))
    assert lengths == [3, 6, 9]
    assert [*module.adapter.trainable(module.model)] == ["prompts.2"]
    module.forward(make_batch(ROWS, layout="padded")).sum().backward()
    grads = {name for name, p in module.model.named_parameters() if p.grad is not None}
    assert grads == {"prompts.2"}, "the base has no gradients"


def test_virtual_positions_do_not_shift_the_scores(prompted: Any) -> None:
    """Logits by hand: embeddings of prompts and row through the bare backbone."""
    _, module, _ = prompted
    batch = make_batch(ROWS, layout="padded")
    model = module.model
    with torch.no_grad():
        embedded = prepend([*model.prompts], model.embeddings(batch.input_ids))
        by_hand = model.base_model(inputs_embeds=embedded).logits[:, 9:]
        width = batch.input_ids.shape[1]
        wanted = by_hand[batch.target_at // width, batch.target_at % width]
        torch.testing.assert_close(module.forward(batch), wanted, rtol=0, atol=1e-5)


def test_generation_continues_as_the_scores_say(prompted: Any) -> None:
    """Greedy tokens are the most likely ones of the forward pass, whatever the padding of the neighbours."""
    _, module, _ = prompted
    prompts = [(5, 6, 7), (9,)]
    alone = [module.backbone.generate(module.model.eval(), [p], max_new_tokens=2)[0] for p in prompts]
    assert module.backbone.generate(module.model, prompts, max_new_tokens=2) == alone
    first = make_batch([Example.of(domain="x", row="0", prompt=prompts[0], completion=(1,))], layout="padded")
    with torch.no_grad():
        best = int(module.forward(first)[0].argmax())
    assert alone[0][0] == best or (best == 0 and alone[0] == [])


def test_folding_the_mlp_keeps_the_function(llama: Path) -> None:
    module = make_module(llama, ProgressivePrompts(length=2, hidden=8), {})
    module.build(seed=0)
    batch = make_batch(ROWS, layout="padded")
    with torch.no_grad():
        before = module.forward(batch)
        module.adapter.end_stage(module.model, None, None)
        torch.testing.assert_close(module.forward(batch), before, rtol=0, atol=1e-6)
        assert torch.equal(module.model.reparam(torch.ones(1, 32)), torch.zeros(1, 32)), "the MLP is silent now"


@pytest.mark.parametrize("options", [{"length": 0}, {"hidden": -1}])
def test_impossible_sizes_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UserError, match="ProgressivePrompts with"):
        ProgressivePrompts(**options)

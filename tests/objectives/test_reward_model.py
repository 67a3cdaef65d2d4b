"""A reward model on the head of the backbone: where it is read, what it learns, and a policy that learns from it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import Tensor
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, AutoTokenizer

from residency.adapters import Peft
from residency.core.errors import UserError
from residency.core.tensors import snapshot
from residency.core.types import Branch, Stage
from residency.engine.scoring.likelihoods import pair_rewards
from residency.objectives import RewardModel
from residency.objectives.policy import GRPO
from residency.objectives.reward_model import asked_behind
from residency.objectives.rewards import Answer, ByRewardModel, Question
from residency.testing.objective_rows import examples_of
from residency.testing.tiny_runs import make_module

PAIRS = [replace(e, extra={"margin": 0.1 * i}) for i, e in enumerate(examples_of("pair")[:4])]
STAGE = Stage(index=0, domain="x", stages=2, seed=0, steps=4, batch_size=4)


def learner(backbone: Path, objective: Any = None, *, layout: Any = "packed") -> Any:
    adapter = Peft(config=LoraConfig(target_modules=["q_proj", "v_proj"], r=3, lora_alpha=6, lora_dropout=0.3))
    module = make_module(backbone, adapter, {}, layout=layout)
    module.objective = objective or RewardModel(token="~")
    module.build(seed=0)
    module.begin_stage(STAGE, PAIRS)
    module.model.train(module.objective.forward_noise)
    return module


def loss_of(module: Any) -> tuple[Tensor, Any]:
    batch = module.objective.collate([module.dataset[i] for i in range(4)], layout=module.layout)
    found = module.objective(module.trained_forward, batch, None)
    return found.loss, found.log


def plain_rewards(backbone: Path) -> Tensor:
    """(4, 2) logits of the token "~" behind each whole answer, by the untouched model."""
    token = AutoTokenizer.from_pretrained(backbone).convert_tokens_to_ids("~")
    model = AutoModelForCausalLM.from_pretrained(backbone)
    with torch.no_grad():
        rows = [[model(torch.tensor([[*e.prompt, *b.tokens]])).logits[0, -1, token] for b in e.branches] for e in PAIRS]
    return torch.tensor(rows)


@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_it_is_read_behind_the_end_of_each_answer(layout: Any, llama: Path) -> None:
    rewards = plain_rewards(llama)
    margins = torch.tensor([0.0, 0.1, 0.2, 0.3])
    loss, log = loss_of(learner(llama, RewardModel(centring=0.1, token="~"), layout=layout))
    expected = -logsigmoid(rewards[:, 0] - rewards[:, 1] - margins) + 0.1 * rewards.sum(-1).square()
    torch.testing.assert_close(loss.detach(), expected.mean(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log["rewards/min"], rewards.min(), rtol=1e-4, atol=1e-5)
    assert float(log["rewards/accuracies"]) == float((rewards[:, 0] > rewards[:, 1]).float().mean())


def test_scores_read_the_same_numbers(llama: Path) -> None:
    found = pair_rewards(learner(llama).eval(), PAIRS, token="~", batch_tokens=32)
    torch.testing.assert_close(torch.tensor([found[e.row] for e in PAIRS]), plain_rewards(llama), rtol=1e-4, atol=1e-5)


def test_asking_twice_is_asking_once() -> None:
    once = asked_behind(PAIRS[0], 0)
    assert asked_behind(once, 0) == once
    assert [b.tokens[:-1] for b in once.branches] == [b.tokens for b in PAIRS[0].branches]
    assert [sum(b.mask) for b in once.branches] == [1, 1]


def test_it_learns_which_answer_is_better(llama: Path) -> None:
    module = learner(llama)
    optimizer = torch.optim.AdamW(module.adapter.trainable(module.model).values(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss, log = loss_of(module)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] - 0.1
    assert float(log["rewards/accuracies"]) == 1


def test_a_policy_is_rewarded_by_the_weights_of_the_stage(llama: Path) -> None:
    """Not by its own, which have moved since; and it is left as it was."""
    module = learner(llama)
    kept = snapshot(module.adapter.trainable(module.model))
    module.weights_after = {1: kept}.__getitem__
    with torch.no_grad():
        for leaf in module.adapter.trainable(module.model).values():
            leaf.add_(0.2)
    module.stage = replace(STAGE, index=1)
    reward = ByRewardModel(stage=1, token="~")
    reward.begin_stage(module)
    moved = snapshot(module.adapter.trainable(module.model))
    asked = [Question(prompt="", reference="", row=e.row, ids=e.prompt) for e in PAIRS for _ in e.branches]
    answers = [Answer(text="", tokens=len(b.tokens), ended=True, ids=b.tokens) for e in PAIRS for b in e.branches]
    worth = torch.tensor(reward(asked, answers)).view(4, 2)
    torch.testing.assert_close(worth, plain_rewards(llama), rtol=1e-4, atol=1e-5)
    now = snapshot(module.adapter.trainable(module.model))
    assert all(torch.equal(now[name], moved[name]) for name in moved)
    assert math.isinf(reward.highest)


def test_what_makes_no_sense(llama: Path) -> None:
    module = learner(llama)
    with pytest.raises(UserError, match="before what learns from it"):
        ByRewardModel(stage=1).begin_stage(module)
    with pytest.raises(UserError, match="counted from 1"):
        ByRewardModel(stage=0)
    with pytest.raises(UserError, match="outside of a stage"):
        ByRewardModel(stage=1)([], [])
    with pytest.raises(UserError, match="no such token"):
        learner(llama, RewardModel(token="two words"))
    with pytest.raises(UserError, match="whose logits are 0"):
        learner(llama, RewardModel())  # the end token pads here, and its embedding, which is the head's row, is 0
    with pytest.raises(UserError, match="centring"):
        RewardModel(centring=-1.0)
    assert "fixed_coordinates" in GRPO(reward=ByRewardModel(stage=1)).requires
    with pytest.raises(UserError, match="no pair"):
        RewardModel().begin_stage(module, [replace(PAIRS[0], branches=(Branch(tokens=(1, 0)),))], STAGE)

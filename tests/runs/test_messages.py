"""Conversations on the packaged instruct model: what is learnt and scored is what transformers computes of its chat."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from residency.adapters import Full
from residency.backbones import CausalLM
from residency.core.assets.cache import cache_folder
from residency.core.types import Stage
from residency.domains import Table
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.settings import EvaluationSettings
from residency.objectives import SFT

MODEL = cache_folder() / "models" / "smollm2-135m-instruct"
TALKS = [
    [
        {"role": "system", "content": "You answer in one word."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "Paris"},
        {"role": "user", "content": "And of Italy? Think of « Größe » 👩."},
        {"role": "assistant", "content": "Rome, of course 👩"},
    ],
    [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4\n\n(four)"}],
]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not MODEL.is_dir(), reason="the packaged model is absent: run `residency assets`"),
]


def by_hand(model: Any, tokenizer: Any, talk: list[dict[str, str]]) -> list[torch.Tensor]:
    """Nats of the tokens of every answer and of the end of its turn, by transformers alone."""
    whole = tokenizer.apply_chat_template(talk, tokenize=False)
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    with torch.inference_mode():
        log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    found = []
    for k, message in enumerate(talk):
        if message["role"] == "assistant":
            before = tokenizer.apply_chat_template(talk[:k], tokenize=False, add_generation_prompt=True)
            start, end = (
                len(tokenizer(text, add_special_tokens=False).input_ids)
                for text in (before, f"{before}{message['content']}<|im_end|>")
            )
            assert whole.startswith(before)
            found.append(torch.stack([-log_p[i - 1, ids[i]] for i in range(start, end)]))
    return found


def test_likelihoods_of_conversations_are_those_of_transformers(tmp_path: Path) -> None:
    """Each supervised token, the loss of a step and the score of a row, to 1e-5 (float32: sums in another order)."""
    for split in ("train", "test"):
        rows = [{"messages": talk} for talk in TALKS]
        # A test row that is a training row is refused: the questions differ in a word.
        text = "\n".join(json.dumps(row) for row in rows)
        (tmp_path / f"{split}.jsonl").write_text(text.replace("What is", "Tell me") if split == "test" else text)
    test = [json.loads(line)["messages"] for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    test[1][0]["content"] = "3+1?"
    (tmp_path / "test.jsonl").write_text("\n".join(json.dumps({"messages": talk}) for talk in test))
    domain = Table(train=str(tmp_path / "train.jsonl"), test=str(tmp_path / "test.jsonl"), scorers=["nll"])
    domain.limits["validation"] = 0
    module = ContinualModule(backbone=CausalLM(), adapter=Full(), objective=SFT())
    module.build(seed=0)
    data = StreamData(domains={"talks": domain}, batch_size=2)
    tokenizer, model = AutoTokenizer.from_pretrained(MODEL), AutoModelForCausalLM.from_pretrained(MODEL).float().eval()

    stage = Stage(index=0, domain="talks", stages=1, seed=0, steps=1, batch_size=2)
    module.begin_stage(stage, data.examples(stage, module.backbone.tokenizer))
    examples = [module.dataset[i] for i in range(len(module.dataset))]
    module.model.eval()
    nats = {}
    for example in examples:
        batch = module.objective.collate([example], layout=module.layout)
        with torch.inference_mode():
            logits = module.forward(batch)
        nats[example.row] = torch.nn.functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    rows = {row.id: row for row in domain.rows("train")}
    wanted = {e.row: torch.cat(by_hand(model, tokenizer, [*map(dict, rows[e.row].messages)])) for e in examples}
    assert len(wanted) == 2
    for row, found in nats.items():
        torch.testing.assert_close(found, wanted[row], rtol=1e-5, atol=1e-5)

    with torch.inference_mode():
        loss = module.objective(module.forward, module.objective.collate(examples, layout=module.layout), None).loss
    torch.testing.assert_close(loss, torch.cat([wanted[e.row] for e in examples]).mean(), rtol=0, atol=1e-5)

    scores = evaluate(module, data, split="test", settings=EvaluationSettings())
    tests = {row.id: [*map(dict, row.messages)] for row in domain.rows("test")}
    assert {score.row for score in scores} == {*tests}
    for score in scores:
        assert score.value == pytest.approx(
            float(torch.cat(by_hand(model, tokenizer, tests[score.row])).mean()), abs=1e-5
        )

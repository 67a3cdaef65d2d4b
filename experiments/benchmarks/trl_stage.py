"""One stage as a shell loop over TRL would run it: load, train by SFTTrainer, save the adapter, score all domains.

    PYTHON_WITH_TRL trl_stage.py MODEL ROWS INTO --after FOLDER [--domain NAME] [--threads 2]

Needs torch, transformers, peft, datasets and trl, nothing of this project. ROWS is what `shell_loop.py` writes; INTO
gets the adapter and `scores.json`. Without --domain nothing is trained: row 0. bf16 and checkpointing, TRL's defaults,
are off: on a CPU they are some 17 times slower. Scoring pads: rows sorted by length, 16 together, the head at
supervised positions only, every label a row of its own, transformers' `generate`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

ROWS = 16

Pair = tuple[list[int], list[int]]


def load(options: argparse.Namespace) -> Any:
    """The model with the adapter of the stage before."""
    base = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    return PeftModel.from_pretrained(base, options.after, is_trainable=True)


def train(model: Any, tokenizer: Any, rows: Sequence[Pair], batch: int, folder: Path) -> None:
    """One pass over the rows in their order, 12 steps of 8 in the quickstart."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    data = Dataset.from_list(
        [
            {"input_ids": [*prompt, *completion], "completion_mask": [0] * len(prompt) + [1] * len(completion)}
            for prompt, completion in rows
        ]
    )
    settings = SFTConfig(
        output_dir=str(folder / "trainer"),
        max_steps=len(rows) // batch,
        per_device_train_batch_size=batch,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        weight_decay=0.01,
        optim="adamw_torch",
        max_grad_norm=1.0,
        train_sampling_strategy="sequential",
        completion_only_loss=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    SFTTrainer(model=model, args=settings, train_dataset=data, processing_class=tokenizer).train()


@torch.inference_mode()
def token_nll(model: Any, pairs: Sequence[Pair]) -> list[torch.Tensor]:
    """Nats of every completion token of each pair, in the order given."""
    core = model.get_base_model()
    found: dict[int, torch.Tensor] = {}
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    for first in range(0, len(order), ROWS):
        group = order[first : first + ROWS]
        width = max(len(pairs[i][0]) + len(pairs[i][1]) for i in group)
        ids, mask = torch.zeros(len(group), width, dtype=torch.long), torch.zeros(len(group), width, dtype=torch.long)
        at = torch.zeros(len(group), width, dtype=torch.bool)
        for row, i in enumerate(group):
            prompt, completion = pairs[i]
            end = len(prompt) + len(completion)
            ids[row, :end], mask[row, :end], at[row, len(prompt) : end] = torch.tensor([*prompt, *completion]), 1, True
        hidden = core.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
        nll = F.cross_entropy(core.lm_head(hidden[at[:, 1:]]), ids[:, 1:][at[:, 1:]], reduction="none")
        parts = nll.split([len(pairs[i][1]) for i in group])
        found |= dict(zip(group, parts, strict=True))
    return [found[i] for i in range(len(pairs))]


def label_wins(model: Any, row: dict[str, Any]) -> bool:
    """Whether the right label is the likeliest, per whole label."""
    sums = [float(nll.sum()) for nll in token_nll(model, [(row["prompt"], label) for label in row["labels"]])]
    return sums[0] < min(sums[1:])


@torch.inference_mode()
def written(model: Any, rows: Sequence[dict[str, Any]], tokenizer: Any) -> list[str]:
    """Greedy continuations of all prompts together."""
    width, end = max(len(row["prompt"]) for row in rows), tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(row["prompt"])) + row["prompt"] for row in rows])
    mask = torch.tensor([[0] * (width - len(row["prompt"])) + [1] * len(row["prompt"]) for row in rows])
    limit = max(len(row["completion"]) for row in rows)
    settings = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=end)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, width:].tolist()]


def score(model: Any, test: dict[str, list[dict[str, Any]]], tokenizer: Any) -> dict[str, dict[str, float]]:
    """{scorer: {domain: mean}} of what the quickstart scores after a stage."""
    model.eval()
    found: dict[str, dict[str, float]] = {"nll": {}, "accuracy": {}, "exact_match": {}}
    for name, rows in test.items():
        nll = torch.cat(token_nll(model, [(row["prompt"], row["completion"]) for row in rows]))
        found["nll"][name] = float(nll.mean())
        labelled = [row for row in rows if row["labels"]]
        if labelled:
            found["accuracy"][name] = sum(label_wins(model, row) for row in labelled) / len(labelled)
        asked = [row for row in rows if row["target"] is not None]
        if asked:
            texts = written(model, asked, tokenizer)
            hits = [text == row["target"] for text, row in zip(texts, asked, strict=True)]
            found["exact_match"][name] = sum(hits) / len(hits)
    return found


def main() -> None:
    """Train and score one stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("rows", type=Path)
    parser.add_argument("into", type=Path)
    parser.add_argument("--after", type=Path, required=True, help="folder of an adapter")
    parser.add_argument("--domain")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = json.loads(options.rows.read_text(encoding="utf-8"))
    tokenizer, model = AutoTokenizer.from_pretrained(options.model), load(options)
    options.into.mkdir(parents=True, exist_ok=True)
    if options.domain:
        train(model, tokenizer, rows["train"][options.domain], rows["batch"], options.into)
        model.save_pretrained(options.into)
    scores = score(model, rows["test"], tokenizer)
    (options.into / "scores.json").write_text(json.dumps(scores), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Is `residency fit` at least as fast as a plain PyTorch loop on the same batches?

Both arms train SmolLM2-135M with LoRA r=8 on medical -> legal -> code, on the very same rows in the same order,
alternating in one process (loop, fit, loop, fit, ...), so that a busy machine slows both. Only training is timed: from
the first batch's collation to the last optimizer step, without loading, scoring or writing.

The loop: right-padded batches, the head only at supervised positions, AdamW, clipping at 1.0; PEFT's own LoRA layers
and transformers' default attention. No framework.

    python experiments/benchmarks/throughput.py [--rounds 3] [--steps 12]
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from residency.adapters.peft import lora
from residency.assets import packaged_model
from residency.backbones import CausalLM
from residency.data import StreamData
from residency.domains.packaged import IcdChapters, LicenceClauses, StdlibSignatures
from residency.evaluation import EvaluationSettings
from residency.module import ContinualModule
from residency.objectives import SFT
from residency.record import RunFolder
from residency.stream import StreamSettings, train_stream
from residency.trainers import Trainers
from residency.types import Example, Stage

BATCH, RANK, RATE = 8, 8, 1e-3


def stream_data() -> StreamData:
    """The three domains; one test row each, because scoring is not what is measured."""
    readers = {"medical": IcdChapters, "legal": LicenceClauses, "code": StdlibSignatures}
    return StreamData(domains={k: v(max_test=1, scorers=["nll"]) for k, v in readers.items()}, batch_size=BATCH)


def batches(data: StreamData, tokenizer: Any, *, steps: int) -> list[list[list[Example]]]:
    """[stage][step] -> the examples that `fit` draws there."""
    found = []
    for index, name in enumerate(data.order):
        stage = Stage(index=index, domain=name, stages=3, seed=0, steps=steps, batch_size=BATCH)
        examples = data.examples(stage, tokenizer)
        found.append([[examples[s * BATCH + i] for i in range(BATCH)] for s in range(steps)])
    return found


def pad(examples: Sequence[Example]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, attention mask and labels (-100 where nothing is supervised), padded on the right."""
    rows = [[*e.prompt, *e.completion] for e in examples]
    width = max(map(len, rows))
    ids, labels = torch.zeros(len(rows), width, dtype=torch.long), torch.full((len(rows), width), -100)
    mask = torch.zeros(len(rows), width, dtype=torch.long)
    for i, (row, example) in enumerate(zip(rows, examples, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
        labels[i, len(example.prompt) : len(row)] = torch.tensor(example.completion)
    return ids, mask, labels


def plain_loop(stages: Sequence[Sequence[Sequence[Example]]]) -> dict[str, Any]:
    """Seconds of the loop over all stages, and the last loss."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(packaged_model(), dtype=torch.float32)
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, config).train()
    seconds, loss = 0.0, torch.zeros(())
    for stage in stages:
        leaves = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(leaves, lr=RATE, weight_decay=0.01)
        start = time.perf_counter()
        for examples in stage:
            ids, mask, labels = pad(examples)
            hidden = base.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
            targets = labels[:, 1:]
            at = targets != -100
            loss = F.cross_entropy(base.lm_head(hidden[at]), targets[at])
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(leaves, 1.0)
            optimizer.step()
        seconds += time.perf_counter() - start
    return {"seconds": seconds, "loss": float(loss)}


def framework(data: StreamData, *, steps: int) -> dict[str, Any]:
    """Seconds that `fit` reports for the same training, and the last loss."""
    module = ContinualModule(
        backbone=CausalLM(),
        adapter=lora(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear"),
        objective=SFT(),
        optimizer=partial(torch.optim.AdamW, lr=RATE, weight_decay=0.01),
    )
    options = {"max_steps": steps, "accelerator": "cpu", "gradient_clip_val": 1.0, "enable_progress_bar": False}
    with tempfile.TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        record = train_stream(
            module=module,
            data=data,
            trainers=Trainers(lambda: dict(options)),
            folder=run,
            settings=StreamSettings(cell="benchmark", evaluation=EvaluationSettings(), checkpoint_every_n_steps=0),
        )
        last = run.history()[-1]["loss/task"]
    return {"seconds": record["cost"]["train_seconds"], "loss": last, "layout": module.layout}


def main() -> None:
    """Alternate the arms, print one line per round and the ratio with its spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps per domain")
    options = parser.parse_args()
    data = stream_data()
    stages = batches(data, CausalLM().tokenizer, steps=options.steps)
    tokens = sum(len(e) for stage in stages for step in stage for e in step)
    ratios = []
    for number in range(1, options.rounds + 1):
        loop, fit = plain_loop(stages), framework(data, steps=options.steps)
        ratios.append(loop["seconds"] / fit["seconds"])
        print(
            f"round {number}: loop {loop['seconds']:.1f} s ({tokens / loop['seconds']:.0f} tokens/s), "
            f"fit {fit['seconds']:.1f} s ({tokens / fit['seconds']:.0f} tokens/s), ratio {ratios[-1]:.2f}; "
            f"last loss {loop['loss']:.4f} and {fit['loss']:.4f}",
            flush=True,
        )
    summary = {
        "tokens": tokens,
        "speed_over_plain_loop": statistics.median(ratios),
        "range": [min(ratios), max(ratios)],
    }
    print(json.dumps(summary))


if __name__ == "__main__":
    main()

"""TRL's SFTTrainer on the rows of `measure.py`."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from residency.core.types import Example

__all__ = ["trl_speed"]


def trl_speed(
    path: Path, rows: Sequence[Example], *, batch: int, steps: int, device: torch.device, tiny: bool
) -> dict[str, Any]:
    """Tokens per second (without padding) and peak memory of LoRA r 16; a sentence where TRL is not installed."""
    try:
        from datasets import Dataset
        from peft import LoraConfig
        from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
        from trl import SFTConfig, SFTTrainer
    except ImportError as error:
        return {"reason": f"not installed: {error.name}", "failed": False}
    ends: list[float] = []

    class Clock(TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *args: Any, **options: Any) -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    pairs = [([*row.prompt], [*row.completion]) for row in rows]
    data = [{"input_ids": p + c, "completion_mask": [0] * len(p) + [1] * len(c)} for p, c in pairs]
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32 if tiny else torch.bfloat16)
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        settings = SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=1e-4,
            max_grad_norm=1.0,
            max_length=None,
            completion_only_loss=True,
            use_cpu=device.type == "cpu",
            bf16=not tiny,
            gradient_checkpointing=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            train_sampling_strategy="sequential",
        )
        adapter = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
        tokenizer = AutoTokenizer.from_pretrained(path)
        common = {"args": settings, "train_dataset": Dataset.from_list(data), "processing_class": tokenizer}
        SFTTrainer(model=model, peft_config=adapter, callbacks=[Clock()], **common).train()
    warm = len(ends) // 3
    tokens = sum(len(p) + len(c) for p, c in pairs[(warm + 1) * batch : steps * batch])
    found = {"tokens_per_second": tokens / (ends[-1] - ends[warm])}
    if device.type == "cuda":
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found

"""The packaged stream in the form of the peers' `common.py`, for machines that do not have the peers' folder."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from residency.core.types import Example, Stage
from residency.domains.packaged import IcdChapters, LicenceClauses, StdlibSignatures
from residency.domains.stream_data import StreamData

__all__ = ["Encoded", "load", "parser", "stream"]

Encoded = tuple[list[int], int]
"""Token ids of prompt and response, and where the response begins."""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The peers' options, as far as they are used here."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("model")
    found.add_argument("packages", help="not used: the domains find their own packages")
    found.add_argument("--cache", default="")
    found.add_argument("--steps", type=int, default=8)
    found.add_argument("--batch", type=int, default=8)
    found.add_argument("--lr", type=float, default=1e-3)
    found.add_argument("--rank", type=int, default=8)
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--eval", type=int, default=32)
    found.add_argument("--threads", type=int, default=2)
    found.add_argument("--no-eval", action="store_true")
    return found


def stream(
    options: argparse.Namespace, tokenizer: Any
) -> tuple[None, None, dict[str, list[list[Encoded]]], dict[str, list[Encoded]]]:
    """{domain: [step][slot]} of training rows and {domain: [row]} of test rows, read once and kept in --cache."""
    cache = Path(options.cache) if options.cache else None
    if cache is not None and cache.is_file():
        train, test = json.loads(cache.read_text(encoding="utf-8"))
        return None, None, train, test
    train, test = _read(options, tokenizer)
    if cache is not None:
        cache.write_text(json.dumps([train, test]), encoding="utf-8")
    return None, None, train, test


def _read(
    options: argparse.Namespace, tokenizer: Any
) -> tuple[dict[str, list[list[Encoded]]], dict[str, list[Encoded]]]:
    readers = {"medical": IcdChapters, "legal": LicenceClauses, "code": StdlibSignatures}
    data = StreamData(
        domains={name: reader(max_test=options.eval, scorers=["nll"]) for name, reader in readers.items()},
        batch_size=options.batch,
    )
    train, test = {}, {}
    for index, name in enumerate(data.order):
        stage = Stage(index=index, domain=name, stages=3, seed=0, steps=options.steps, batch_size=options.batch)
        examples = data.examples(stage, tokenizer)
        size = options.batch
        train[name] = [[_encoded(examples[s * size + i]) for i in range(size)] for s in range(options.steps)]
        test[name] = [_encoded(e) for e in data.evaluation_examples(name, "test", tokenizer)]
    return train, test


def _encoded(example: Example) -> Encoded:
    return [*example.prompt, *example.completion], len(example.prompt)


def load(options: argparse.Namespace) -> tuple[None, Any]:
    """The model with LoRA on all linear layers, initial values drawn from the seed."""
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    torch.manual_seed(options.seed)
    config = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return None, get_peft_model(model, config)

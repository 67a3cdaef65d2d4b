"""How fast are states scored, against a loop that pads?

All arms score the same 48 test rows of medical, legal and code, under SmolLM2-135M with LoRA r=8 on all linear layers
and the same values in it, alternating in one process (padded, ours, padded, ours, ...): a busy machine slows all.

The padded loop: rows sorted by length, 16 together, padded on the right, inference mode, the head at supervised
positions only, transformers' default attention, PEFT's own LoRA layers. `--peers FOLDER` adds the evaluation of
`common.py` in that folder, whose loop is the same, as a row of its own.

    python experiments/benchmarks/evaluation.py [--rounds 3] [--threads 2] [--peers FOLDER] [--whole] [--parts]

With `--whole`, all that the quickstart scores after a stage (32 rows per domain; of 16 the labels or a generation): the
loop gives every label a padded row of its own and lets transformers' `generate` write.

With `--parts`, the evaluation of the quickstart (32 rows per domain, 16 of them for labels and for generation) by part.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import residency  # noqa: F401  (before torch: sets how long its threads spin)

# isort: split
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, GenerationConfig

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.batching import make_batch
from residency.core.types import Example
from residency.domains.packaged import IcdChapters, LicenceClauses, StdlibSignatures
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.row_scores import means
from residency.engine.scoring.settings import EvaluationSettings
from residency.objectives import SFT
from residency.scorers.exact import exact_match
from residency.scorers.likelihood import label_is_best
from residency.scorers.overlap import rouge_l

READERS = {"medical": IcdChapters, "legal": LicenceClauses, "code": StdlibSignatures}
ADAPTER: dict[str, Any] = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
ROWS, PADDED_ROWS = 48, 16
SETTINGS = EvaluationSettings(accuracy_rows=16, generation_rows=16)


def stream_data(*, rows: int, scorers: list[str] | None = None) -> StreamData:
    """The three domains; `scorers` instead of those that suit them."""
    return StreamData(domains={name: reader(max_test=rows, scorers=scorers) for name, reader in READERS.items()})


def our_module() -> ContinualModule:
    """Ours, with values in LoRA's B as training would leave them: the update must not be zero."""
    module = ContinualModule(backbone=CausalLM(), adapter=lora(**ADAPTER), objective=SFT())
    module.build(seed=0)
    torch.manual_seed(0)
    for name, leaf in module.adapter.trainable(module.model).items():
        if "lora_B" in name:
            leaf.data.normal_(std=2e-3)
    return module


def plain_model(module: ContinualModule) -> nn.Module:
    """The same model as PEFT and transformers run it by themselves."""
    base = AutoModelForCausalLM.from_pretrained(module.backbone.folder, dtype=torch.float32)  # type: ignore[attr-defined]
    model = get_peft_model(base, LoraConfig(task_type="CAUSAL_LM", **ADAPTER)).eval()
    values = module.adapter.state(module.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in values:
                parameter.copy_(values[name])
    return model


@torch.inference_mode()
def padded(model: Any, rows: Mapping[str, Sequence[Example]]) -> dict[str, float]:
    """{domain: mean nats per completion token}."""
    core, found = model.get_base_model(), {}
    for name, examples in rows.items():
        ordered = sorted(examples, key=len)
        total = count = 0.0
        for first in range(0, len(ordered), PADDED_ROWS):
            group = ordered[first : first + PADDED_ROWS]
            width = max(map(len, group))
            ids = torch.zeros(len(group), width, dtype=torch.long)
            labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
            for i, e in enumerate(group):
                ids[i, : len(e)] = torch.tensor([*e.prompt, *e.completion])
                labels[i, len(e.prompt) : len(e)] = torch.tensor(e.completion)
                mask[i, : len(e)] = 1
            hidden = core.model(input_ids=ids, attention_mask=mask).last_hidden_state[:, :-1]
            targets = labels[:, 1:]
            at = targets != -100
            total += float(F.cross_entropy(core.lm_head(hidden[at]), targets[at], reduction="sum"))
            count += int(at.sum())
        found[name] = total / count
    return found


@torch.inference_mode()
def padded_stage(model: Any, data: StreamData, tokenizer: Any) -> dict[str, dict[str, float]]:
    """{scorer: {domain: mean}} of all that the quickstart scores, as a loop does it."""
    found: dict[str, dict[str, float]] = {"nll": {}, "accuracy": {}, "exact_match": {}}
    for name, domain in data.columns.items():
        examples = data.evaluation_examples(name, "test", tokenizer, competing=SETTINGS.accuracy_rows)
        found["nll"] |= padded(model, {name: [replace(e, alternatives=()) for e in examples]})
        if "accuracy" in domain.scorers:
            best = [_label_wins(model, e) for e in examples if e.alternatives]
            found["accuracy"][name] = sum(best) / len(best)
        if "exact_match" in domain.scorers:
            targets = {row.id: row.completion for row in domain.rows("test")}
            asked = examples[: SETTINGS.generation_rows]
            texts = _written(model, asked, tokenizer)
            hits = [exact_match(text, targets[e.row]) for text, e in zip(texts, asked, strict=True)]
            rouge_l(texts, [targets[e.row] for e in asked])
            found["exact_match"][name] = sum(hits) / len(hits)
    return {scorer: values for scorer, values in found.items() if values}


def _label_wins(model: Any, example: Example) -> bool:
    labels = [replace(example, completion=c, alternatives=()) for c in (example.completion, *example.alternatives)]
    sums = []
    for first in range(0, len(labels), PADDED_ROWS):
        batch = make_batch(labels[first : first + PADDED_ROWS], layout="padded")
        core, width = model.get_base_model(), batch.input_ids.shape[1]
        hidden = core.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).last_hidden_state
        logits = core.lm_head(hidden[batch.target_at // width, batch.target_at % width])
        nll = F.cross_entropy(logits, batch.targets, reduction="none")
        sums.append(torch.zeros(batch.size).index_add(0, batch.target_example, nll))
    return label_is_best(torch.cat(sums))


def _written(model: Any, examples: Sequence[Example], tokenizer: Any) -> list[str]:
    width, end = max(len(e.prompt) for e in examples), tokenizer.eos_token_id
    ids = torch.tensor([[end] * (width - len(e.prompt)) + list(e.prompt) for e in examples])
    mask = torch.tensor([[0] * (width - len(e.prompt)) + [1] * len(e.prompt) for e in examples])
    limit = max(len(e.completion) for e in examples)
    settings = GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=end, pad_token_id=end)
    out = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in out[:, width:].tolist()]


def peer(folder: Path, model: Any, rows: Mapping[str, Sequence[Example]]) -> Callable[[], dict[str, float]]:
    """The evaluation of the peers' scripts on the same rows."""
    spec = importlib.util.spec_from_file_location("peers_common", folder / "common.py")
    assert spec is not None
    assert spec.loader is not None
    common: Any = importlib.util.module_from_spec(spec)
    sys.modules["peers_common"] = common
    spec.loader.exec_module(common)
    test = {name: [([*e.prompt, *e.completion], len(e.prompt)) for e in examples] for name, examples in rows.items()}
    return lambda: dict(zip(test, common.evaluate(model, test, 0, PADDED_ROWS), strict=True))


def timed(run: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result)."""
    start = time.perf_counter()
    result = run()
    return time.perf_counter() - start, result


def compare(module: ContinualModule, *, rounds: int, peers: Path | None) -> dict[str, Any]:
    """Alternate the arms; print one line per round."""
    data = stream_data(rows=ROWS, scorers=["nll"])
    rows = {name: data.evaluation_examples(name, "test", module.backbone.tokenizer) for name in data.columns}
    model = plain_model(module)

    def ours(columns: Sequence[str] | None = None) -> dict[str, float]:
        return means(evaluate(module, data, split="test", settings=SETTINGS, columns=columns))["nll"]

    arms: dict[str, Callable[[], dict[str, float]]] = {"padded": lambda: padded(model, rows)}
    if peers is not None:
        arms["peers"] = peer(peers, model, rows)
    arms["ours"] = ours
    # The first pass of a process is slower: memory is touched for the first time.
    ours(["medical"])
    padded(model, {"medical": rows["medical"]})
    seconds, scores = alternate(arms, rounds)
    apart = max(abs(scores[n][d] - scores["ours"][d]) for n in arms for d in rows)
    return {
        "tokens": sum(len(e) for examples in rows.values() for e in examples),
        "largest_difference_nats": apart,
        **speeds(seconds),
    }


def compare_stage(module: ContinualModule, *, rounds: int) -> dict[str, Any]:
    """The same for all that is scored after a stage."""
    data, tokenizer = stream_data(rows=32), module.backbone.tokenizer
    model = plain_model(module)

    def ours() -> dict[str, dict[str, float]]:
        return means(evaluate(module, data, split="test", settings=SETTINGS))

    ours()
    seconds, scores = alternate({"loop": lambda: padded_stage(model, data, tokenizer), "ours": ours}, rounds)
    return {"scores": scores, **speeds(seconds)}


def alternate(arms: Mapping[str, Callable[[], Any]], rounds: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Seconds of every pass of every arm, and what each gave in the last one."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    scores: dict[str, Any] = {}
    for number in range(1, rounds + 1):
        for name, run in arms.items():
            elapsed, scores[name] = timed(run)
            seconds[name].append(elapsed)
        print(f"round {number}: " + ", ".join(f"{n} {s[-1]:.2f} s" for n, s in seconds.items()), flush=True)
    return seconds, scores


def speeds(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """How many times as fast as each other arm `ours` is: median and range over the rounds."""
    ratios = {n: [a / b for a, b in zip(seconds[n], seconds["ours"], strict=True)] for n in seconds if n != "ours"}
    return {f"speed_over_{n}": {"median": statistics.median(r), "range": [min(r), max(r)]} for n, r in ratios.items()}


def parts(module: ContinualModule) -> dict[str, Any]:
    """Seconds of the quickstart's evaluation: all of it, and by leaving scorers away."""
    whole, plain = stream_data(rows=32), stream_data(rows=32, scorers=["nll"])
    fast = {"nll": plain, "everything": whole}
    found: dict[str, Any] = {}
    for name, data in fast.items():
        for domain in data.columns:
            found[f"tokenise {domain}, {name}"], _ = timed(
                lambda data=data, domain=domain: data.evaluation_examples(  # type: ignore[misc]
                    domain, "test", module.backbone.tokenizer, competing=SETTINGS.accuracy_rows
                )
            )
    for name, data in fast.items():
        for domain in data.columns:
            found[f"score {domain}, {name}"], _ = timed(
                lambda data=data, domain=domain: evaluate(  # type: ignore[misc]
                    module, data, split="test", settings=SETTINGS, columns=[domain]
                )
            )
    return {name: round(value, 3) for name, value in found.items()}


def main() -> None:
    """Compare, and print ratios with their spread."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peers", type=Path, help="folder with the peers' common.py")
    parser.add_argument("--whole", action="store_true", help="all that is scored after a stage")
    parser.add_argument("--parts", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    module = our_module()
    if options.parts:
        print(json.dumps(parts(module), indent=1))
    elif options.whole:
        print(json.dumps(compare_stage(module, rounds=options.rounds)))
    else:
        print(json.dumps(compare(module, rounds=options.rounds, peers=options.peers)))


if __name__ == "__main__":
    main()

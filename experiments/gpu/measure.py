"""One GPU in at most 12 minutes: is it right, how fast is it, how much memory does it take?

    python experiments/gpu/measure.py --out gpu.json                       # one GPU of 80 GB or more
    python experiments/gpu/measure.py --device cpu --tiny --out tiny.json  # the same code here, to see that it runs

Parts, each with its own share of the time; what is done is in the file even if a later part fails or runs out of it:

    kernels     FlexAttention on rows with branches and windows: values and gradients of the segment kernel
    model       a tiny Llama with LoRA: losses and gradients on the device against a CPU in float32
    speed       a random Llama of about 1B parameters: tokens per second and peak memory of a stage (packed rows), by
                LoRA and full, beside TRL's SFTTrainer on the same rows where it is installed, and the memory estimated

Weights are drawn here, nothing is downloaded. Prints a table in Markdown; exit code 1 if a comparison fails.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import residency  # noqa: F401  (before torch: what it sets for its threads and pages is read there)

# isort: split
import torch
from peers import trl_speed
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from residency.adapters import Adapter, Full
from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.backbones.kernels.flex import attend_row
from residency.backbones.packed_attention import How, attend_segments
from residency.core.batching import make_batch
from residency.core.types import Example, Segment, Stage, segment_tokens
from residency.engine.checkpointing import History
from residency.engine.estimate import estimate_stage
from residency.engine.module import ContinualModule
from residency.engine.stage import train_stage
from residency.engine.stage_outline import Device, outlined
from residency.engine.trainers import Trainers
from residency.objectives import SFT
from residency.testing.tiny_models import write_backbone, write_tokenizer

SECONDS = 12 * 60
ROW: tuple[Segment, ...] = ((300,), (90, (40, 20, 150), 25), (260,), (7,))
SIZES = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32}
SIZES |= {"num_key_value_heads": 4, "vocab_size": 32000}
SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "vocab_size": 257}


class Report:
    """Lines of results, written whenever there is one more."""

    def __init__(self, path: Path, *, seconds: float) -> None:
        self.path = path
        self.end = time.monotonic() + seconds
        self.lines: list[dict[str, Any]] = []

    def add(self, part: str, what: str, **values: Any) -> None:
        """Keep a result."""
        self.lines.append({"part": part, "what": what, **values})
        self.path.write_text(json.dumps(self.lines, indent=1), encoding="utf-8")
        print(json.dumps(self.lines[-1]), flush=True)

    @contextmanager
    def part(self, name: str, *, least: float) -> Iterator[None]:
        """A part that is left out when there is less time than it takes, and whose failure stops no other."""
        if time.monotonic() + least > self.end:
            self.add(name, "left out", failed=False, reason="no time left")
            return
        try:
            yield
        except Exception as error:  # whatever a device says is a result
            traceback.print_exc()
            self.add(name, "error", failed=True, reason=f"{type(error).__name__}: {error}"[:500])

    def table(self) -> str:
        """The results as Markdown."""
        rows = ["| part | what | values |", "|---|---|---|"]
        for line in self.lines:
            values = ", ".join(f"{k} {_short(v)}" for k, v in line.items() if k not in ("part", "what"))
            rows.append(f"| {line['part']} | {line['what']} | {values} |")
        return "\n".join(rows)


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def compare_kernels(report: Report, device: torch.device) -> None:
    """Values and gradients of one kernel for a row against the segments one by one."""
    kinds = ((torch.float32, 1e-4), (torch.bfloat16, 2e-2)) if device.type == "cuda" else ((torch.float32, 1e-5),)
    for (dtype, tolerance), window, heads in product(kinds, (None, 50), ((8, 8), (8, 2), (6, 2))):
        error = _kernel_error(device, dtype, window, heads)
        what = f"flex {str(dtype)[6:]}, window {window}, heads {heads[0]}/{heads[1]}"
        report.add("kernels", what, error=error, gradients=device.type == "cuda", failed=error > tolerance)


def _kernel_error(device: torch.device, dtype: torch.dtype, window: int | None, heads: tuple[int, int]) -> float:
    """The largest difference of outputs and gradients, over the largest of their values."""
    torch.manual_seed(0)
    tokens = sum(map(segment_tokens, ROW))
    shapes = [(1, h, tokens, 64) for h in (heads[0], *heads[1:], *heads[1:])]
    leaves = [torch.randn(s, device=device, dtype=dtype).requires_grad_(device.type == "cuda") for s in shapes]
    weights = torch.randn(shapes[0], device=device, dtype=dtype)
    ours = attend_row(*leaves, ROW, window=window, scale=None)
    segments = attend_segments(*leaves, ROW, How(window=window))
    pairs = [(ours.detach(), segments.detach())]
    if device.type == "cuda":  # torch computes no gradients of FlexAttention on a CPU
        both = (torch.autograd.grad((out * weights).sum(), leaves) for out in (ours, segments))
        pairs += zip(*both, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)


def rows_of(count: int, *, longest: int, seed: int, vocabulary: int = 257) -> list[Example]:
    """Random rows of unequal length, prompts and completions."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(most: int) -> tuple[int, ...]:
        length = int(torch.randint(most // 2, most, (1,), generator=draw))
        return tuple(torch.randint(1, vocabulary, (length,), generator=draw).tolist())

    half = longest // 2
    return [Example.of(domain="a", row=str(i), prompt=tokens(half), completion=tokens(half)) for i in range(count)]


def compare_model(report: Report, device: torch.device, folder: Path) -> None:
    """Losses and gradients of a tiny model on the device against the CPU."""
    backbone = CausalLM(path=str(write_backbone(folder / "tiny", layers=2, width=64)))
    batch = make_batch(rows_of(6, longest=120, seed=0), layout="packed")
    found: dict[str, list[Tensor]] = {}
    for where in (torch.device("cpu"), device):
        torch.manual_seed(0)
        model = lora(r=4, target_modules="all-linear", init_lora_weights=False).attach(backbone.load()).to(where)
        nll = backbone.nll(model.train(), batch.to(where))
        leaves = [p for p in model.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(nll.sum(), leaves)
        found[str(where)] = [t.detach().cpu() for t in (nll, *gradients)]
    pairs = zip(found[str(device)], found["cpu"], strict=True)
    error = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-12)) for a, b in pairs)
    report.add("model", "losses and gradients against a CPU, float32", error=error, failed=error > 1e-3)


class Rows:
    """What `train_stage` and an estimate ask of a stream's data."""

    num_workers = 0

    def __init__(self, batch: int, micro: int, rows: list[Example]) -> None:
        self.batch_size, self.micro, self.rows = batch, micro, rows

    def examples(self, stage: Stage, tokenizer: Any) -> list[Example]:
        """All of them, in order."""
        return self.rows

    def evaluation_examples(self, *args: Any, **options: Any) -> list[Example]:
        """None is held out."""
        return []

    def micro_batch(self, *, devices: int, batch: int | None = None) -> int:
        """Examples of a forward pass."""
        return self.micro


def write_large(folder: Path, *, tiny: bool) -> Path:
    """A Llama of about 1B parameters with random weights (seconds on a GPU, a minute on a CPU)."""
    sizes = {
        **(SMALL if tiny else SIZES),
        "num_key_value_heads": 2 if tiny else 4,
        "vocab_size": 257 if tiny else 32000,
    }
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if tiny else torch.bfloat16)
    try:
        model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, eos_token_id=0, pad_token_id=0, **sizes))
    finally:
        torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    write_tokenizer(folder)
    return folder


def measure_speed(report: Report, device: torch.device, path: Path, *, tiny: bool) -> None:
    """Tokens per second and memory of a stage."""
    steps, batch, longest = (3, 4, 60) if tiny else (25, 16, 1024)
    rows = rows_of(steps * batch, longest=longest, seed=1)
    precision = "32-true" if tiny else "bf16-mixed"
    adapters: dict[str, Callable[[], Adapter]] = {
        "LoRA r 16": lambda: lora(r=16, lora_alpha=32, target_modules="all-linear"),
        "full": Full,
    }
    for name, make in adapters.items():
        with report.part("speed", least=0 if tiny else 90):
            data: Any = Rows(batch, batch, rows)
            found = _stage(make, data, path, device, precision=precision, steps=steps, tiny=tiny)
            report.add("speed", f"residency, {name}", **found)
    with report.part("speed", least=0 if tiny else 90):
        peer = trl_speed(path, rows, batch=batch, steps=steps, device=device, tiny=tiny)
        report.add("speed", "TRL's SFTTrainer, LoRA r 16", **peer)


def _stage(
    make: Callable[[], Adapter], data: Any, path: Path, device: torch.device, *, precision: str, steps: int, tiny: bool
) -> dict[str, Any]:
    dtype: Any = "float32" if tiny else "bfloat16"
    # Full fine-tuning moves float32 weights; an adapter is float32 on a base of bfloat16.
    backbone = CausalLM(path=str(path), dtype="float32" if make is Full else dtype)
    optimizer: Any = lambda leaves: torch.optim.AdamW(leaves, lr=1e-4)  # noqa: E731
    made = {"backbone": backbone, "objective": SFT(), "optimizer": optimizer}
    stage = Stage(index=0, domain="a", seed=0, kind="generative", steps=steps, batch_size=data.batch_size, stages=1)
    where = Device(kind=device.type, precision=precision, ranks=1)
    plan = ContinualModule(adapter=make(), **made)
    told = estimate_stage(plan, data, stage, outlined(plan, where), where, micro=data.micro).memory
    module = ContinualModule(adapter=make(), **made)
    module.build(seed=0)
    options = {"accelerator": "gpu" if device.type == "cuda" else "cpu", "devices": 1, "precision": precision}
    trainers = Trainers(lambda: {**options, "gradient_clip_val": 1.0, "enable_progress_bar": False})
    seconds: list[float] = []
    history = History(stage=stage, every_n_steps=1, offset=0, write=lambda line: seconds.append(line["seconds"]))
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        common = {"folder": Path(folder), "history": history, "observers": [], "checkpoint_every_n_steps": 0}
        facts = train_stage(module=module, data=data, trainers=trainers, stage=stage, **common)  # type: ignore[arg-type]
    warm = len(seconds) // 3
    tokens = facts["batch_tokens"] * (len(seconds) - warm) / len(seconds)
    found = {"tokens_per_second": tokens / sum(seconds[warm:]), "estimated_gib": told.peak / 2**30}
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        found |= {"peak_gib": peak, "within_15_percent": abs(found["estimated_gib"] / peak - 1) <= 0.15}
        stays = next(module.model.parameters()).device.type == "cuda"
        found |= {"stays_on_device": stays, "failed": not stays}
        torch.cuda.empty_cache()
    return found


def main() -> int:
    """All parts."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="tiny models everywhere: only to see that it runs")
    parser.add_argument("--out", type=Path, required=True, help="JSON file of the results")
    options = parser.parse_args()
    report, device = Report(options.out, seconds=SECONDS), torch.device(options.device)
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    report.add("facts", name, torch=torch.__version__)
    with tempfile.TemporaryDirectory() as folder:
        with report.part("kernels", least=60):
            compare_kernels(report, device)
        with report.part("model", least=30):
            compare_model(report, device, Path(folder))
        measure_speed(report, device, write_large(Path(folder) / "large", tiny=options.tiny), tiny=options.tiny)
    print(report.table())
    return int(any(line.get("failed") for line in report.lines))


if __name__ == "__main__":
    sys.exit(main())

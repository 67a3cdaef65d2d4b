"""Where does a training step go? The share of matrix products, and their rate against the library's own.

    python experiments/benchmarks/step_profile.py [--steps 3] [--threads 2]

Steps of the packaged stream (SmolLM2-135M, LoRA r=8 on all linear layers, 8 rows) in a plain loop under torch's
profiler, by domain. The rate is that of large square products in the same process, before and after. Everything runs in
one lane, since the profiler sees one thread's operations; with --threads 1 as the lane of a two-thread run does.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import residency  # noqa: F401  (before torch: sets how long its threads spin)

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

sys.path.insert(0, str(Path(__file__).parent))
import ours
import packaged_rows

from residency.backbones import CausalLM
from residency.core.assets.cache import packaged_model
from residency.core.types import Stage

PRODUCTS = ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::addmm_")
ATTENTION = ("attention",)


def rate(size: int = 1024, repeats: int = 12) -> float:
    """GFLOP/s of square products."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    one @ other
    start = time.perf_counter()
    for _ in range(repeats):
        one @ other
    return repeats * 2 * size**3 / (time.perf_counter() - start) / 1e9


def shares(found: Any) -> dict[str, float]:
    """Of the time on the CPU: matrix products, attention, and the rest by name, largest first."""
    own = {event.key: float(event.self_cpu_time_total) for event in found}
    total = sum(own.values())
    products = sum(own.get(name, 0.0) for name in PRODUCTS)
    attention = sum(value for name, value in own.items() if any(part in name for part in ATTENTION))
    rest = {n: v for n, v in own.items() if n not in PRODUCTS and not any(part in n for part in ATTENTION)}
    top = sorted(rest.items(), key=lambda item: -item[1])[:6]
    return {name: value / total for name, value in [("products", products), ("attention", attention), *top]}


def main() -> None:
    """Print one line per domain."""
    first = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    first.add_argument("--steps", type=int, default=3)
    first.add_argument("--threads", type=int, default=2)
    chosen = first.parse_args()
    words = [str(packaged_model()), ".", "--steps", str(chosen.steps + 1), "--threads", str(chosen.threads)]
    options = packaged_rows.parser(__doc__).parse_args(words)
    torch.set_num_threads(options.threads)
    _, _, train, _ = packaged_rows.stream(options, CausalLM(path=options.model).tokenizer)
    module = ours.build(options, packaged_rows, {})
    module.backbone.lanes = 1  # type: ignore[attr-defined]
    rows = ours.Rows(train, options.batch)
    for index, name in enumerate(train):
        where: dict[str, Any] = {"index": index, "domain": name, "stages": len(train), "seed": 0}
        ours.bare(module, rows, Stage(**where, steps=1, batch_size=options.batch))
        before = rate()
        with profile(activities=[ProfilerActivity.CPU], with_flops=True) as profiler:
            ours.bare(module, rows, Stage(**where, steps=chosen.steps, batch_size=options.batch))
        events = profiler.key_averages()
        flops = sum(event.flops or 0 for event in events)
        seconds = sum(event.self_cpu_time_total for event in events if event.key in PRODUCTS) / 1e6
        shown = ", ".join(f"{key.removeprefix('aten::')} {share:.1%}" for key, share in shares(events).items())
        print(
            f"{name}: {shown}; products at {flops / seconds / 1e9:.0f} GFLOP/s, library {before:.0f} and {rate():.0f}"
        )


if __name__ == "__main__":
    main()

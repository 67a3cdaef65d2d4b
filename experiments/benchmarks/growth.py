"""How do time and memory grow with domains, cells, rows, model size and workers?

    python experiments/benchmarks/growth.py [--parts domains cells rows layers workers]

Everything but `workers` runs on a small model with random weights: growth is what is asked, not seconds. Each figure
is the median of `--rounds` runs that alternate between the sizes. Prints one JSON object per part.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

WORDS = [a + b for a in ("ka", "lo", "mi", "nu", "re", "so") for b in ("da", "fe", "ga", "ti", "vo", "za")]
REPOSITORY = Path(__file__).parents[2]


def small_model(folder: Path, *, layers: int, width: int = 64) -> Path:
    """A random Llama with the packaged tokenizer; its folder."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from residency.core.assets.cache import packaged_model

    if not (folder / "config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(packaged_model())
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=3 * width,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return folder


def write_rows(file: Path, count: int, *, seed: int) -> str:
    """Rows of random words; the file's name."""
    draw = random.Random(seed)
    lines = ({"prompt": " ".join(draw.choices(WORDS, k=12)), "completion": draw.choice(WORDS)} for _ in range(count))
    file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return str(file)


def config(folder: Path, *, domains: int, test_rows: int = 32, steps: int = 4, layers: int = 2) -> dict[str, Any]:
    """A run on such domains."""
    made = {
        f"d{k}": {
            "class_path": "residency.domains.Jsonl",
            "init_args": {
                "train": write_rows(folder / f"train{k}.jsonl", 8 * steps + 64, seed=k),
                "test": write_rows(folder / f"test{k}-{test_rows}.jsonl", test_rows, seed=1000 + k),
                "scorers": ["nll"],
            },
        }
        for k in range(domains)
    }
    return {
        "name": "growth",
        "seed_everything": 0,
        "model": {
            "backbone": {
                "class_path": "residency.backbones.CausalLM",
                "init_args": {"path": str(small_model(folder / f"model{layers}", layers=layers))},
            },
            "adapter": {"class_path": "residency.adapters.Peft", "init_args": {"config": LORA}},
            "objective": {"class_path": "residency.objectives.SFT"},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-3}},
        },
        "data": {"domains": made, "batch_size": 8},
        "trainer": {"max_steps": steps, "accelerator": "cpu"},
    }


LORA = {"class_path": "peft.LoraConfig", "init_args": {"r": 8, "lora_alpha": 16, "target_modules": "all-linear"}}


def medians(run: Callable[[int], float], sizes: Sequence[int], rounds: int) -> dict[int, float]:
    """{size: median of what `run` gives}, the sizes alternating."""
    found: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            found[size].append(run(size))
    return {size: round(statistics.median(values), 3) for size, values in found.items()}


def timed(words: Sequence[str], *, inside: bool = True) -> float:
    """Seconds of a command of ours: in this process, so that no import is counted, or as a process of its own."""
    from residency.__main__ import main

    start = time.perf_counter()
    if inside:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = main([*words])
    else:
        code = subprocess.run([sys.executable, "-m", "residency", *words], capture_output=True, check=False).returncode
    if code:
        raise SystemExit(f"residency {' '.join(words)} ended with {code}")
    return time.perf_counter() - start


def domains(folder: Path, rounds: int) -> Mapping[str, Any]:
    """Seconds of a whole stream of T domains: T stages are trained and (T + 1) T columns scored."""

    def run(count: int) -> float:
        file = folder / f"domains{count}.yaml"
        file.write_text(yaml.safe_dump(config(folder, domains=count)), encoding="utf-8")
        with tempfile.TemporaryDirectory() as out:
            return timed(["fit", "--config", str(file), "--run_dir", out])

    run(2)
    return {"seconds": medians(run, (2, 4, 8, 16), rounds)}


def cells(folder: Path, rounds: int) -> Mapping[str, Any]:
    """Seconds to plan a study of so many cells (strengths × 2 seeds) over three domains; nothing is trained."""
    (folder / "base.yaml").write_text(yaml.safe_dump(config(folder, domains=3)), encoding="utf-8")

    def run(count: int) -> float:
        ewc = {"class_path": "residency.mitigations.EWC"}
        axis = {
            f"ewc{k}": {"model.mitigations.ewc": {**ewc, "init_args": {"strength": 1.0 + k}}} for k in range(count // 2)
        }
        study = {"name": "plan", "base": "base.yaml", "axes": {"mitigation": axis}, "seeds": [0, 1]}
        file = folder / f"study{count}.yaml"
        file.write_text(yaml.safe_dump(study), encoding="utf-8")
        with tempfile.TemporaryDirectory() as out:
            return timed(["sweep", str(file), "--dry-run", "--study_dir", out])

    run(2)
    return {"seconds": medians(run, (8, 32), rounds)}


def rows(folder: Path, rounds: int) -> Mapping[str, Any]:
    """Seconds to score one column of so many rows."""
    from residency.adapters.peft import lora
    from residency.backbones import CausalLM
    from residency.domains import Jsonl
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule
    from residency.engine.scoring.evaluation import evaluate
    from residency.engine.scoring.settings import EvaluationSettings
    from residency.objectives import SFT

    path = str(small_model(folder / "model2", layers=2))
    module = ContinualModule(backbone=CausalLM(path=path), adapter=lora(r=8), objective=SFT())
    module.build(seed=0)
    train = write_rows(folder / "rows-train.jsonl", 64, seed=1)

    def run(count: int) -> float:
        test = write_rows(folder / f"rows-{count}.jsonl", count, seed=2)
        domain = Jsonl(train=train, test=test, scorers=["nll"], max_test=None)
        data = StreamData(domains={"d": domain})
        data.evaluation_examples("d", "test", module.backbone.tokenizer)
        start = time.perf_counter()
        evaluate(module, data, split="test", settings=EvaluationSettings())
        return time.perf_counter() - start

    run(64)
    return {"seconds": medians(run, (256, 1024, 4096), rounds)}


def layers(folder: Path, rounds: int) -> Mapping[str, Any]:
    """Seconds of twelve steps on models of so many layers, scoring excluded."""

    def run(count: int) -> float:
        written = config(folder, domains=1, test_rows=1, steps=12, layers=count)
        file = folder / f"layers{count}.yaml"
        file.write_text(yaml.safe_dump(written), encoding="utf-8")
        with tempfile.TemporaryDirectory() as out:
            timed(["fit", "--config", str(file), "--run_dir", out])
            record = json.loads((Path(out) / "results.json").read_text(encoding="utf-8"))
        return float(record["cost"]["train_seconds"])

    run(2)
    return {"train_seconds": medians(run, (2, 4, 8, 16, 32), rounds)}


def workers(folder: Path, rounds: int) -> Mapping[str, Any]:
    """Seconds of four cells on the packaged model: one worker with two threads against two with one each."""
    base = yaml.safe_load((REPOSITORY / "experiments/mitigations/base.yaml").read_text(encoding="utf-8"))
    base["model"]["adapter"] = str(REPOSITORY / "configs/adapter/lora.yaml")
    base["data"]["domains"].pop("code")
    base["trainer"]["max_steps"] = 4
    (folder / "packaged.yaml").write_text(yaml.safe_dump(base), encoding="utf-8")
    study = {"name": "workers", "base": "packaged.yaml", "axes": {"mitigation": {"none": {}}}, "seeds": [0, 1, 2, 3]}
    file = folder / "workers.yaml"
    file.write_text(yaml.safe_dump(study), encoding="utf-8")

    def run(count: int) -> float:
        with tempfile.TemporaryDirectory() as out:
            words = ["sweep", str(file), "--study_dir", out, "--workers", str(count), "--threads", str(2 // count)]
            return timed(words, inside=False)

    return {"seconds": medians(run, (1, 2), rounds)}


PARTS = {part.__name__: part for part in (domains, cells, rows, layers, workers)}


def main() -> None:
    """Print every part's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*PARTS], default=[*PARTS])
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    for name in options.parts:
        with tempfile.TemporaryDirectory() as folder:
            print(json.dumps({name: PARTS[name](Path(folder), options.rounds)}), flush=True)


if __name__ == "__main__":
    main()

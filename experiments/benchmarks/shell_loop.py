"""How long does the quickstart study take, against a shell loop over TRL runs that gives the same table?

    python experiments/benchmarks/shell_loop.py --trl PYTHON [--threads 2]

The study: `residency sweep configs/studies/quickstart.yaml` in a folder of its own, from the start of the process to
its end, report included. The loop: one process per stage (`trl_stage.py`), each of which loads the model, trains one
domain, saves the adapter and scores all domains. One chain of three stages and row 0 are run; the loop's time is row 0
and as many chains as the study has cells. What its mitigations would cost (EWC's Fisher estimates, for one) is left
out, in the loop's favour. Rows, first values, batches and what is scored are the study's; the scores of the chain's
last stage are printed beside those of the study's cell without a mitigation.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from residency.adapters.peft import lora
from residency.backbones import CausalLM
from residency.core.assets.cache import packaged_model
from residency.core.types import Example, Stage
from residency.domains.packaged import IcdChapters, LicenceClauses, StdlibSignatures
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.objectives import SFT

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parents[1] / "configs"
READERS = {"medical": IcdChapters, "legal": LicenceClauses, "code": StdlibSignatures}


def rows(base: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """What `trl_stage.py` reads: token ids of the study's training and test rows."""
    domains = {n: READERS[n](**d.get("init_args", {})) for n, d in base["data"]["domains"].items()}
    batch, steps = base["data"]["batch_size"], base["trainer"]["max_steps"]
    data, tokenizer = StreamData(domains=domains, batch_size=batch), CausalLM().tokenizer
    labels, written = base["evaluation"]["accuracy_rows"], base["evaluation"]["generation_rows"]
    train, test = {}, {}
    for index, name in enumerate(data.order):
        stage = Stage(index=index, domain=name, stages=len(data.order), seed=seed, steps=steps, batch_size=batch)
        examples = data.examples(stage, tokenizer)
        train[name] = [(examples[i].prompt, examples[i].completion) for i in range(steps * batch)]
        texts = {row.id: row.completion for row in domains[name].rows("test")}
        generates = "exact_match" in domains[name].scorers
        found = data.evaluation_examples(name, "test", tokenizer, competing=labels)
        test[name] = [_test_row(e, texts[e.row] if generates and i < written else None) for i, e in enumerate(found)]
    return {"train": train, "test": test, "batch": batch}


def _test_row(example: Example, target: str | None) -> dict[str, Any]:
    labels = [example.completion, *example.alternatives] if example.alternatives else []
    return {"prompt": example.prompt, "completion": example.completion, "labels": labels, "target": target}


def first_values(folder: Path, seed: int) -> None:
    """The adapter the study begins with, as PEFT saves it."""
    module = ContinualModule(
        backbone=CausalLM(), adapter=lora(r=8, lora_alpha=16, target_modules="all-linear"), objective=SFT()
    )
    module.build(seed=seed)
    model: Any = module.model
    model.save_pretrained(folder)


def timed(words: list[str], log: Path) -> float:
    """Seconds of a process.

    Raises:
        RuntimeError: It failed.
    """
    start = time.perf_counter()
    with log.open("w") as out:
        ended = subprocess.run(
            words, stdout=out, stderr=subprocess.STDOUT, env={**os.environ, "WANDB_MODE": "disabled"}, check=False
        )
    if ended.returncode:
        raise RuntimeError(f"{' '.join(words)} failed:\n{log.read_text()[-2000:]}")
    return time.perf_counter() - start


def chain(options: argparse.Namespace, order: list[str], folder: Path) -> list[float]:
    """Seconds of row 0 and of every stage of one stream."""
    words = [str(options.trl), str(HERE / "trl_stage.py"), str(packaged_model()), str(folder / "rows.json")]
    threads = ["--threads", str(options.threads)]
    start = ["--after", str(folder / "start")]
    seconds = [timed([*words, str(folder / "0"), *start, *threads], folder / "0.log")]
    print(f"row 0: {seconds[0]:.1f} s", flush=True)
    for k, name in enumerate(order, 1):
        after = ["--after", str(folder / str(k - 1))] if k > 1 else start
        seconds.append(timed([*words, str(folder / str(k)), "--domain", name, *after, *threads], folder / f"{k}.log"))
        print(f"{name}: {seconds[-1]:.1f} s", flush=True)
    return seconds


def main() -> None:
    """Run both; print their seconds, the ratio and the last scores."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, required=True, help="python of an environment that has trl")
    parser.add_argument("--threads", type=int, default=2, help="of the loop's processes")
    options = parser.parse_args()
    study = yaml.safe_load((CONFIGS / "studies" / "quickstart.yaml").read_text(encoding="utf-8"))
    base = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text(encoding="utf-8"))
    cells = len(study["axes"]["mitigation"]) * len(study["seeds"])
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = rows(base, study["seeds"][0])
        (folder / "rows.json").write_text(json.dumps(found), encoding="utf-8")
        order = list(found["train"])
        first_values(folder / "start", study["seeds"][0])
        loop = chain(options, order, folder)
        sweep = [sys.executable, "-m", "residency", "sweep", str(CONFIGS / "studies" / "quickstart.yaml")]
        ours = timed([*sweep, "--study_dir", str(folder / "study")], folder / "study.log")
        whole = loop[0] + cells * sum(loop[1:])
        print(f"study {ours:.0f} s, loop {whole:.0f} s ({cells} chains): {ours / whole:.2f} of the loop's time")
        theirs = json.loads((folder / str(len(order)) / "scores.json").read_text(encoding="utf-8"))
        print(json.dumps({"loop_seconds": loop, "study_seconds": ours, "ratio": ours / whole, "loop": theirs}))
        result = json.loads((folder / "study/cells/none-s0/results.json").read_text(encoding="utf-8"))
        print(
            json.dumps({"study": {n: dict(zip(order, m["R"][-1], strict=True)) for n, m in result["scores"].items()}})
        )


if __name__ == "__main__":
    main()

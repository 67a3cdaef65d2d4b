"""Training tokens of a large domain: as Python objects, and mapped from the file that the first process writes.

    python experiments/benchmarks/token_memory.py --rows 100000

Three processes, one after another, read the same rows, count their tokens as `fit` does and go through one epoch:
`objects` encodes every row when it is counted and again when it is read, and keeps it; `first` writes the file;
`mapped` finds it. `mebibytes` are what tokens add to memory that is the process's own; the pages of a mapped file are
everybody's. The examples are compared by a digest of all their fields.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from doctor_rows import write_rows

from residency.backbones import CausalLM
from residency.core.types import Stage
from residency.domains import training_tokens
from residency.domains.stream_data import StreamData
from residency.domains.table import Table


def own_mebibytes() -> float:
    """Memory of this process that no file backs."""
    gc.collect()
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) / 1024


def measure(arm: str, folder: Path, model: str) -> dict[str, object]:
    """One process.

    Args:
        arm: `objects`, `first` or `mapped`.
        folder: Of the rows and of the cache.
        model: Whose tokenizer.
    """
    tokenizer = CausalLM(path=model).tokenizer
    os.environ["RESIDENCY_CACHE"] = str(folder / "cache")
    if arm == "objects":
        training_tokens.MANY = 10**9
    domain = Table(train=str(folder / "train.jsonl"), test=str(folder / "test.jsonl"), max_validation=0)
    rows = len(domain.rows("train"))
    domain.fingerprint()
    data = StreamData(domains={"a": domain}, batch_size=1)
    stage = Stage(index=0, domain="a", stages=1, seed=0, steps=rows, batch_size=1)
    before, start = own_mebibytes(), time.process_time()
    examples = data.examples(stage, tokenizer)
    counted = time.process_time()
    for position in range(len(examples)):
        examples[position]
    epoch = time.process_time()
    memory = own_mebibytes() - before
    digest = hashlib.sha256()
    for position in range(0, len(examples), 7):
        digest.update(repr(examples[position]).encode())
    return {
        "arm": arm,
        "rows": rows,
        "count_seconds": round(counted - start, 2),
        "epoch_seconds": round(epoch - counted, 2),
        "mebibytes": round(memory, 1),
        "file_mebibytes": round(sum(f.stat().st_size for f in folder.glob("cache/tokens/*.safetensors")) / 2**20, 1),
        "digest": digest.hexdigest(),
    }


def main() -> None:
    """Print one line of JSON per process, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--model", default="packaged", help="whose tokenizer")
    parser.add_argument("--arm", choices=("objects", "first", "mapped"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.arm, options.folder, options.model)))
        return
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_rows(folder / "train.jsonl", rows=options.rows, seed="t")
        write_rows(folder / "test.jsonl", rows=100, seed="e")
        words = [sys.executable, __file__, "--folder", place, "--model", options.model, "--arm"]
        arms = {}
        for arm in ("objects", "first", "mapped"):
            arms[arm] = json.loads(subprocess.run([*words, arm], check=True, capture_output=True, text=True).stdout)
            print(json.dumps(arms[arm]), flush=True)
    objects, mapped = arms["objects"], arms["mapped"]
    assert len({one["digest"] for one in arms.values()}) == 1, "the examples differ"
    took = {arm: one["count_seconds"] + one["epoch_seconds"] for arm, one in arms.items()}
    print(
        json.dumps(
            {
                "memory": round(mapped["mebibytes"] / objects["mebibytes"], 3),
                "time_first": round(took["first"] / took["objects"], 3),
                "time_mapped": round(took["mapped"] / took["objects"], 3),
            }
        )
    )


if __name__ == "__main__":
    main()

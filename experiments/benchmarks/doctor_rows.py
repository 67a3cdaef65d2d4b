"""What the doctor costs on many short rows: processor time and peak memory of the whole command.

    python experiments/benchmarks/doctor_rows.py --rows 1000000

Rows are sentences of nine invented words, no two alike, with one of three labels; a thousandth as many test rows, of
which the last ten are training rows with one word changed. The command runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_SYLLABLES = [a + b for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "u", "ar", "en")]
_LABELS = ("good", "bad", "neither")


def write_rows(path: Path, *, rows: int, seed: str, also: list[str] | None = None) -> list[str]:
    """Write labelled rows as JSON Lines; the prompts of the last ten."""
    draw = random.Random(seed)
    words = ["".join(draw.choices(_SYLLABLES, k=3)) for _ in range(5000)]
    last: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt = f"{' '.join(draw.choices(words, k=9))} {seed}{i}"
            file.write(json.dumps({"prompt": prompt, "completion": _LABELS[i % 3]}) + "\n")
            last = [*last, prompt][-10:]
        for i, prompt in enumerate(also or []):
            file.write(json.dumps({"prompt": f"{prompt} too", "completion": _LABELS[i % 3]}) + "\n")
    return last


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--model", default="packaged", help="whose tokenizer")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        train, test, found = folder / "train.jsonl", folder / "test.jsonl", folder / "found.json"
        last = write_rows(train, rows=options.rows, seed="t")
        write_rows(test, rows=max(100, options.rows // 1000), seed="e", also=last)
        words = [sys.executable, "-m", "residency", "doctor", str(train), str(test), f"--model={options.model}"]
        start = time.perf_counter()
        done = subprocess.run([*words, f"--json={found}"], stdout=subprocess.DEVNULL, check=False)
        seconds = time.perf_counter() - start
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        checks = {one["check"]: one["count"] for one in json.loads(found.read_text())["findings"]}
    figures = {
        "rows": options.rows,
        "exit": done.returncode,
        "wall_seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "peak_gib": round(used.ru_maxrss / 2**20, 2),
        "findings": checks,
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()

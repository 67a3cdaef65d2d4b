"""Training rows of a labelled domain as pairs: the right label rather than another one, drawn with a seed.

    python experiments/on_policy/pairs.py ../shared/data/olora/agnews experiments/on_policy/agnews_pairs

Validation and test rows are copied as they are. The rows have the licence of your copy; none of them is committed.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    rows = [json.loads(line) for line in (given.source / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    labels = sorted({row["completion"] for row in rows})
    draw = random.Random(given.seed)
    given.target.mkdir(parents=True, exist_ok=True)
    with (given.target / "train.jsonl").open("w", encoding="utf-8") as file:
        for row in rows:
            wrong = draw.choice([label for label in labels if label != row["completion"]])
            pair = {"prompt": row["prompt"], "chosen": row["completion"], "rejected": wrong}
            file.write(json.dumps(pair, ensure_ascii=False) + "\n")
    for split in ("validation", "test"):
        shutil.copy(given.source / f"{split}.jsonl", given.target / f"{split}.jsonl")


if __name__ == "__main__":
    main()

"""Old-task loss at the same new-task score, from the records of a study: the table of README.md.

    python experiments/on_policy/table.py studies/on_policy [more folders of studies ...]

Per objective and seed the path start -> low rate -> high rate is followed to the first point at which the new task's
accuracy reaches a level, by linear interpolation; an objective that does not reach the level with every seed gives no
figure there. All differences are to the state in which every objective starts. The last line: how much of forgetting
KL(start || end) on the new task explains.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from residency.report.evidence.decision import Claim, Evidence, decide

OLD, NEW, BASELINE, RATES = "dbpedia", "agnews", "sft", ("low", "high")


@dataclass(frozen=True, kw_only=True)
class Point:
    """One state.

    Args:
        accuracy: Of the new task.
        old_accuracy: Lost on the old task since the start, share of rows.
        old_nats: Forgotten of the old task, nats per token.
        kl: KL(start || here) at the answers of the new task, nats per token.
    """

    accuracy: float
    old_accuracy: float = 0.0
    old_nats: float = 0.0
    kl: float = 0.0

    def towards(self, other: Point, share: float) -> Point:
        """Between this and another one."""
        pairs = zip(astuple(self), astuple(other), strict=True)
        names = ("accuracy", "old_accuracy", "old_nats", "kl")
        return Point(**{name: a + share * (b - a) for name, (a, b) in zip(names, pairs, strict=True)})


Paths = dict[str, dict[int, list[Point]]]


def read(folders: Sequence[Path]) -> Paths:
    """{objective: {seed: start, low, high}}."""
    records = [
        json.loads(file.read_text()) for folder in folders for file in sorted(folder.glob("cells/*/results.json"))
    ]
    found: Paths = defaultdict(dict)
    by_rate = {(r["axes"]["objective"], r["seed"], r["axes"]["rate"]): r for r in records if r["status"] == "done"}
    for objective, seed, rate in by_rate:
        if rate != RATES[0] or (objective, seed, RATES[1]) not in by_rate:
            continue
        low, high = (by_rate[objective, seed, rate] for rate in RATES)
        old, new = low["domains"].index(OLD), low["domains"].index(NEW)
        found[objective][seed] = [
            Point(accuracy=low["scores"]["accuracy"]["R"][1][new]),
            _end(low, old, new),
            _end(high, old, new),
        ]
    return dict(found)


def _end(record: Mapping[str, Any], old: int, new: int) -> Point:
    accuracy, nll = (record["scores"][name]["R"] for name in ("accuracy", "nll"))
    return Point(
        accuracy=accuracy[2][new],
        old_accuracy=accuracy[1][old] - accuracy[2][old],
        old_nats=nll[2][old] - nll[1][old],
        kl=record["inside"][2]["kl"]["columns"][NEW],
    )


def at_level(path: Sequence[Point], level: float) -> Point | None:
    """Where a path first reaches an accuracy; `None` if it does not."""
    if path[0].accuracy >= level:
        return path[0]
    for here, there in pairwise(path):
        if there.accuracy >= level:
            return here.towards(there, (level - here.accuracy) / (there.accuracy - here.accuracy))
    return None


def _reached(seeds: Mapping[int, Sequence[Point]], level: float) -> dict[int, Point]:
    found = {seed: at_level(path, level) for seed, path in seeds.items()}
    return {seed: point for seed, point in found.items() if point is not None}


def judged(matched: Mapping[tuple[float, str], Mapping[int, Point]]) -> dict[tuple[float, str], Evidence]:
    """Nats forgotten against SFT at every level, paired by seed, all corrected: the report's decision."""
    claims = {}
    for (level, name), points in matched.items():
        plain = matched[level, BASELINE]
        if name == BASELINE or not points or points.keys() != plain.keys():
            continue
        scores = tuple(plain[seed].old_nats - point.old_nats for seed, point in points.items())
        claims[level, name] = Claim(
            axis="objective", a=name, b=BASELINE, metric="forgetting", scorer="nll", columns=(OLD,),
            settings=1, scores=scores, parts=None,
        )  # fmt: skip
    return dict(zip(claims, decide(list(claims.values())), strict=True))


def told(evidence: Evidence | None) -> str:
    """The decision in a cell of a table."""
    if evidence is None:
        return ""
    low, high = evidence.found.low, evidence.found.high
    return f"{evidence.word}: {evidence.estimate:+.3f} [{low:+.3f}, {high:+.3f}], p {evidence.p:.2f}"


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over the seeds."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}".replace("-", "\N{MINUS SIGN}")


def fits(points: Sequence[Point]) -> dict[str, float]:
    """Share of the variance of forgetting (nats) that KL explains: linear and with its square."""
    kl, lost = np.array([p.kl for p in points]), np.array([p.old_nats for p in points])
    total = float(((lost - lost.mean()) ** 2).sum())
    rest = {n: float(((lost - np.polyval(np.polyfit(kl, lost, n), kl)) ** 2).sum()) for n in (1, 2)}
    return {"linear": 1 - rest[1] / total, "quadratic": 1 - rest[2] / total}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.6, 0.7])
    parser.add_argument("--leave-out", nargs="+", default=[], help="objectives that the last line leaves out")
    given = parser.parse_args()
    paths = read(given.folders)
    print(
        "| objective | rate | new accuracy | old accuracy lost | old nats forgotten | KL on the new task |\n"
        "|---|---|---|---|---|---|"
    )
    for objective, seeds in paths.items():
        for k, rate in enumerate(RATES, start=1):
            columns = zip(*(astuple(path[k]) for path in seeds.values()), strict=True)
            print(f"| {objective} | {rate} | " + " | ".join(spread(column) for column in columns) + " |")
    print(
        "\n| new accuracy | objective | old accuracy lost | old nats forgotten | KL | against sft |\n"
        "|---|---|---|---|---|---|"
    )
    matched = {(level, name): _reached(seeds, level) for level in given.levels for name, seeds in paths.items()}
    verdicts = judged(matched)
    for (level, name), points in matched.items():
        if len(points) < len(paths[name]):
            print(f"| {level} | {name} | reached by {len(points)} of {len(paths[name])} seeds | | | |")
            continue
        columns = list(zip(*(astuple(p) for p in points.values()), strict=True))[1:]
        print(f"| {level} | {name} | {' | '.join(map(spread, columns))} | {told(verdicts.get((level, name)))} |")
    kept = [seeds for name, seeds in paths.items() if name not in given.leave_out]
    ends = [point for seeds in kept for path in seeds.values() for point in path[1:]]
    print(f"\nR² of forgetting from KL over {len(ends)} states: {fits(ends)}")


if __name__ == "__main__":
    main()

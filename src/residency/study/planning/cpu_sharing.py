"""How the cores of this machine are shared out: stages that are computed at once, and threads of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from residency.core.tensor_files import read_json, write_json
from residency.study.planning.cells import combinations
from residency.study.planning.study_file import Study

__all__ = [
    "Cores",
    "at_once",
    "forget_cores",
    "keep_cores",
    "kept_threads",
    "measured_speeds",
    "share_cores",
    "usable_cores",
]

_FILE = "cores.json"
_WORTH = 1.1  # what more threads must bring: about the noise of the measurement
_REPEATS = 5
_ROWS, _INNER, _OUTER = 512, 576, 1536  # a feed-forward layer of a small model on one packed batch


@dataclass(frozen=True, kw_only=True)
class Cores:
    """How cores are shared out.

    Args:
        workers: Stages that are computed at once.
        threads: Threads of each.
        why: In words.
    """

    workers: int
    threads: int
    why: str


def usable_cores() -> int:
    """Cores that this process may use: affinity and the limits of a container are respected."""
    from joblib import cpu_count

    return int(cpu_count())


def at_once(study: Study) -> int:
    """How many runs a study has that do not wait for each other; a lower bound, known before a cell is parsed."""
    orders = study.orders
    # `latin` and `all` have as many as there are domains, and more.
    count = orders if isinstance(orders, int) else len(orders) if isinstance(orders, list) else 1 + (orders != "given")
    places = len(combinations(study))
    runs = places * count * len(study.seeds)
    if study.search is None:
        return runs
    return max(runs, places * min(study.search.batch, study.search.trials) * len(study.search.seeds))


def share_cores(
    *,
    cores: int,
    runs: int,
    gpus: int = 0,
    workers: int | None = None,
    threads: int | None = None,
    speeds: Callable[[Sequence[int]], Mapping[int, float]] | None = None,
) -> Cores:
    """Workers and threads of each.

    As many workers as there are GPUs, or runs, or cores. Where there are fewer runs than cores, a worker gets the
    number of threads that a short measurement finds fastest; one thread each is best where there are enough runs.

    Args:
        cores: That may be used.
        runs: That can be computed at once, see `at_once`.
        gpus: Of this machine.
        workers: What the user says; `None` = nothing.
        threads: What the user says, or what the study began with; `None` = nothing.
        speeds: {threads: speed}, `measured_speeds` by default.
    """
    if threads is not None:
        slots = workers or gpus or min(max(1, cores // threads), max(1, runs))
        return Cores(workers=slots, threads=threads, why="threads as they were given")
    if workers is not None:
        return Cores(workers=workers, threads=max(1, cores // workers), why="workers as they were given")
    if gpus:
        return Cores(workers=gpus, threads=max(1, cores // gpus), why="one per GPU")
    workers = min(cores, max(1, runs))
    most = cores // workers
    if most == 1:
        return Cores(workers=workers, threads=1, why="one per core")
    found = (speeds or measured_speeds)([2**n for n in range(most.bit_length())])
    best = max(found.values())
    chosen = min(count for count, speed in found.items() if speed * _WORTH >= best)
    gain = found[chosen] / found[1]
    return Cores(
        workers=workers,
        threads=chosen,
        why=f"{runs} runs at once on {cores} cores; {chosen} threads are {gain:.1f} times as fast as one",
    )


def measured_speeds(counts: Sequence[int]) -> dict[int, float]:
    """{threads: passes per second} through one linear layer, forward and backward; the best of a few tries.

    Args:
        counts: Numbers of threads.
    """
    import torch

    usual = torch.get_num_threads()
    layer = torch.nn.Linear(_INNER, _OUTER, bias=False)
    rows = torch.ones(_ROWS, _INNER, requires_grad=True)

    def seconds() -> float:
        start = time.perf_counter()
        layer(rows).sum().backward()
        return time.perf_counter() - start

    try:
        found = {}
        for count in counts:
            torch.set_num_threads(count)
            seconds()  # threads start, memory is taken
            found[count] = 1 / min(seconds() for _ in range(_REPEATS))
        return found
    finally:
        torch.set_num_threads(usual)


def kept_threads(folder: Path) -> int | None:
    """Threads of an earlier sweep of the study: they are part of what a stage is, so that others would be made anew."""
    return int(read_json(folder / _FILE)["threads"]) if (folder / _FILE).is_file() else None


def keep_cores(folder: Path, cores: Cores) -> None:
    """Let later sweeps of the study compute with as many threads."""
    write_json(folder / _FILE, asdict(cores))


def forget_cores(folder: Path) -> None:
    """Leave nothing behind where nothing has run."""
    (folder / _FILE).unlink(missing_ok=True)

"""A group of processes that train tiny streams together: started once, used for many runs."""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy

from residency.core.errors import UserError
from residency.core.tensor_files import load_tree
from residency.engine.trainers import Trainers
from residency.testing.tiny_runs import domains, train
from support.killed_runs import PRELOAD
from support.preference_stream import judged_domains, sft_then_reward_then_policy
from table import ADAPTERS, MITIGATIONS, OBJECTIVES

__all__ = ["FLOAT32", "Group", "apart", "group", "run_row"]

SECONDS = 240
# Other ranks add in another order. In float64 whatever an optimizer or a decomposition makes of that is still nothing;
# in float32 Adam's division, and directions of nearly equal singular values, make 1e-4 of it. These compute in float32
# whatever the model does (codes of 4 bits, Fourier transforms, Sinkhorn's balancing, decompositions, new modules and
# virtual tokens): there a larger eps keeps Adam from dividing rounding by itself.
FLOAT32 = ("c3a", "deft", "fourierft", "mica", "olora", "pissa", "psoft", "qlora", "sinkhorn", "sinkhorn_modular")
FLOAT32 += ("bottleneck", "cartridge", "p_tuning", "prefix_tuning", "progressive_prompts", "progressive_prompts_mlp")
FLOAT32 += ("prompt_tuning",)
Row = dict[str, Any]
"""`folder`, `backbone`, names of `adapter`, `mitigations` and of the objective (`learnt_by`) in the table, whether a
stage learns from the reward model of an earlier one (`by_reward_model`), and options of `train`."""


def run_row(row: Mapping[str, Any], *, ranks: int) -> dict[str, Any]:
    """Train one row in this process, which is one of several that have been given the same; the record."""
    options = dict(row)
    folder, backbone, name = options.pop("folder"), options.pop("backbone"), options.pop("adapter")
    mitigations = {m: MITIGATIONS[m].make() for m in options.pop("mitigations", ())}
    if learnt := options.pop("learnt_by", ""):
        options["objective"] = OBJECTIVES[learnt].make()
        options["data"] = {"domains": judged_domains(folder.parent / "judged", options["objective"].reads)}
    if options.pop("by_reward_model", False):
        options |= sft_then_reward_then_policy(folder.parent / "judged")
    adapter = ADAPTERS[name]
    shards = options.pop("shards", False)
    several: Any = ModelParallelStrategy(tensor_parallel_size=1) if shards else "ddp"
    trainer = {"devices": ranks, "strategy": several if ranks > 1 else "auto", **adapter.trainer}
    loading = {} if name in FLOAT32 else {"dtype": "float64"}
    optimizer = {"optimizer": partial(torch.optim.AdamW, eps=1e-4)} if name in FLOAT32 else {}
    options = {**adapter.options, "loading": {**adapter.loading, **loading}, **optimizer, **options}
    options["trainer"] = {**trainer, **options.get("trainer", {})}
    launcher = Trainers(lambda: {"accelerator": "cpu", **trainer})
    return launcher.launch(lambda: train(folder, backbone, adapter.make(), mitigations, **options)[0])


def _member(rank: int, ranks: int, port: int, pipe: Any) -> None:
    """One of the processes, as torchrun would have started it."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "GROUP_RANK": 0}
    places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "tests"}
    os.environ.update({name: str(value) for name, value in places.items()})
    torch.set_num_threads(1)
    Trainers(lambda: {"accelerator": "cpu", "devices": ranks, "strategy": "ddp"}).launch(lambda: None)
    while (asked := pipe.recv()) is not None:
        function, arguments = asked
        try:
            pipe.send((function(**arguments), ""))
        except UserError as error:
            pipe.send((None, str(error)))
        except BaseException:
            # A rank that has left the others must end, or they would wait for it.
            pipe.send((None, traceback.format_exc()))
            raise


class Group:
    """Several ranks that wait for functions to run."""

    def __init__(self, processes: Sequence[Any], pipes: Sequence[Any]) -> None:
        self.processes = processes
        self.pipes = pipes

    @property
    def ranks(self) -> int:
        """How many."""
        return len(self.processes)

    def call(self, function: Callable[..., Any], **arguments: Any) -> list[tuple[Any, str]]:
        """(what a function gave, what went wrong) on every rank."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        found = []
        for pipe in self.pipes:
            if not pipe.poll(SECONDS):
                raise TimeoutError(f"a rank has not answered for {SECONDS} s")
            found.append(pipe.recv())
        return found

    def run(self, row: Row) -> list[tuple[Any, str]]:
        """`run_row` on every rank."""
        domains(row["folder"].parent / "data", row.get("kinds"))
        return self.call(run_row, row=row, ranks=self.ranks)

    def record(self, row: Row) -> dict[str, Any]:
        """The record of a row that goes well on all ranks."""
        found = self.run(row)
        failed = [error for _, error in found if error]
        assert not failed, failed[0]
        assert all(record == {} for record, _ in found[1:]), "only one rank has a record"
        return dict(found[0][0])


@contextmanager
def group(ranks: int) -> Iterator[Group]:
    """Start the processes, and end them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "table"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_member, args=(rank, ranks, port, theirs), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    try:
        yield Group(processes, pipes)
    finally:
        for pipe in pipes:
            pipe.send(None)
        for process in processes:
            process.join(timeout=10)
            if process.is_alive():
                process.kill()


def apart(one: Path, other: Path) -> dict[str, float]:
    """{state file / what is in it: distance between two runs, as a share of its norm}."""
    found: dict[str, float] = {}
    for path in sorted(one.glob("stages/*/state.safetensors")):
        mine, theirs = (_groups(load_tree(folder / path.relative_to(one))) for folder in (one, other))
        assert {*mine} == {*theirs}
        for name, tensors in mine.items():
            assert {*tensors} == {*theirs[name]}, name
            size = torch.stack([t.norm() for t in tensors.values()]).norm()
            far = torch.stack([(t - theirs[name][key]).norm() for key, t in tensors.items()]).norm()
            found[f"{path.parent.name}/{name}"] = float(far / size) if size else float(far)
    return found


def _groups(tree: Mapping[str, Any]) -> dict[str, dict[str, torch.Tensor]]:
    """Weights, and every piece of every mitigation's state; numbers only."""
    parts: dict[str, Any] = {"weights": tree["weights"]}
    for mitigation, state in tree["mitigations"].items():
        parts |= {f"{mitigation}/{key}": value for key, value in state.items()}
    flat = {name: dict(_tensors(value)) for name, value in parts.items()}
    # Directions of nearly equal singular values turn into each other; what they span is what counts.
    for part, tensors in flat.items():
        flat[part] = {n: t @ t.T if part == "gpm/basis" or n.endswith("_basis") else t for n, t in tensors.items()}
    return {name: tensors for name, tensors in flat.items() if tensors}


def _tensors(value: Any, path: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value.double()
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _tensors(inner, f"{path}/{key}")

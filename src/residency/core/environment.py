"""Where numbers come from: versions, sizes, memory."""

from __future__ import annotations

import platform
import resource
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch
from torch import nn

__all__ = ["count_parameters", "keep_threads", "numerics", "package_version", "peak_memory_bytes", "versions"]

_PACKAGES = ("residency", "torch", "lightning", "transformers", "peft", "bitsandbytes", "safetensors")


_kept_threads: int | None = None


def keep_threads() -> None:
    """From now on `versions` says how many threads there are today: several ranks share the cores that one would have,
    and what a stage is does not depend on how many there are.
    """
    global _kept_threads
    _kept_threads = torch.get_num_threads()


def versions() -> dict[str, str]:
    """Versions of everything that can change a number."""
    found = {"python": platform.python_version(), "machine": platform.machine()}
    found["threads"] = str(_kept_threads or torch.get_num_threads())
    return found | {package: package_version(package) for package in _PACKAGES}


@cache
def package_version(package: str) -> str:
    """Version of an installed package, or `not installed`; read once, as its modules are."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def numerics() -> dict[str, str]:
    """Everything about this machine and process that can change a bit of a result."""
    found = versions() | {"cpu": torch.backends.cpu.get_cpu_capability()}
    # What a stage is does not depend on the patch release of the interpreter.
    found["python"] = ".".join(platform.python_version_tuple()[:2])
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def peak_memory_bytes() -> int:
    """Peak memory of this process so far: on CUDA what the allocator held, else resident memory."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, total) parameters; 4-bit weights are counted unpacked, tied ones once."""
    trainable = total = 0
    for parameter in model.parameters():
        shape = getattr(getattr(parameter, "quant_state", None), "shape", None)
        size = parameter.numel() if shape is None else int(torch.Size(shape).numel())
        total += size
        trainable += size if parameter.requires_grad else 0
    return trainable, total

"""Many examples as a few arrays, in memory or mapped from a file: four bytes a token, and the same examples back.

A Python tuple of token ids takes some 36 bytes a token and is copied into every worker that reads it; the pages of a
file are shared by all processes that map it.
"""

from __future__ import annotations

import json
import mmap
import zlib
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

from residency.core.tensor_files import replace_file
from residency.core.types import Branch, Example, Role, Row

__all__ = ["ExamplePacker", "PackedExamples", "open_examples", "write_examples"]

Arrays = Mapping[str, npt.NDArray[Any]]
_ROLES: tuple[Role, ...] = get_args(Role)
_HEADER = "residency"
_CODES = {
    "tokens": "i", "prompts": "i", "branches": "i", "cuts": "i",  # of all tokens; per example; per example; two each
    "lengths": "i", "roles": "b", "weights": "d", "masked": "b", "masks": "b",  # per branch; masks: of masked branches
}  # fmt: skip
_TYPES: Mapping[str, np.dtype[Any]] = {"i": np.dtype("<i4"), "b": np.dtype("<i1"), "d": np.dtype("<f8")}


class ExamplePacker:
    """Collects training examples in arrays."""

    def __init__(self) -> None:
        self._found: dict[str, array[Any]] = {name: array(code) for name, code in _CODES.items()}

    def add(self, example: Example) -> None:
        """One more: an example of the training split as a template makes it.

        Raises:
            ValueError: It holds what is not packed: likelihoods of a reference, or examples before its prompt.
        """
        if example.split != "train" or example.fewer_shots or any(b.reference is not None for b in example.branches):
            raise ValueError(f"example {example.row!r} is not as a template makes a training row")
        found = self._found
        found["tokens"].extend(example.prompt)
        found["prompts"].append(len(example.prompt))
        found["branches"].append(len(example.branches))
        found["cuts"].extend((example.cut_prompt, example.cut_completion))
        for branch in example.branches:
            found["tokens"].extend(branch.tokens)
            found["lengths"].append(len(branch.tokens))
            found["roles"].append(_ROLES.index(branch.role))
            found["weights"].append(branch.weight)
            found["masked"].append(bool(branch.mask))
            found["masks"].extend(branch.mask)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """All of them, by name."""
        return {
            name: np.frombuffer(found, dtype=_TYPES[found.typecode]) for name, found in self._found.items() if found
        }


class PackedExamples:
    """The examples that an `ExamplePacker` collected.

    Args:
        arrays: From it, or from a file.
    """

    def __init__(self, arrays: Arrays) -> None:
        found = {name: arrays.get(name, np.zeros(0, dtype=_TYPES[code])) for name, code in _CODES.items()}
        self._arrays = found
        self._branch = _starts(found["branches"])
        self._mask = _starts(np.where(found["masked"] > 0, found["lengths"], 0))
        # Tokens of an example: its prompt, then its branches.
        behind = _starts(found["lengths"])[self._branch]
        self._token = _starts(found["prompts"]) + behind
        if self._token[-1] != found["tokens"].size or self._mask[-1] != found["masks"].size:
            raise ValueError("the arrays are not of one set of examples")

    def __len__(self) -> int:
        return int(self._arrays["prompts"].size)

    def at(self, place: int, *, domain: str, row: Row) -> Example:
        """The example at a place, as the template made it.

        Args:
            place: In the order in which they were added.
            domain: Name of its domain.
            row: The row that it was made of.
        """
        found = self._arrays
        start, end = int(self._token[place]), int(self._token[place + 1])
        ids = found["tokens"][start:end].tolist()
        at = int(found["prompts"][place])
        prompt, branches = tuple(ids[:at]), []
        for k in range(int(self._branch[place]), int(self._branch[place + 1])):
            length = int(found["lengths"][k])
            mask = found["masks"][self._mask[k] : self._mask[k + 1]].astype(bool).tolist()
            role, weight = _ROLES[int(found["roles"][k])], float(found["weights"][k])
            branches.append(Branch(tokens=tuple(ids[at : at + length]), mask=tuple(mask), role=role, weight=weight))
            at += length
        cut_prompt, cut_completion = found["cuts"][2 * place : 2 * place + 2].tolist()
        return Example(
            domain=domain,
            row=row.id,
            prompt=prompt,
            branches=tuple(branches),
            cut_prompt=cut_prompt,
            cut_completion=cut_completion,
            extra=dict(row.extra),
        )


def _starts(sizes: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """(n + 1,) where each of n parts that lie one after another begins, and the end."""
    return np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)])


def write_examples(path: Path, arrays: Arrays, *, key: str, about: Mapping[str, Any]) -> None:
    """Write arrays as one safetensors file, atomically.

    Args:
        path: Its final name.
        arrays: At least one.
        key: Of what they were made from.
        about: Further JSON values.

    Raises:
        UserError: No room on disk, or no permission.
    """
    sums = {name: _sum(found) for name, found in sorted(arrays.items())}
    header = json.dumps({"key": key, "sums": sums, "about": about}, sort_keys=True)
    whole = {_HEADER: f"{zlib.crc32(header.encode()):08x}{header}"}
    replace_file(path, lambda temporary: save_file(dict(arrays), temporary, metadata=whole))


def open_examples(path: Path, *, key: str) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]] | None:
    """Map the arrays of a file that `write_examples` wrote.

    Args:
        path: The file.
        key: Of what they must have been made from.

    Returns:
        (arrays, further values); `None` if the file is missing, damaged, or of another key or kind.
    """
    try:
        with path.open("rb") as handle:
            pages = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(pages[:8], "little")
        listed = json.loads(pages[8 : 8 + size])
        told = listed.pop("__metadata__")[_HEADER]
        header = json.loads(told[8:])
        if told[:8] != f"{zlib.crc32(told[8:].encode()):08x}" or header["key"] != key:
            return None
        arrays = {name: _mapped(pages, 8 + size, one, _TYPES[_CODES[name]]) for name, one in listed.items()}
        sums = {name: _sum(found) for name, found in sorted(arrays.items())}
        return (arrays, header["about"]) if sums == header["sums"] else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def _sum(found: npt.NDArray[Any]) -> int:
    whole: Any = np.ascontiguousarray(found)
    return zlib.crc32(memoryview(whole).cast("B"))


def _mapped(pages: mmap.mmap, start: int, listed: Mapping[str, Any], kind: np.dtype[Any]) -> npt.NDArray[Any]:
    """An array of a safetensors file, without a copy: `listed` is its entry in the header."""
    begin, end = listed["data_offsets"]
    if begin < 0 or end < begin or (end - begin) % kind.itemsize:
        raise ValueError("offsets that cannot be")
    return np.frombuffer(pages, dtype=kind, count=(end - begin) // kind.itemsize, offset=start + begin)

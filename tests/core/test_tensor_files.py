"""Files are there whole or not at all, come back bit for bit, and never hold anything that is executed on reading."""

from __future__ import annotations

import errno
import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from residency.core import tensor_files as storage
from residency.core.errors import UserError
from residency.core.tensor_files import load_tree, read_json, replace_file, save_tree, write_json
from residency.engine.checkpointing import SafetensorsIO


def assert_same(one: Any, other: Any, where: str = "tree") -> None:
    """Equal structure, types, dtypes, shapes and bits."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert (one.dtype, one.shape) == (other.dtype, other.shape), where
        flat = [t.contiguous().flatten().view(torch.uint8) for t in (one, other)]
        assert torch.equal(*flat), where
    elif isinstance(one, Mapping):
        assert [*one] == [*other], where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{i}")
    else:
        assert one == other, where


def shared() -> dict[str, torch.Tensor]:
    """Tensors that look into one piece of memory: the same, a part, overlapping parts, another order."""
    t = torch.arange(12.0)
    return {"all": t, "same": t, "head": t[:5], "tail": t[3:], "grid": t.view(3, 4), "turned": t.view(3, 4).T}


TREES: dict[str, dict[Any, Any]] = {
    "empty": {},
    "values": {"a": 1, "b": -2.5, "c": "é\u0000🫀", "d": None, "e": True, "f": [], "g": {}, "h": (), "i": 2**70},
    "nested": {"a": {"b": [{"c": (torch.ones(2), [torch.zeros(1)])}]}, "d": torch.arange(3)},
    "int keys": {0: {1: torch.ones(2)}, -5: "x"},
    "other keys": {None: 1, 2.5: 2, (1, "a"): 3, True: 4},
    "reserved keys": {"$tensor": "no tensor", "$items": [1], "$tuple": {"$tensor": torch.ones(1)}},
    "tuples": {"a": (1, (2, [3, (4,)])), "b": [(), ((),)]},
    "shared memory": shared(),
    "dtypes": {str(d): torch.tensor([0, 1, 3], dtype=d) for d in (torch.int8, torch.uint8, torch.int32, torch.int64)},
    "floats": {
        str(d): torch.tensor([1 / 3, -0.0, float("inf")], dtype=d)
        for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
    },
    "special": {"zero-dim": torch.tensor(1.5), "bool": torch.tensor([True, False]), "none": torch.zeros(0, 3)},
    "nan": {"a": torch.tensor([float("nan")])},
    "parameter": {"a": torch.nn.Parameter(torch.ones(2)).detach()},
    "expanded": {"a": torch.ones(1).expand(4)},
    "optimizer": {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2)}},
        "param_groups": [{"betas": (0.9, 0.95)}],
    },
}


@pytest.mark.parametrize("name", TREES)
def test_a_tree_comes_back_bit_for_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "er" / "state.safetensors"
    save_tree(path, TREES[name])
    assert_same(load_tree(path), TREES[name])
    assert [p.name for p in path.parent.iterdir()] == ["state.safetensors"]


def test_a_parameter_is_stored_without_its_graph(tmp_path: Path) -> None:
    save_tree(tmp_path / "x.safetensors", {"a": torch.ones(2, requires_grad=True) * 2})
    assert not load_tree(tmp_path / "x.safetensors")["a"].requires_grad


class Something:
    """A type that no file can hold."""


@pytest.mark.parametrize(
    ("tree", "named"),
    [
        ({"a": {"b": [1, Something()]}}, "a/b/1 holds a Something"),
        ({"a": {1: {2}}}, "a/1 holds a set"),
        ({"optimizer": torch.float32}, "optimizer holds a dtype"),
        ({"x": np.int64(3)}, "x holds a int64"),
        ({"f": len}, "f holds a builtin_function_or_method"),
        ({"k": {Something: 1}}, "holds a type"),
        ({"a/b": torch.ones(1), "a": {"b": torch.ones(1)}}, "two tensors .* 'a/b'"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_unknown_leaf_is_named_and_nothing_is_written(tree: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=named):
        save_tree(tmp_path / "state.safetensors", tree)
    assert not list(tmp_path.iterdir())


# --- nothing is unpickled ---------------------------------------------------------------------------------------------


def test_files_hold_no_pickle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint as Lightning makes it: plain safetensors reads its tensors, and no unpickler runs on ours."""
    weights = {"model.a": torch.ones(2, 2), "model.b": torch.zeros(3, dtype=torch.bfloat16)}
    state = {"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    checkpoint = {"state_dict": weights, "optimizer_states": [state], "loops": {"n": 3}, "global_step": 3}
    path = tmp_path / "checkpoint.safetensors"
    SafetensorsIO().save_checkpoint(checkpoint, path)
    assert_same(load_file(path)["state_dict/model.a"], weights["model.a"])
    for name in ("load", "loads", "Unpickler", "_Unpickler"):
        monkeypatch.setattr(pickle, name, None)
    monkeypatch.setattr(torch, "load", None)
    assert_same(SafetensorsIO().load_checkpoint(path), checkpoint)
    SafetensorsIO().remove_checkpoint(path)
    assert not path.exists()


# --- damaged files ----------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A small state on disk."""
    path = tmp_path / "state.safetensors"
    save_tree(path, {"w": torch.arange(4.0), "n": {3: (1, 0.5, "x", True, None)}, "e": [torch.ones(2)], "name": "a"})
    return path


def test_a_truncated_state_is_refused(saved: Path) -> None:
    whole = saved.read_bytes()
    for length in range(len(whole)):
        saved.write_bytes(whole[:length])
        with pytest.raises(UserError, match="cannot read the state") as caught:
            load_tree(saved)
    assert "delete it" in caught.value.fix
    saved.write_bytes(whole + b"more")
    with pytest.raises(UserError):
        load_tree(saved)


def test_no_flipped_bit_in_the_header_goes_unnoticed(saved: Path) -> None:
    """Two bits of every byte: also in names and numbers, where the header stays valid JSON."""
    whole = saved.read_bytes()
    missed = []
    for byte in range(8 + int.from_bytes(whole[:8], "little")):
        for bit in (0, 1 + byte % 7):
            damaged = bytearray(whole)
            damaged[byte] ^= 1 << bit
            saved.write_bytes(damaged)
            try:
                load_tree(saved)
            except UserError:
                continue
            missed.append(bytes(damaged[max(0, byte - 8) : byte + 8]))
    assert not missed


@pytest.mark.parametrize(
    "content", [None, b"", b"{}", b"\x80\x04N.", bytes(range(64))], ids=["missing", "empty", "json", "pickle", "noise"]
)
def test_a_file_that_is_no_state_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"state\.safetensors"):
        load_tree(path)


def test_a_foreign_safetensors_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.ones(1)}, tmp_path / "foreign.safetensors")
    for path in (tmp_path / "foreign.safetensors", tmp_path):
        with pytest.raises(UserError):
            load_tree(path)


@pytest.mark.parametrize("content", [None, b"", b'{"a": 1', b"\xff\xfe", b"nonsense"])
def test_damaged_json_is_refused(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"cannot read .*results\.json"):
        read_json(path)


def test_json_comes_back_and_nan_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.json"
    value = {"é": [1, 0.1 + 0.2, None, True, "\u2028"], "n": {}}
    write_json(path, value)
    assert read_json(path) == value
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == value


# --- atomic writes ----------------------------------------------------------------------------------------------------


def write_tree(path: Path) -> None:
    save_tree(path, {"new": torch.ones(1000)})


def write_value(path: Path) -> None:
    write_json(path, {"new": [0] * 1000})


WRITERS = pytest.mark.parametrize("write", [write_tree, write_value])


def assert_untouched(folder: Path) -> None:
    """The old file is as it was, and it is alone."""
    assert [path.name for path in folder.iterdir()] == ["kept"]
    assert (folder / "kept").read_bytes() == b"old"


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), MemoryError()])
def test_a_writer_that_raises_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"old")

    def half(temporary: Path) -> None:
        temporary.write_bytes(b"ne")
        raise error

    with pytest.raises(type(error)):
        replace_file(tmp_path / "kept", half)
    assert_untouched(tmp_path)


def test_a_reader_sees_the_old_file_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "kept"
    path.write_bytes(b"old")

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent, "a rename is atomic inside one file system only"
        temporary.write_bytes(b"new")
        assert path.read_bytes() == b"old"

    replace_file(path, write)
    assert path.read_bytes() == b"new"


FULL = OSError(errno.ENOSPC, "No space left on device")
FAILURES: list[tuple[str, Exception, str]] = [
    ("fsync", FULL, "no room on the disk"),
    ("replace", FULL, "no room on the disk"),
    ("fsync", OSError(errno.EDQUOT, "Disk quota exceeded"), "no room on the disk"),
    ("replace", OSError(errno.EROFS, "Read-only file system"), "cannot write"),
    ("replace", PermissionError(errno.EACCES, "Permission denied"), "cannot write"),
]


@WRITERS
@pytest.mark.parametrize(("call", "error", "message"), FAILURES)
def test_a_full_disk_is_explained(
    write: Callable[[Path], None],
    call: str,
    error: Exception,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "kept").write_bytes(b"old")

    def fail(*args: Any) -> None:
        raise error

    monkeypatch.setattr(storage.os, call, fail)
    with pytest.raises(UserError, match=message) as caught:
        write(tmp_path / "kept")
    monkeypatch.undo()
    assert caught.value.fix
    assert_untouched(tmp_path)


def test_a_full_disk_as_safetensors_reports_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept").write_bytes(b"old")

    def fail(tensors: Any, path: Path, **options: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(storage, "save_file", fail)
    with pytest.raises(UserError, match="no room on the disk"):
        write_tree(tmp_path / "kept")
    assert_untouched(tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 KiB."""
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a real full disk needs a tmpfs, which only root on Linux can mount")
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", folder], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"cannot mount a tmpfs: {mount.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    """States and JSON alike; what was there survives, and once there is room the same call works."""
    state, record = small_disk / "state.safetensors", small_disk / "record.json"
    old = {"a": torch.arange(1000.0)}
    save_tree(state, old)
    write_json(record, {"a": 1})
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * 40_000)
    for _ in range(2):
        with pytest.raises(UserError, match="no room on the disk"):
            save_tree(state, {"a": torch.zeros(10_000)})
        with pytest.raises(UserError, match="no room on the disk"):
            write_json(record, {"a": "x" * 40_000})
    assert_same(load_tree(state), old)
    assert read_json(record) == {"a": 1}
    assert sorted(p.name for p in small_disk.iterdir()) == ["filler", "record.json", "state.safetensors"]
    filler.unlink()
    save_tree(state, {"a": torch.zeros(10_000)})
    assert load_tree(state)["a"].shape == (10_000,)
    assert json.loads(record.read_text()) == {"a": 1}

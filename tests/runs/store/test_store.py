"""The store: whole entries or none, every byte compared on reading, damage never trusted, several writers at once."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.core.leases import lease
from residency.runs.store import store as module
from residency.runs.store.store import Store, link_or_copy
from support.cli import call

CONTENT = bytes(range(256)) * 64


def key(name: str) -> str:
    """A key as the store has them."""
    return hashlib.sha256(name.encode()).hexdigest()


KEY = key("key")


def write(folder: Path) -> None:
    (folder / "state.safetensors").write_bytes(CONTENT)
    (folder / "history.jsonl").write_text("{}\n")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """A store with one entry, which tells what it sets aside."""
    told: list[str] = []
    store = Store(tmp_path / "store", on_message=told.append)
    store.put("trained", KEY, write, meta={"facts": {"steps": 3}})
    return store


def test_an_entry_comes_back(store: Store) -> None:
    entry = store.find("trained", KEY)
    assert entry is not None
    assert (entry.path / "state.safetensors").read_bytes() == CONTENT
    assert entry.meta == {"facts": {"steps": 3}}
    assert entry.size == len(CONTENT) + 3
    assert store.has("trained", KEY)
    assert not store.has("trained", key("other"))
    assert store.find("finished", KEY) is None
    assert not list((store.path / "tmp").iterdir())


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "bit flipped": flip,
    "emptied": lambda path: path.write_bytes(b""),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("file", ["state.safetensors", "history.jsonl", "entry.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_set_aside_and_made_anew(damage: str, file: str, store: Store) -> None:
    DAMAGE[damage](store.entry_path("trained", KEY) / file)
    assert store.find("trained", KEY) is None
    assert not store.has("trained", KEY)
    aside = list((store.path / "aside").iterdir())
    assert len(aside) == 1
    assert (aside[0] / "reason.txt").read_text().strip()
    store.put("trained", KEY, write, meta={})
    assert store.find("trained", KEY) is not None


def test_a_record_that_was_edited_is_not_believed(store: Store) -> None:
    path = store.entry_path("trained", KEY) / "entry.json"
    record = json.loads(path.read_text())
    record["meta"]["facts"]["steps"] = 4
    path.write_text(json.dumps(record))
    assert store.find("trained", KEY) is None


def test_the_faster_writer_wins_and_the_slower_one_agrees(store: Store) -> None:
    again = store.put("trained", KEY, write, meta={"slower": True})
    assert again.meta == {"facts": {"steps": 3}}
    assert not list((store.path / "tmp").iterdir())


def test_many_writers_at_once(tmp_path: Path) -> None:
    store = Store(tmp_path)
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for n in range(10):
                store.put("finished", f"k{n}", write, meta={})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert all(store.find("finished", f"k{n}") for n in range(10))


def test_a_writer_that_fails_leaves_nothing(store: Store) -> None:
    def fails(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        store.put("trained", key("other"), fails, meta={})
    assert not store.has("trained", key("other"))
    assert not list((store.path / "tmp").iterdir())


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    place = tmp_path / "disk"
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)]
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        pytest.skip("no mount command")
    if done.returncode:
        pytest.skip(f"mounting is not permitted here: {done.stderr.strip()}")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    store = Store(small_disk)
    store.put("trained", "fits", lambda folder: _fill(folder, 2**18), meta={})
    with pytest.raises(UserError, match="no room on the disk"):
        store.put("trained", "big", lambda folder: _fill(folder, 2**21), meta={})
    assert not store.has("trained", "big")
    assert not list((small_disk / "tmp").iterdir())
    assert store.find("trained", "fits") is not None
    store.put("trained", "small", lambda folder: _fill(folder, 2**18), meta={})
    assert store.find("trained", "small") is not None


def _fill(folder: Path, size: int) -> None:
    (folder / "state.safetensors").write_bytes(b"x" * size)


def test_a_file_system_without_links(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = store.entry_path("trained", KEY) / "state.safetensors", tmp_path / "run" / "state.safetensors"
    link_or_copy(source, target)
    assert target.stat().st_ino == source.stat().st_ino

    def refuse(*args: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(module.os, "link", refuse)
    link_or_copy(source, target)
    assert target.stat().st_ino != source.stat().st_ino
    assert target.read_bytes() == CONTENT


# -- the command ------------------------------------------------------------------------------------------------


def test_ls_tells_sizes(store: Store) -> None:
    result = call("store", "ls", store.path)
    assert result.code == 0
    assert "trained" in result.out


def test_verify_finds_damage(store: Store) -> None:
    assert call("store", "verify", store.path).code == 0
    flip(store.entry_path("trained", KEY) / "state.safetensors")
    result = call("store", "verify", store.path)
    assert result.code == 3
    assert "1 were damaged" in result.out
    assert call("store", "verify", store.path).code == 0, "what was set aside is not there any more"


def test_gc_removes_what_is_left_over_and_keeps_entries(store: Store) -> None:
    store.put("trained", key("broken"), write, meta={})
    store.quarantine("trained", key("broken"), reason="test")
    store.work(KEY).mkdir(parents=True)
    store.work(key("running")).mkdir(parents=True)
    assert call("store", "gc", store.path).code == 0
    assert not list((store.path / "aside").iterdir())
    assert [place.name for place in (store.path / "work").iterdir()] == [key("running")]
    assert store.find("trained", KEY) is not None


def test_gc_by_age_and_by_size(store: Store) -> None:
    names = [key("old"), key("middle"), key("new")]
    for n, name in enumerate(names):
        store.put("finished", name, write, meta={})
        record = store.entry_path("finished", name) / "entry.json"
        os.utime(record, (time.time() - (3 - n) * 86400,) * 2)
    refused = call("store", "gc", store.path, "--unused", "2.5")
    assert refused.code == 2
    assert "1 complete entries" in refused.err
    assert "--yes" in refused.err
    assert all(store.has("finished", name) for name in names)
    assert call("store", "gc", store.path, "--unused", "2.5", "--yes").code == 0
    assert [store.has("finished", name) for name in names] == [False, True, True]
    assert call("store", "gc", store.path, "--max-size", "36K", "--yes").code == 0
    assert [store.has("finished", name) for name in names[1:]] == [False, True]
    assert store.has("trained", KEY), "what was used last stays"
    assert call("store", "gc", store.path, "--max-size", "many").code == 2


def test_a_store_that_is_not_there(tmp_path: Path) -> None:
    result = call("store", "ls", tmp_path / "nope")
    assert result.code == 2
    assert "studies/<name>/store" in result.err


# -- leases -----------------------------------------------------------------------------------------------------

HOLD = (
    "import sys, pathlib; from residency.core.leases import lease\n"
    "with lease(pathlib.Path(sys.argv[1])) as held: print(held, flush=True); sys.stdin.readline()"
)


def hold(path: Path) -> subprocess.Popen[str]:
    words = [sys.executable, "-c", HOLD, str(path)]
    owner = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    assert owner.stdout.readline() == "True\n"
    return owner


def test_a_lease_has_one_owner_and_survives_its_death(tmp_path: Path) -> None:
    path = tmp_path / "leases" / "x"
    owner = hold(path)
    looks: list[int] = []
    with lease(path, already_done=lambda: len(looks) > 3, waiting=lambda: looks.append(1), poll=0.01) as held:
        assert held is False
    assert looks, "it waited as long as the owner lived"
    owner.kill()
    owner.communicate()
    assert path.exists(), "the dead owner could not give it back"
    start = time.monotonic()
    with lease(path) as held:
        assert held is True
    assert time.monotonic() - start < 5, "an owner on this machine is looked at, not waited for"
    assert not list(path.parent.iterdir())


def test_a_lease_that_a_signal_interrupts_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this process, which lives, would wait for itself."""
    path = tmp_path / "lease"
    real = os.link

    def link(source: Path, target: Path) -> None:
        real(source, target)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "link", link)
        with pytest.raises(KeyboardInterrupt), lease(path):
            pass
    with lease(path, waiting=lambda: pytest.fail("nobody holds it")) as held:
        assert held
    assert not list(tmp_path.iterdir())


def test_an_owner_elsewhere_is_dead_without_heartbeat(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text(json.dumps({"place": "another machine", "pid": os.getpid(), "started": "1", "token": "t"}))
    looks: list[int] = []
    with lease(path, already_done=lambda: len(looks) > 2, waiting=lambda: looks.append(1), poll=0.01) as held:
        assert held is False
    os.utime(path, (time.time() - 3600,) * 2)
    with lease(path) as held:
        assert held is True


def test_a_process_id_that_was_given_again(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with lease(path):
        owner = json.loads(path.read_text())
    path.write_text(json.dumps({**owner, "started": "0"}))
    with lease(path) as held:
        assert held is True


def test_a_heartbeat_keeps_a_lease_alive(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with lease(path, beat=0.05):
        os.utime(path, (0, 0))
        end = time.monotonic() + 5
        while path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


def test_an_unreadable_lease_is_waited_for_and_then_broken(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("{half")
    os.utime(path, (time.time() - 3600,) * 2)
    with lease(path) as held:
        assert held is True

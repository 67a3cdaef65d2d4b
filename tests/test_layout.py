"""The house: thirteen rooms and `testing`, every import one way, files and functions of a readable size."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

import residency

SOURCE = Path(residency.__file__).parent
ROOMS = ["core", "metrics", "scorers", "domains", "backbones", "adapters", "objectives", "mitigations", "engine"]
ROOMS += ["inspection", "runs", "report", "study"]
"""From the ground up: a room imports only rooms before it."""
ON_TOP = "testing"
"""The conformance suite imports whatever it tests, and nothing imports it."""
BESIDE = {"configs", "__init__.py", "__main__.py", "py.typed"}
FILES = sorted(SOURCE.rglob("*.py"))


def imported(path: Path) -> Iterator[str]:
    """Modules of this package that a file imports anywhere, `TYPE_CHECKING` and functions included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("residency."))
        elif isinstance(node, ast.ImportFrom) and node.module == "residency":
            yield from (f"residency.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("residency."):
            yield node.module or ""
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: imports are absolute"


def test_there_are_thirteen_rooms() -> None:
    names = {path.name for path in SOURCE.iterdir() if path.name != "__pycache__"}
    assert names - BESIDE == {*ROOMS, ON_TOP}
    assert len(ROOMS) == 13


@pytest.mark.parametrize("room", [*ROOMS, ON_TOP])
def test_a_room_imports_only_rooms_before_it(room: str) -> None:
    order = [*ROOMS, ON_TOP]
    allowed = {*order[: order.index(room) + 1]}
    upwards = {
        f"{path.relative_to(SOURCE)}: {module}"
        for path in (SOURCE / room).rglob("*.py")
        for module in imported(path)
        if module.split(".")[1] not in allowed
    }
    assert not upwards


def test_no_import_goes_in_a_circle() -> None:
    """Between the files of a room; between rooms there is none, since they have an order."""
    names = {".".join(["residency", *path.relative_to(SOURCE).with_suffix("").parts]): path for path in FILES}
    runs_at_import = {name: {m for m in _top_level(path) if m in names} for name, path in names.items()}
    state: dict[str, int] = {}

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join([*trail, name])
        if name in state:
            return
        state[name] = 1
        for module in runs_at_import[name]:
            visit(module, (*trail, name))
        state[name] = 2

    for name in runs_at_import:
        visit(name, ())


def _top_level(path: Path) -> Iterator[str]:
    body = ast.parse(path.read_text(encoding="utf-8")).body
    blocks = [node for node in body if isinstance(node, ast.If)]
    for node in [*body, *(statement for block in blocks for statement in block.body)]:
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_files_and_functions_have_a_readable_size() -> None:
    long: list[str] = []
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        if text.count("\n") > 300:
            long.append(f"{path.relative_to(SOURCE)}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                documentation = ast.get_docstring(node, clean=False)
                lines = (node.end_lineno or 0) - node.lineno + 1
                lines -= documentation.count("\n") + 1 if documentation else 0
                if lines > 50:
                    long.append(f"{path.relative_to(SOURCE)}: {node.name} has {lines} lines")
    assert not long


_FILES_OF_THE_WHEEL = """
from setuptools.dist import Distribution
project = Distribution({"script_name": "setup.py"})
project.parse_config_files()
build = project.get_command_obj("build_py")
build.ensure_finalized()
print(build.build_lib, *build.get_outputs(include_bytecode=False), sep="\\n")
"""


def test_mypy_reads_every_package_that_is_imported_here() -> None:
    """What it leaves out as other packages' own would be `Any`, without a word."""
    settings = tomllib.loads((SOURCE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]
    left_out, read = (
        {
            name.removesuffix(".*")
            for entry in settings["overrides"]
            if entry["follow_imports"] == kind and not entry.get("ignore_missing_imports")
            for name in entry["module"]
        }
        for kind in ("skip", "normal")
    )
    assert "mlflow" in left_out
    for path in FILES:
        for module in _everything_imported(path) - read:
            parts = module.split(".")
            parents = {".".join(parts[: i + 1]) for i in range(len(parts))}
            assert not parents & left_out, f"{path.relative_to(SOURCE)} imports {module}: take it off the list"


def _everything_imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_a_wheel_holds_every_room_and_every_preset() -> None:
    """`testing` is for authors of plug-ins, who have the wheel alone; presets are found without the repository."""
    root = Path(__file__).parents[1]
    # In a process of its own: setuptools puts a module of its own in the place of distutils.
    words = [sys.executable, "-c", _FILES_OF_THE_WHEEL]
    base, *paths = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True).stdout.splitlines()
    held = {Path(path).relative_to(base) for path in paths}
    files = {Path("residency") / path.relative_to(SOURCE) for path in SOURCE.rglob("*.py")}
    presets = {
        Path("residency/configs") / path.relative_to(root / "configs") for path in root.glob("configs/**/*.yaml")
    }
    assert not sorted(files - held)
    assert not sorted(presets - held)
    assert {path.parts[0] for path in held} == {"residency"}, "tests stay where they are"
    assert any(path.parts[1] == "testing" for path in held)

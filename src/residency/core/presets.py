"""Presets: YAML files that are given by their names; those of the package, and the user's own beside them."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from residency.core.errors import UserError

__all__ = [
    "KINDS",
    "Preset",
    "component_kind",
    "find_preset",
    "is_shipped",
    "list_presets",
    "named_file",
    "preset_folders",
]

KINDS = {
    "adapter": "adapter",
    "mitigation": "mitigation",
    "objective": "objective",
    "scorer": "scorer",
    "scheduler": "scheduler",
    "inspection": "inspection",
    "logger": "logger",
    "domain": "domain",
    "augmentation": "augmentation",
    "config": "",
    "backbone": "backbone",
    "stream": "stream",
    "trainer": "trainer",
    "study": "studies",
}
"""{kind: its folder inside a folder of presets}. The first nine are components, the next four go to `--config`."""

CONFIGS = ("config", "backbone", "stream", "trainer")
"""Kinds of files that `--config` takes, in the order in which a name is looked for."""

_COMPONENTS = (
    (re.compile(r"model\.adapter"), "adapter"),
    (re.compile(r"model\.objective|stages\.[^.]+\.objective"), "objective"),
    (re.compile(r"model\.scheduler|stages\.[^.]+\.scheduler"), "scheduler"),
    (re.compile(r"model\.mitigations\.[^.]+"), "mitigation"),
    (re.compile(r"inspection\.[^.]+"), "inspection"),
    (re.compile(r"data\.(?:domains|probes)\.[^.]+"), "domain"),
    (re.compile(r"trainer\.logger"), "logger"),
)
_NAME = re.compile(r"[A-Za-z0-9_][\w-]*(?:\.\d[\w-]*)*")
_LONGEST = 200  # characters of a summary
_SUFFIXES = (".yaml", ".yml")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One file that has a name.

    Args:
        kind: A key of `KINDS`.
        name: Its file's name without the suffix.
        path: The file.
        summary: The first sentence of the comment at its top.
    """

    kind: str
    name: str
    path: Path
    summary: str


def preset_folders() -> list[Path]:
    """Where presets lie, what counts most first: RESIDENCY_PRESETS, `configs` where the command runs, the package's."""
    own = [Path(part) for part in os.environ.get("RESIDENCY_PRESETS", "").split(os.pathsep) if part]
    folders = [folder.resolve() for folder in (*own, Path("configs"), _shipped()) if folder.is_dir()]
    return list(dict.fromkeys(folders))


def _shipped() -> Path:
    return (Path(__file__).parents[1] / "configs").resolve()


def is_shipped(file: Path) -> bool:
    """Whether a file is one of the package's presets."""
    return file.resolve().is_relative_to(_shipped())


def component_kind(key: str) -> str | None:
    """The kind of preset that a key of a config takes in place of a class; `None` if it takes none."""
    return next((kind for pattern, kind in _COMPONENTS if pattern.fullmatch(key)), None)


def find_preset(kind: str, name: str) -> Path | None:
    """The file of a preset, the user's own before the package's; `None` if there is none of that name."""
    if not _NAME.fullmatch(name):
        return None
    for folder in preset_folders():
        for file in _files(folder / KINDS[kind]):
            # Compared as text: a file system that ignores case would take the class EWC for the preset ewc.
            if file.stem == name:
                return file
    return None


def list_presets(kind: str | None = None) -> list[Preset]:
    """All presets of a kind, or of all kinds, by name; the package's are left out where the user has one of that name.

    Raises:
        UserError: There is no such kind.
    """
    if kind is not None and kind not in KINDS:
        near = get_close_matches(kind, KINDS, 1)
        raise UserError(
            f"residency presets {kind}",
            why=f"the kinds of presets are {', '.join(KINDS)}",
            fix=f"did you mean {near[0]!r}?" if near else "give one of them, or none for all",
        )
    found: dict[tuple[str, str], Preset] = {}
    for one in KINDS if kind is None else (kind,):
        for folder in preset_folders():
            for file in _files(folder / KINDS[one]):
                preset = Preset(kind=one, name=file.stem, path=file, summary=_summary(file))
                found.setdefault((one, file.stem), preset)
    return sorted(found.values(), key=lambda preset: (list(KINDS).index(preset.kind), preset.name))


def named_file(value: str, *, kinds: tuple[str, ...], what: str) -> Path:
    """The file that is meant by a path or by the name of a preset.

    Args:
        value: As the user wrote it; a file of that path counts more than a preset of that name.
        kinds: Where a name is looked for, in order; `kind/name` chooses one of them.
        what: What should be read from it, for the message.

    Raises:
        UserError: It looks like a name, and no preset has it. A missing file is left to whoever reads it.
    """
    path = Path(value)
    folder, _, name = value.rpartition("/")
    if path.is_file() or not _NAME.fullmatch(name) or path.suffix in (*_SUFFIXES, ".json"):
        return path
    searched = [kind for kind in kinds if folder in ("", kind, KINDS[kind])]
    for kind in searched:
        if (found := find_preset(kind, name)) is not None:
            return found
    if not searched:
        return path
    names = [preset.name for kind in searched for preset in list_presets(kind)]
    near = get_close_matches(name, names, 1)
    raise UserError(
        f"{value} is neither a file nor the name of a preset",
        why=f"{what} was to be read from it",
        fix=f"did you mean {near[0]!r}?" if near else f"`residency presets {searched[0]}` lists the names",
    )


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_dir():
        yield from sorted(file for file in folder.iterdir() if file.suffix in _SUFFIXES)


def _summary(file: Path) -> str:
    """The first sentence of the comment at the top of a file; its first line is a command."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        text = line.lstrip("# ").rstrip()
        if not text.startswith("residency "):
            lines.append(text)
    # Not the dot of "et al." nor that of a number.
    return re.split(r"(?<!al)\.(?:\s|$)", " ".join(lines), maxsplit=1)[0][:_LONGEST]

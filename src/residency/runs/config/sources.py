"""What the user has written: the words of a command line and the files they name, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.core.presets import component_kind, find_preset
from residency.core.yaml_files import YamlRefused, parse_yaml, read_yaml

__all__ = ["ConfigEntry", "check_configs", "entries", "pairs", "written"]

_CONFIG_OPTIONS = ("--config", "-c")


@dataclass(frozen=True, slots=True)
class ConfigEntry:
    """One key with its value.

    Args:
        key: With dots.
        value: As written.
        place: The file; empty on the command line.
    """

    key: str
    value: Any
    place: str

    def __str__(self) -> str:
        shown = " ".join(str(self.value).split())
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return f"{self.key}: {shown} (in {self.place})" if self.place else f"--{self.key}={shown}"


def pairs(words: Sequence[str]) -> Iterator[tuple[str, str | None]]:
    """(option, value) of every option; both `--key=value` and `--key value` are known."""
    for word, after in zip(words, [*words[1:], None], strict=False):
        if word.startswith("-"):
            option, equals, value = word.partition("=")
            yield option, value if equals else None if after is None or after.startswith("--") else after


def check_configs(words: Sequence[str]) -> None:
    """Every `--config` of a command line is a file with keys and values.

    Raises:
        UserError: It is not.
    """
    for option, value in pairs(words):
        if option in _CONFIG_OPTIONS and value is not None:
            content = _inline(value) or read_yaml(Path(value), what="the config")
            if not isinstance(content, dict):
                raise UserError(
                    f"{value} holds {'nothing' if content is None else type(content).__name__}",
                    why="a config consists of keys with values",
                    fix="start from configs/quickstart.yaml, or from `residency fit --print_config`",
                )


def written(words: Sequence[str]) -> list[ConfigEntry]:
    """Every key of a command line and of the files it names, what counts most (the last) first."""
    found = [entry for option, value in pairs(words) if value is not None for entry in entries(option, value)]
    return found[::-1]


def entries(option: str, value: str) -> list[ConfigEntry]:
    """Every key of one option of a command line and of the files it names."""
    inline = _inline(value)
    if option not in _CONFIG_OPTIONS:
        return [*_flat(inline or value, option.lstrip("-"), "", Path("."))]
    if inline is not None:
        return [*_flat(inline, "", "--config", Path("."))]
    return [*_flat(read_yaml(Path(value), what="the config"), "", value, Path(value).parent)]


def _inline(value: str) -> dict[str, Any] | None:
    """Keys and values that are given in place of a file or a class."""
    try:
        content = parse_yaml(value) if value.lstrip().startswith("{") else None
    except YamlRefused:
        return None
    return content if isinstance(content, dict) else None


def _flat(value: Any, key: str, place: str, folder: Path, within: tuple[Path, ...] = ()) -> Iterator[ConfigEntry]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name), place, folder, within)
    elif isinstance(value, str) and (preset := _preset(value, key, folder)) is not None:
        if (real := preset.resolve()) in within:
            raise UserError(
                f"{preset} names itself: {' -> '.join(file.name for file in (*within, real))}",
                why="reading it would have no end",
                fix="put the content itself where the name of the file stands",
            )
        yield from _flat(read_yaml(preset, what=key), key, str(preset), preset.parent, (*within, real))
    if key:
        yield ConfigEntry(key, value, place)


def _is_file(path: Path) -> bool:
    """Also of what can be no path: then it is a text."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _preset(value: str, key: str, folder: Path) -> Path | None:
    """The file that stands in the place of a value: by its path, or by the name of a preset."""
    if value.endswith((".yaml", ".yml")) and _is_file(folder / value):
        return folder / value
    kind = component_kind(key)
    return None if kind is None else find_preset(kind, value)

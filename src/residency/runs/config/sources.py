"""What the user has written: the words of a command line and the files they name, key by key."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from residency.core.errors import UserError

__all__ = ["ConfigEntry", "check_configs", "pairs", "read_yaml", "written"]

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


def read_yaml(path: Path, *, what: str) -> Any:
    """The content of a YAML file.

    Args:
        path: The file.
        what: What it should hold, for the message.

    Raises:
        UserError: It cannot be read, or is not YAML; the line is named.
    """
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}",
            why=f"{what} was to be read from it",
            fix="give an existing YAML file; paths are relative to the folder you start from, and inside a file to it",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}{line} is not YAML: {problem or ' '.join(str(error).split())}",
            why=f"{what} was to be read from it",
            fix="correct that line: usual causes are indentation, a bracket or a quote that is not closed, and tabs",
        ) from error


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
    found: list[ConfigEntry] = []
    for option, value in pairs(words):
        if value is None:
            continue
        inline = _inline(value)
        if option not in _CONFIG_OPTIONS:
            found += _flat(inline or value, option.lstrip("-"), "", Path("."))
        elif inline is not None:
            found += _flat(inline, "", "--config", Path("."))
        else:
            found += _flat(read_yaml(Path(value), what="the config"), "", value, Path(value).parent)
    return found[::-1]


def _inline(value: str) -> dict[str, Any] | None:
    """Keys and values that are given in place of a file or a class."""
    try:
        content = yaml.safe_load(value) if value.lstrip().startswith("{") else None
    except yaml.YAMLError:
        return None
    return content if isinstance(content, dict) else None


def _flat(value: Any, key: str, place: str, folder: Path) -> Iterator[ConfigEntry]:
    if isinstance(value, dict):
        for name, part in value.items():
            yield from _flat(part, f"{key}.{name}" if key else str(name), place, folder)
    elif isinstance(value, str) and value.endswith((".yaml", ".yml")) and (folder / value).is_file():
        preset = folder / value
        yield from _flat(read_yaml(preset, what=key), key, str(preset), preset.parent)
    if key:
        yield ConfigEntry(key, value, place)

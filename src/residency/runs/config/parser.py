"""The parser of the command line: preset files for named parts, documented classes, refusals that can be explained."""

from __future__ import annotations

import inspect
import json
import re
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentError, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from residency.core.errors import UserError
from residency.core.yaml_files import YamlRefused, parse_yaml, read_yaml
from residency.runs.config.explain import ParseFailure

__all__ = ["ResidencyParser", "expand_presets"]

_NAMED_PART = re.compile(r"--(model\.mitigations|data\.domains|data\.probes|inspection)\.[^.=]+")
_SCORERS = re.compile(r"--data\.(domains|probes)\.[^=]+\.scorers\+?")
_CLASS_HELP = re.compile(r"Help for \S+=([\w.]+)")


class _Formatter(DefaultHelpFormatter, RawDescriptionHelpFormatter):
    """Keeps the lines of descriptions: docstrings have formulas and lists."""


class ResidencyParser(LightningArgumentParser):
    """A parser that refuses with an exception, and shows the whole docstring of a class."""

    def __init__(self, *args: Any, description: str = "", **kwargs: Any) -> None:
        if match := _CLASS_HELP.fullmatch(description):
            description = f"{description}\n\n{_documentation(match[1])}"
        # A key means one thing, whatever keys there will be: no abbreviations.
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, description=description, formatter_class=_Formatter, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Called by jsonargparse for everything that does not parse.

        Raises:
            ParseFailure: From the parser of the command line.
            ArgumentError: From a parser inside of it, so that jsonargparse may try another type.
        """
        parser: Any = getattr(ex, "subcommand_parser", self)
        actions = parser._actions
        hidden = ("help", "config", "print_config", "print_shtab", "subcommand", SUPPRESS)
        accepted = [a.dest for a in actions if a.dest not in hidden and not a.dest.endswith(".help")]
        if self.exit_on_error:
            raise ParseFailure(message, accepted=accepted) from ex
        problem = ArgumentError(None, message)
        problem.accepted = accepted  # type: ignore[attr-defined]
        raise problem from ex


def _documentation(path: str) -> str:
    """The docstring of a class without its arguments, which the help lists one by one."""
    module, _, name = path.rpartition(".")
    documented = inspect.getdoc(getattr(import_module(module), name)) or ""
    return re.split(r"\n\s*(?:Args|Raises|Returns):\n", documented)[0].strip()


def expand_presets(words: Sequence[str]) -> list[str]:
    """Put the content of preset files where a named part is given as a file.

    jsonargparse reads files for plain arguments (`--model.adapter FILE`) but not for entries of a dict.

    Raises:
        UserError: A file is missing, is not YAML or holds no component.
    """
    joined: list[str] = []
    for word in words:
        if joined and _NAMED_PART.fullmatch(joined[-1]) and not word.startswith("-"):
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return [_expanded(word) for word in joined]


def _list(text: str, key: str) -> Any:
    try:
        return parse_yaml(text)
    except YamlRefused as error:
        raise UserError(
            f"--{key.lstrip('-')}={text}", why=f"it is no list: {error}", fix="write it as [a, b]"
        ) from error


def _expanded(word: str) -> str:
    key, _, value = word.partition("=")
    if _SCORERS.fullmatch(key) and value.startswith("["):
        return f"{key}={json.dumps([_scorer(one, key) for one in _list(value, key)])}"
    if not (_NAMED_PART.fullmatch(key) and value.endswith((".yaml", ".yml", ".json"))):
        return word
    content = read_yaml(Path(value), what=key)
    if not (isinstance(content, dict) and "class_path" in content):
        raise UserError(
            f"{word}: the file has no class_path",
            why="a preset is one component: class_path and init_args",
            fix="start from a file in configs/mitigation",
        )
    return f"{key}={json.dumps(content)}"


def _scorer(given: Any, key: str) -> Any:
    """One entry of a list of scorers: the content of a preset file, anything else as it is."""
    is_file = isinstance(given, str) and given.endswith((".yaml", ".yml", ".json"))
    return read_yaml(Path(given), what=key) if is_file else given

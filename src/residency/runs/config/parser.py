"""The parser of the command line: preset files for named parts, documented classes, refusals that can be explained."""

from __future__ import annotations

import inspect
import os
import re
from argparse import SUPPRESS, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentError, DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from residency.core.yaml_files import YamlRefused, parse_yaml
from residency.runs.config.explain import ParseFailure
from residency.runs.config.preset_words import insert_presets

__all__ = ["ResidencyParser", "plain_values"]

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

    def _load_config_parser_mode(
        self,
        content: str,
        path: str | os.PathLike[str] = "",
        ext_vars: dict[str, Any] | None = None,
        prev_cfg: Any = None,
    ) -> Any:
        """A config file may name presets as the command line does."""
        try:
            config = parse_yaml(content)
        except YamlRefused:
            config = None  # jsonargparse says what is wrong
        plain = insert_presets(config, folder=Path(path).parent)
        if plain != config:
            content = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        return super()._load_config_parser_mode(content, path, ext_vars, prev_cfg)

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


def plain_values(parser: LightningArgumentParser, config: Namespace) -> dict[str, Any]:
    """What was parsed as plain values: as Lightning dumps it, but not checked again, which parsing has just done."""
    text = parser.dump(config, skip_link_targets=False, skip_unset=False, skip_validation=True, format="yaml")
    plain: dict[str, Any] = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return plain


def _documentation(path: str) -> str:
    """The docstring of a class without its arguments, which the help lists one by one."""
    module, _, name = path.rpartition(".")
    documented = inspect.getdoc(getattr(import_module(module), name)) or ""
    return re.split(r"\n\s*(?:Args|Raises|Returns):\n", documented)[0].strip()

"""The parser of the command line: preset files for named parts, documented classes, refusals that can be explained."""

from __future__ import annotations

import inspect
import os
import re
from argparse import SUPPRESS, Action, RawDescriptionHelpFormatter
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ActionSubCommands, ArgumentError, DefaultHelpFormatter, Namespace
from lightning.pytorch.cli import LightningArgumentParser

from residency.core.yaml_files import YamlRefused, parse_yaml
from residency.runs.config.explain import ParseFailure
from residency.runs.config.parse_once import in_one_parse, kept_or_parsed
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

    def parse_object(self, *args: Any, **kwargs: Any) -> Any:
        """Values of a part, or of a whole study; those of a part once per command line (`parse_once`)."""
        if getattr(self, "_inner_parser", False):
            return kept_or_parsed(super().parse_object, self, *args, **kwargs)
        return super().parse_object(*args, **kwargs)

    def _apply_actions(self, cfg: Any, parent_key: str = "", prev_cfg: Any = None, skip_fn: Any = None) -> Any:
        # With `skip_fn` jsonargparse adds defaults of parts; the verb's own parser has done so.
        if skip_fn is not None and self._subcommands_action and in_one_parse():
            return cfg
        return super()._apply_actions(cfg, parent_key, prev_cfg, skip_fn)

    def _check_value_key(self, action: Action, value: Any, key: str, cfg: Any, append: bool = False) -> Any:
        # Validation begins with the longest keys; when it comes to the verb, all of its values are done.
        if isinstance(action, ActionSubCommands) and in_one_parse():
            return value
        return super()._check_value_key(action, value, key, cfg, append)

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

"""`residency completion SHELL`: verbs, keys and names of presets for bash, zsh and tcsh, by shtab."""

from __future__ import annotations

import argparse

from residency.core.errors import EXIT_DONE
from residency.core.presets import CONFIGS, component_kind, list_presets
from residency.runs.config.short_help import DESCRIPTIONS, verb_options

__all__ = ["completion_command", "completion_parser"]

_FOLDERS = ("show", "compare", "rm", "report", "gate", "sync", "push", "chat", "merge")
_WORDS = ("assets", "init", "store", "ls", "completion")


def completion_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency completion`.
    """
    import shtab

    parser = argparse.ArgumentParser(
        prog="residency completion", description='Print a script for your shell: eval "$(residency completion bash)"'
    )
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    print(shtab.complete(completion_parser(), parser.parse_args(words).shell))
    return EXIT_DONE


def completion_parser() -> argparse.ArgumentParser:
    """What there is to complete, read from our sources; parses nothing itself."""
    import shtab

    parser = argparse.ArgumentParser(prog="residency")
    verbs = parser.add_subparsers()
    for verb in DESCRIPTIONS:
        one = verbs.add_parser(verb, help=DESCRIPTIONS[verb])
        one.add_argument("--config", choices=[preset.name for kind in CONFIGS for preset in list_presets(kind)])
        for option in (option for options in verb_options(verb).values() for option in options):
            kind = component_kind(option.key)
            names = [preset.name for preset in list_presets(kind)] if kind else None
            one.add_argument(f"--{option.key}", choices=names or None)
    verbs.add_parser("sweep", help="run a study").add_argument(
        "study", choices=[preset.name for preset in list_presets("study")]
    )
    verbs.add_parser("presets", help="list presets").add_argument(
        "kind", choices=["adapter", "mitigation", "objective", *CONFIGS]
    )
    for verb in _FOLDERS:
        verbs.add_parser(verb, help="takes a folder").add_argument("folder").complete = shtab.DIRECTORY  # type: ignore[attr-defined]
    for verb in _WORDS:
        verbs.add_parser(verb, help="see --help")
    return parser

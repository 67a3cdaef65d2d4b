"""The short help says what the parser knows, fits 100 lines, and imports no torch."""

from __future__ import annotations

import subprocess
import sys

import pytest

from residency.runs.completion import completion_parser
from residency.runs.config.short_help import DESCRIPTIONS, short_help, verb_options
from support.cli import call

DOORS = ["--help", "fit --help", "presets", "ls"]
DOORS += [
    f"{verb} --help"
    for verb in ("sweep", "store", "report", "sync", "gate", "push", "init", "show", "rm", "chat", "merge")
]


@pytest.mark.parametrize("verb", DESCRIPTIONS)
def test_every_key_is_one_of_the_parsers_and_none_is_left_out(verb: str) -> None:
    everything = call(verb, "--help", "all").out
    known = {word.split("=")[0].rstrip(",") for word in everything.split() if word.startswith("--")}
    plain = {key for key in known if not key.startswith("--trainer.") and not key.endswith((".help", "+"))}
    said = {f"--{option.key}" for options in verb_options(verb).values() for option in options}
    short = {key.removesuffix(".NAME") for key in said}
    assert short <= known
    # Of groups (`--model CONFIG`) the keys count.
    groups = {"--model", "--data", "--trainer", "--evaluation", "--wandb", "--help", "--config", "--print_config"}
    assert {key for key in plain if key not in groups and key.removeprefix("--").count(".") <= 1} <= short


def test_it_fits_a_hundred_lines_of_80_columns() -> None:
    text = short_help("fit", width=80)
    assert len(text.splitlines()) <= 100
    own = text.partition("\nrun\n")[2].partition("\ntrainer\n")[0]
    assert max(map(len, own.splitlines())) <= 80


@pytest.mark.parametrize("words", DOORS)
def test_no_torch_behind_this_door(words: str) -> None:
    code = (
        "import sys\nfrom residency.__main__ import main\n"
        f"try: main({words.split()})\nexcept SystemExit: pass\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'transformers', 'lightning')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout


def test_completion_knows_verbs_keys_and_presets() -> None:
    import shtab

    script = shtab.complete(completion_parser(), "bash")
    assert all(word in script for word in ("--model.adapter", "dora", "sweep", "quickstart", "--data.batch_size"))
    assert call("completion", "bash").out.strip() == script.strip()

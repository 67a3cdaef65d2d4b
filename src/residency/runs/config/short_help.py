"""`residency fit --help` on one screen or two, read from our sources without importing them: torch stays asleep.

The texts have one home, the docstrings and `add_argument` calls that the parser itself uses; here they are only read.
"""

from __future__ import annotations

import ast
import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["DESCRIPTIONS", "Option", "short_help", "verb_options"]

DESCRIPTIONS = {
    "fit": "Train a stream of domains; after every stage score every domain. The same command goes on after a kill.",
    "validate": "Score a saved stage on the validation rows of every domain.",
    "test": "Score a saved stage on the test rows of every domain.",
    "predict": "Let a saved stage write completions for the test rows of a domain.",
    "export": "Write a saved stage as a folder that plain transformers or PEFT load, with a model card.",
}
_ROOT = Path(__file__).parents[2]
_OPTIONS = "runs/config/options.py"
_LISTS = {  # verb: functions that add its options
    "fit": (),
    "validate": ("add_stage_option",),
    "test": ("add_stage_option",),
    "predict": ("add_stage_option", "add_predict_options"),
    "export": ("add_stage_option", "add_export_options"),
}
_CLASSES = (  # title, file, class, prefix of its keys
    ("model", "engine/module.py", "ContinualModule", "model."),
    ("data", "domains/stream_data.py", "StreamData", "data."),
    ("evaluation", "engine/scoring/settings.py", "EvaluationSettings", "evaluation."),
    ("W&B", "runs/views/wandb_settings.py", "WandbSettings", "wandb."),
)
_NAMED = {"mitigations": ".NAME", "domains": ".NAME", "probes": ".NAME"}
_PRESETS = {"model.adapter": "adapter", "model.objective": "objective", "model.mitigations.NAME": "mitigation"}
_HEAD = """\
usage: residency {verb} [RUN] [--config FILE|NAME ...] [--KEY=VALUE ...]

{description}

  --config FILE|NAME   YAML file or preset (`residency presets config`); several: later ones count more
  --print_config       the complete config of this command
  --KEY.help CLASS     what a class does and takes, for example --model.adapter.help Peft
  --help all           every key, those of Lightning's Trainer too
"""
_TAIL = """\
trainer
  --trainer.KEY  Lightning's Trainer: max_steps, max_epochs, precision, accelerator, devices, strategy,
                 gradient_clip_val, accumulate_grad_batches, logger, ...
                 (https://lightning.ai/docs/pytorch/stable/common/trainer.html)
"""
_DRY_RUN = "  --dry-run            memory by part, tokens, FLOPs; --memory GIB, --measure: docs/devices.md\n"


@dataclass(frozen=True, kw_only=True)
class Option:
    """One key of a command line.

    Args:
        key: With dots, without the dashes.
        text: The first sentence about it.
        default: As Python source; empty where there is none.
    """

    key: str
    text: str
    default: str


def short_help(verb: str, *, width: int | None = None) -> str:
    """The help text of a verb of a run.

    Args:
        verb: `fit`, `validate`, `test`, `predict` or `export`.
        width: Columns; those of the terminal, at most 110, by default.
    """
    columns = width or max(80, min(110, shutil.get_terminal_size().columns))
    parts = [_HEAD.format(verb=verb, description=textwrap.fill(DESCRIPTIONS[verb], columns))]
    parts[0] += _DRY_RUN if verb == "fit" else ""
    for title, options in verb_options(verb).items():
        lines = [line for option in options for line in _lines(option, columns)]
        parts.append("\n".join([title, *lines]) + "\n")
    return "\n".join([*parts, _TAIL])


@cache
def verb_options(verb: str) -> Mapping[str, Sequence[Option]]:
    """The options of a verb by group, without those of Lightning's Trainer."""
    seed = Option(key="seed_everything", text="Seed of everything random in the run", default="0")
    run = [seed, *_added("add_run_options")]
    groups: dict[str, Sequence[Option]] = {}
    if own := [option for function in _LISTS[verb] for option in _added(function)]:
        groups[verb] = own
    groups["run"] = run
    return groups | {title: list(_documented(file, name, prefix)) for title, file, name, prefix in _CLASSES}


def _lines(option: Option, width: int) -> Iterator[str]:
    flag = f"  --{option.key}"
    text = option.text
    if option.default not in ("", "None", "''", "{}", "False"):
        text += f" ({option.default})"
    if kind := _PRESETS.get(option.key):
        text += f" [preset or class; `residency presets {kind}`]"
    wrapped = textwrap.wrap(text, width - 34, break_on_hyphens=False) or [""]
    if len(flag) > 31:
        yield flag
        flag = ""
    yield f"{flag:<33} {wrapped[0]}".rstrip()
    yield from (f"{'':<33} {line}" for line in wrapped[1:])


def _added(function: str) -> Iterator[Option]:
    """What a function adds with `parser.add_argument`."""
    for call in ast.walk(_definition(_OPTIONS, function)):
        if not (isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"):
            continue
        words = {word.arg: word.value for word in call.keywords}
        text = ast.literal_eval(words["help"]) if "help" in words else ""
        default = ast.unparse(words["default"]) if "default" in words else ""
        yield Option(key=ast.literal_eval(call.args[0]).lstrip("-"), text=_sentence(text), default=default)


def _documented(file: str, name: str, prefix: str) -> Iterator[Option]:
    """The arguments of a class, from the `Args:` of its docstring."""
    node = _definition(file, name)
    assert isinstance(node, ast.ClassDef)
    defaults = _defaults(node)
    arguments = re.split(r"\n\s*Args:\n", ast.get_docstring(node) or "")[-1]
    arguments = re.split(r"\n\s*(?:Raises|Returns):\n", arguments)[0]
    for match in re.finditer(r"^    (\w+): (.*(?:\n     +.*)*)", arguments, re.MULTILINE):
        key = f"{prefix}{match[1]}{_NAMED.get(match[1], '')}"
        yield Option(key=key, text=_sentence(match[2]), default=defaults.get(match[1], ""))


def _defaults(node: ast.ClassDef) -> dict[str, str]:
    """Defaults of a dataclass's fields, or of a constructor, where they are plain values."""
    found = {
        field.target.id: field.value
        for field in node.body
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and field.value is not None
    }
    for function in node.body:
        if isinstance(function, ast.FunctionDef) and function.name == "__init__":
            pairs = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
            found |= {argument.arg: value for argument, value in pairs if value is not None}
    return {name: ast.unparse(value) for name, value in found.items() if isinstance(value, ast.Constant)}


@cache
def _definition(file: str, name: str) -> ast.AST:
    tree = ast.parse((_ROOT / file).read_text(encoding="utf-8"))
    return next(node for node in tree.body if getattr(node, "name", None) == name)


def _sentence(text: str) -> str:
    return re.split(r"(?<=[^.])\.(?:\s|$)|;\s", " ".join(text.split()), maxsplit=1)[0]

"""`residency init DIR --data FILE ...`: look at the files, ask nothing, write a config and a study that run."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from residency.core.errors import EXIT_DONE, UserError

if TYPE_CHECKING:
    from residency.core.types import Split
    from residency.study.starter.files import DomainFiles

__all__ = ["init", "init_command"]

_BATCH = 8
_ROOM = 16  # tokens that a template adds, with plenty to spare

_CONFIG = """\
# residency fit --config {folder}/config.yaml
# Written by `residency init`. Learns {order}, and scores every domain after each.
# Another adapter: --model.adapter dora    Against forgetting: --model.mitigations.replay replay
# `residency presets` lists both; --print_config shows every key with its default.
name: {name}
seed_everything: 0
model:
  backbone:
    class_path: residency.backbones.CausalLM
{model}
  adapter: lora
  objective: sft
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{lr: 1.0e-3, weight_decay: 0.01}}   # for LoRA; some 1.0e-5 for `--model.adapter full`
data:
  batch_size: {batch}   # rows per optimizer step
  domains:              # learnt in this order; `order: [b, a]` changes it
{domains}
evaluation:
  accuracy_rows: 64     # rows per domain whose labels all compete; null = every row
  generation_rows: 32   # rows per domain that are written out; null = every row
trainer:
  max_epochs: 1         # passes over each domain: {steps}
  accelerator: auto
"""
_DOMAIN = """\
    {name}:  # {sources}: columns {columns}; {counts} rows{made}
      class_path: residency.domains.Jsonl
      init_args:
        train: {train}
        validation: {validation}
        test: {test}
        kind: {kind}{why}
        max_train: null
        max_validation: null
        max_test: null
        template: {{max_prompt_tokens: {prompt}, max_tokens: {whole}}}   # room for the longest row of any tokenizer
"""
_STUDY = """\
# residency sweep {folder}/study.yaml --dry-run     then without --dry-run
# Written by `residency init`: what is forgotten, and what prevents it? Every value of `mitigation` is one run.
name: {name}
base: config.yaml
axes:
  mitigation:
    none: {{}}
    replay: {{model.mitigations.replay: replay}}
    ewc: {{model.mitigations.ewc: ewc}}
    # An axis takes presets and keys: {{model.mitigations.ewc: ewc, model.mitigations.ewc.strength: 100.0}}
seeds: [0]              # [0, 1, 2]: intervals and tests need several
references: [frozen]    # also independent (every domain alone) and joint (all at once)
baseline: none
"""


def init_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency init`.
    """
    parser = argparse.ArgumentParser(prog="residency init", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="where config.yaml, study.yaml and data/ are written")
    parser.add_argument(
        "--data",
        type=Path,
        nargs="+",
        required=True,
        metavar="FILE",
        help="a domain each, in the order of learning: JSON Lines, JSON, CSV or TSV with columns such as prompt and "
        "completion; NAME-train and NAME-test are splits of one domain",
    )
    parser.add_argument("--model", metavar="PATH", help="folder or hub id; default the packaged model")
    options = parser.parse_args(words)
    for path in init(options.folder, data=options.data, model=options.model):
        print(path)
    print(f"next: residency sweep {options.folder / 'study.yaml'} --dry-run")
    return EXIT_DONE


def init(folder: str | Path, *, data: Sequence[str | Path], model: str | None = None) -> list[Path]:
    """Write a config and a study for these files; the rows are copied into splits that stay as they are.

    Args:
        folder: Made if it is not there.
        data: A domain each, or a split of one, in the order of learning.
        model: Folder or hub id; the packaged model by default.

    Returns:
        config.yaml and study.yaml.

    Raises:
        UserError: There is a config already, or a file cannot be read.
    """
    from residency.study.starter.files import collect

    target = Path(folder)
    config, study = target / "config.yaml", target / "study.yaml"
    if there := [path for path in (config, study) if path.exists()]:
        raise UserError(f"{there[0]} exists", why="nothing is overwritten", fix="give another folder, or remove it")
    domains = collect([Path(path) for path in data])
    texts = [_write_domain(target / "data", domain) for domain in domains]
    name = target.resolve().name
    steps = (f"{domain.name} {math.ceil(len(domain.rows['train']) / _BATCH)} steps" for domain in domains)
    text = _CONFIG.format(
        folder=folder,
        name=json.dumps(name),
        order=", then ".join(domain.name for domain in domains),
        model="    # init_args: {path: FOLDER_OR_HUB_ID}   default: the packaged model"
        if model is None
        else f"    init_args: {{path: {json.dumps(_path(model))}}}",
        batch=_BATCH,
        domains="".join(texts).rstrip(),
        steps=", ".join(steps),
    )
    config.write_text(text, encoding="utf-8")
    study.write_text(_STUDY.format(folder=folder, name=json.dumps(name)), encoding="utf-8")
    return [config, study]


def _path(model: str) -> str:
    """A folder so that it means the same wherever the command runs; a hub id as it is."""
    return str(Path(model).resolve()) if Path(model).expanduser().is_dir() else model


def _write_domain(folder: Path, domain: DomainFiles) -> str:
    """Write the splits; the domain as lines of the config."""
    folder.mkdir(parents=True, exist_ok=True)
    paths: dict[Split, str] = {}
    for split, rows in domain.rows.items():
        path = folder / f"{domain.name}-{split}.jsonl"
        lines = ({"id": f"{split}:{row.id}", "prompt": row.prompt, "completion": row.completion} for row in rows)
        path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
        paths[split] = json.dumps(str(path.resolve())) if rows else "null"
    prompt = domain.longest("prompt") + _ROOM
    return _DOMAIN.format(
        name=domain.name,
        sources=", ".join(path.name for path in domain.sources),
        columns=", ".join(dict.fromkeys(" and ".join(pair) for pair in domain.columns)),
        counts=" + ".join(str(len(domain.rows.get(split, ()))) for split in ("train", "validation", "test")),
        made=" (train + validation + test, dealt out by hash)" if domain.split else "",
        train=paths["train"],
        validation=paths.get("validation", "null"),
        test=paths["test"],
        kind=domain.kind,
        why="   # few different completions, each of them often" if domain.kind == "label" else "",
        prompt=prompt,
        whole=prompt + domain.longest("completion") + _ROOM,
    )

"""`residency doctor CONFIG | FILE...`: what is wrong with data, before a minute of training is paid for."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from residency.core.errors import EXIT_DONE, EXIT_USER, UserError
from residency.core.tensor_files import write_json
from residency.domains.base import Domain
from residency.domains.doctor.clean import write_cleaned
from residency.domains.doctor.examine import examine, open_columns
from residency.domains.doctor.show import print_diagnosis, print_rows
from residency.domains.doctor.tokens import Reader
from residency.runs.data_check import backbone_reader

__all__ = ["doctor_command"]


def doctor_command(words: list[str]) -> int:
    """Carry the command out.

    Args:
        words: What follows `residency doctor`.

    Returns:
        0, or 2 if there is an error (with --strict: or a warning).
    """
    options, keys = _parser().parse_known_args(words)
    domains, probes, reader = _opened(options, keys)
    if options.domain and options.domain not in domains:
        raise UserError(
            f"--domain {options.domain}",
            why=f"there are {', '.join(domains)}",
            fix="give one of these names",
        )
    console = Console(stderr=options.json == "-")
    columns, refused = open_columns(domains, probes=probes, strict=False)
    found = examine(columns, reader, near=True if options.full else None)
    diagnosis = found.narrowed(refused, options.domain)
    print_diagnosis(console, diagnosis)
    if options.show:
        print_rows(console, diagnosis, reader, number=options.show)
    if options.json == "-":
        print(json.dumps(diagnosis.plain(), ensure_ascii=False, indent=1))
    elif options.json:
        write_json(Path(options.json), diagnosis.plain())
    if options.fix:
        for column in diagnosis.columns:
            written = write_cleaned(column, options.output, columns)
            done = ", ".join(f"{n} {what}" for what, n in written["done"].items()) or "nothing had to be done"
            console.print(f"{column.name}: {done}; written: {', '.join(written['files'])}", soft_wrap=True)
    bad = diagnosis.errors or (options.strict and [f for f in diagnosis.findings if f.severity == "warning"])
    return EXIT_USER if bad else EXIT_DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="residency doctor", description=__doc__)
    flag = parser.add_argument
    flag("paths", nargs="+", type=Path, help="a config (.yaml), or files: train, [validation,] test")
    flag("--show", type=int, default=0, metavar="N", help="print N rows of a split as the model reads them")
    flag("--json", metavar="FILE", help="write the findings as JSON; - for the standard output")
    flag("--full", action="store_true", help="compare all pairs of scored and training rows, however many")
    flag("--strict", action="store_true", help="exit with 2 for a warning too")
    flag("--domain", help="only this one")
    flag("--fix", action="store_true", help="write a cleaned copy to --output; originals stay as they are")
    flag("--output", type=Path, default=Path("cleaned"), help="folder of the cleaned copy")
    flag("--model", help="with files: folder or hub id of the model whose tokenizer is used; default the packaged one")
    flag("--kind", choices=("label", "generative"), default="generative", help="with files: what the completions are")
    return parser


def _opened(options: argparse.Namespace, keys: list[str]) -> tuple[dict[str, Domain], frozenset[str], Reader]:
    """Domains by name, names of the probes, tokenizer."""
    if options.paths[0].suffix in (".yaml", ".yml"):
        from residency.runs.cli import parse

        configs = [word for path in options.paths for word in ("--config", str(path))]
        cli = parse(["fit", *configs, *keys])
        data, backbone = cli.datamodule, cli.model.backbone.for_stream(cli.datamodule)
        return dict(data.columns), frozenset(data.probes), backbone_reader(backbone)
    if keys:
        raise UserError(
            f"residency doctor ... {keys[0]}",
            why="there is no such option for files",
            fix="`residency doctor --help` lists the options",
        )
    from residency.backbones import CausalLM

    backbone = CausalLM(path=options.model) if options.model else CausalLM()
    return {"data": _files(options.paths, options.kind)}, frozenset(), backbone_reader(backbone)


def _files(paths: list[Path], kind: Any) -> Domain:
    from residency.domains.jsonl import Jsonl

    if len(paths) not in (2, 3):
        raise UserError(
            f"{len(paths)} files",
            why="the first is trained on, the last is the test; one between them is for validation",
            fix="give two or three files, or a config",
        )
    names: Mapping[str, Any] = {"train": str(paths[0]), "test": str(paths[-1])}
    middle = {"validation": str(paths[1])} if len(paths) == 3 else {}
    return Jsonl(**names, **middle, kind=kind, max_train=None, max_validation=None, max_test=None)

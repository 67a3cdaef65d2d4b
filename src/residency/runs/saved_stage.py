"""Using a stage that lies on disk: score it again, or let it write."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from residency.core.errors import UserError
from residency.core.tensor_files import write_json
from residency.core.types import Row, Split
from residency.engine.scoring.evaluation import evaluate
from residency.engine.scoring.row_scores import Evaluation, means
from residency.engine.serving import served_of
from residency.runs.folder import RunFolder
from residency.runs.stream import check_stream

if TYPE_CHECKING:
    from residency.domains.stream_data import StreamData
    from residency.engine.module import ContinualModule

__all__ = ["load_stage", "predict_saved", "score_saved"]


def load_stage(module: ContinualModule, data: StreamData, folder: RunFolder, *, stage: int | None, seed: int) -> int:
    """Bring a module to a saved stage.

    Args:
        module: Built here if it is not yet.
        data: Names the stages.
        folder: The run.
        stage: 0 = base, 1 ... T; `None` = the last one that is saved.
        seed: The run's seed.

    Returns:
        The stage that was loaded.

    Raises:
        UserError: The stage does not exist.
    """
    folders = [folder.stage(k + 1, name) for k, name in enumerate(data.order)]
    saved = [k for k, path in enumerate(folders, 1) if (path / "state.safetensors").is_file()]
    chosen = (saved[-1] if saved else -1) if stage is None else stage
    if chosen not in (0, *saved) or (stage is None and not saved):
        raise UserError(
            f"stage {'(last)' if stage is None else stage} of {folder.path}; saved stages: {saved or 'none'}",
            why="there is no state of that stage on disk",
            fix="give --stage 0 for the untrained model or one that is saved; or check --run_dir; "
            "`residency fit` with the same config trains what is missing",
        )
    module.backbone = module.backbone.for_stream(data)
    module.build(seed=seed)
    if chosen:
        module.adapter.load_state(module.model, served_of(folder.load_state(folders[chosen - 1])))
    return chosen


def score_saved(
    *,
    module: ContinualModule,
    data: StreamData,
    folder: RunFolder,
    settings: Any,
    stage: int | None,
    split: Split,
    device: torch.device,
) -> dict[str, Any]:
    """Score a saved stage on one split of every domain and write `scores-<split>-<stage>.json`.

    Returns:
        {"stage", "split", "means": {scorer: {column: mean}}}.
    """
    check_stream(data)
    _needs_rows(data, split)
    chosen = load_stage(module, data, folder, stage=stage, seed=settings.seed)
    module.to(device)
    scores: Evaluation = evaluate(module, data, split=split, settings=settings.evaluation, learned=chosen)
    found = {"stage": chosen, "split": split, "means": means(scores)}
    try:
        write_json(folder.path / f"scores-{split}-{chosen}.json", found)
    except UserError as error:
        # They are printed all the same: somebody else's run may not be writable.
        folder.on_message(f"the scores are not kept: {error.got}")
    return found


def predict_saved(
    *,
    module: ContinualModule,
    data: StreamData,
    folder: RunFolder,
    stage: int | None,
    seed: int,
    domain: str | None,
    limit: int | None,
    prompts: str | None = None,
    device: torch.device,
) -> list[Mapping[str, str]]:
    """Let a saved stage complete test prompts of a domain, or prompts from a file with the domain's template.

    Returns:
        [{"row", "prompt", "completion" (the reference; empty for prompts from a file), "written"}].

    Raises:
        UserError: There is no such domain, or the file cannot be read.
    """
    name = domain or data.order[0]
    if name not in data.columns:
        raise UserError(
            f"--domain {name!r}; there are {', '.join(data.columns)}",
            why="only a domain or a probe of the config has prompts",
            fix="give one of these names",
        )
    given = None if prompts is None else _read_prompts(Path(prompts))[:limit]
    load_stage(module, data, folder, stage=stage, seed=seed)
    module.to(device)
    source = data.columns[name]
    rows = given or source.rows("test")[:limit]
    tokenizer = module.backbone.tokenizer
    encode = partial(source.template.encode, tokenizer, domain=name, split="test")
    examples = [encode(row=row).last_turn() for row in rows]
    references = examples if given is None else [encode(row=row).last_turn() for row in source.rows("test")[:limit]]
    # A quarter more than the longest reference: who writes more goes round in circles.
    length = max([32, *(len(example.completion) * 5 // 4 + 1 for example in references)])
    written = _write(module, [example.prompt for example in examples], length)
    texts: Sequence[str] = [tokenizer.decode(ids).strip() for ids in written]
    return [
        {"row": row.id, "prompt": row.prompt, "completion": row.completion, "written": text}
        for row, text in zip(rows, texts, strict=True)
    ]


def _read_prompts(path: Path) -> list[Row]:
    """A row per line: an object with a prompt, or the line itself."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        if path.suffix == ".jsonl":
            texts = [str(json.loads(line)["prompt"]) for line in lines if line.strip()]
        else:
            texts = [line for line in lines if line.strip()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"--prompts {path}: {type(error).__name__} {error}",
            why="every line holds a prompt",
            fix='give a text file of one prompt per line, or a .jsonl file of {"prompt": "..."}',
        ) from error
    return [Row(id=str(number), prompt=text, completion="") for number, text in enumerate(texts, 1)]


def _write(module: ContinualModule, prompts: Sequence[Sequence[int]], length: int) -> list[list[int]]:
    if not prompts:
        return []
    return module.backbone.generate(module.model.eval(), prompts, max_new_tokens=length, layout=module.layout)


def _needs_rows(data: StreamData, split: Split) -> None:
    empty = [name for name, domain in data.columns.items() if not domain.rows(split)]
    if empty:
        raise UserError(
            f"no {split} rows in {', '.join(empty)}",
            why="there is nothing to score",
            fix="give the domain a validation file or raise max_validation",
        )

"""Scoring one state on every domain: one pass of likelihoods, one of generation."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from residency.adapters.base import changes
from residency.core.types import Example, Split
from residency.domains.base import Domain
from residency.domains.stream_data import StreamData
from residency.engine.module import ContinualModule
from residency.engine.scoring.likelihoods import completion_nll, completions_and_labels, prompt_nll
from residency.scorers.base import SCORERS, exact_match, rouge_l

__all__ = ["Evaluation", "EvaluationSettings", "RowScore", "evaluate", "means"]

MERGE_FROM_TOKENS = 256  # of one column's rows; below, folding an adapter in costs more than it saves

Advance = Callable[[str, int], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How states are scored.

    Args:
        batch_tokens: Tokens per forward pass; changes speed and memory, not scores (beyond rounding).
        accuracy_rows: Rows per domain whose labels all compete for accuracy; `null` = every row. The price of a row
            is that of its labels: 22 long ones cost up to seven plain rows.
        generation_rows: Rows per domain that are generated for exact_match and rougeL; `null` = every row.
        generation_batch: Prompts that are continued together.
    """

    batch_tokens: int = 1024
    accuracy_rows: int | None = None
    generation_rows: int | None = None
    generation_batch: int = 48


@dataclass(frozen=True, slots=True)
class RowScore:
    """One score of one row.

    Args:
        column: Domain or probe.
        row: `Row.id`.
        scorer: Name.
        value: The score; `nll` is the mean over the row's tokens.
        tokens: Completion tokens, the weight of `nll`.
    """

    column: str
    row: str
    scorer: str
    value: float
    tokens: int


Evaluation = list[RowScore]


def evaluate(
    module: ContinualModule,
    data: StreamData,
    *,
    split: Split,
    settings: EvaluationSettings,
    columns: Sequence[str] | None = None,
    advance: Advance = lambda column, rows: None,
) -> Evaluation:
    """Score the module's current state. Leaves it as it was: mode, gradients and random state included.

    Args:
        module: Built.
        data: Domains and probes.
        split: Which rows.
        settings: Batch sizes.
        columns: Names to score; all by default.
        advance: Called with (column, rows done) for progress.

    Returns:
        Every score of every row.
    """
    training = module.model.training
    module.model.eval()
    scores: Evaluation = []
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), _Folding(module) as folding:
            for name in columns or data.columns:
                domain = data.columns[name]
                tokenizer = module.backbone.tokenizer
                examples = data.evaluation_examples(name, split, tokenizer, competing=settings.accuracy_rows)
                generated = {e.row for e in examples[: settings.generation_rows]}
                for context, group in module.adapter.route(module.model, name, examples, partial(prompt_nll, module)):
                    with context, folding.of(group):
                        scores += _likelihoods(module, domain, group, settings, advance)
                        if any(SCORERS[s].needs == "generation" for s in domain.scorers):
                            written = [e for e in group if e.row in generated]
                            scores += _generations(module, domain, written, split, settings)
                scores += _extra(module, name, examples)
    finally:
        module.model.train(training)
    return scores


class _Folding:
    """The adapter's faster form, where a group's tokens repay what it costs; a function of the group's rows alone.

    Kept from one group to the next, unless the adapter answers groups by different parts of itself.
    """

    def __init__(self, module: ContinualModule) -> None:
        self._module = module
        self._stays = not (changes(module.adapter, "route") or changes(module.adapter, "extra_scores"))
        self._open = ExitStack()
        self._folded = False

    def __enter__(self) -> _Folding:
        return self

    def __exit__(self, *error: object) -> None:
        self._fold(False)

    @contextmanager
    def of(self, group: Sequence[Example]) -> Iterator[None]:
        """The form in which these rows are scored."""
        self._fold(sum(map(len, group)) >= MERGE_FROM_TOKENS)
        try:
            yield
        finally:
            if not self._stays:
                self._fold(False)

    def _fold(self, wanted: bool) -> None:
        if wanted and not self._folded:
            self._open.enter_context(self._module.adapter.folded_for_scoring(self._module.model))
        if self._folded and not wanted:
            self._open.close()
        self._folded = wanted


def means(scores: Evaluation) -> dict[str, dict[str, float]]:
    """{scorer: {column: mean}}: over rows, for likelihoods over tokens."""
    sums: dict[tuple[str, str], float] = defaultdict(float)
    weights: dict[tuple[str, str], int] = defaultdict(int)
    for score in scores:
        weight = score.tokens if SCORERS[score.scorer].per_token else 1
        sums[score.scorer, score.column] += weight * score.value
        weights[score.scorer, score.column] += weight
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for (scorer, column), total in sums.items():
        found[scorer][column] = total / weights[scorer, column]
    return dict(found)


def _extra(module: ContinualModule, column: str, examples: Sequence[Example]) -> Evaluation:
    """What the adapter scores beside."""
    functions = partial(completion_nll, module), partial(prompt_nll, module)
    found = module.adapter.extra_scores(module.model, column, examples, *functions)
    return [
        RowScore(e.domain, e.row, scorer, float(value), len(e.completion))
        for scorer, values in found.items()
        for e, value in zip(examples, values, strict=True)
    ]


def _likelihoods(
    module: ContinualModule,
    domain: Domain,
    examples: Sequence[Example],
    settings: EvaluationSettings,
    advance: Advance,
) -> Evaluation:
    wanted = [s for s in domain.scorers if SCORERS[s].needs == "likelihood"]
    found = completions_and_labels(module, examples, batch_tokens=settings.batch_tokens, advance=advance)
    scores = []
    for example in examples:
        nll, best = found[example.row]
        tokens = len(example.completion)
        if "nll" in wanted:
            scores.append(RowScore(example.domain, example.row, "nll", nll / tokens, tokens))
        if "accuracy" in wanted and example.alternatives:
            scores.append(RowScore(example.domain, example.row, "accuracy", float(best), tokens))
    return scores


def _generations(
    module: ContinualModule,
    domain: Domain,
    examples: Sequence[Example],
    split: Split,
    settings: EvaluationSettings,
) -> Evaluation:
    tokenizer = module.backbone.tokenizer
    ordered = sorted(examples, key=lambda e: len(e.prompt))
    texts: dict[str, str] = {}
    if not examples:
        return []
    # Whoever writes more than the longest reference has not written it exactly, and need not be waited for.
    limit = max(len(e.completion) for e in examples)
    for first in range(0, len(ordered), settings.generation_batch):
        group = ordered[first : first + settings.generation_batch]
        prompts = [e.prompt for e in group]
        written = module.backbone.generate(module.model, prompts, max_new_tokens=limit, layout=module.layout)
        texts |= {e.row: tokenizer.decode(ids) for e, ids in zip(group, written, strict=True)}
    targets = {row.id: row.completion for row in domain.rows(split)}
    predictions = [texts[e.row].strip() for e in examples]
    scores = []
    if "exact_match" in domain.scorers:
        scores += [("exact_match", exact_match(p, targets[e.row])) for e, p in zip(examples, predictions, strict=True)]
    if "rougeL" in domain.scorers:
        scores += [("rougeL", v) for v in rouge_l(predictions, [targets[e.row] for e in examples])]
    rows = [*examples, *examples][: len(scores)]
    return [RowScore(e.domain, e.row, s, v, len(e.completion)) for e, (s, v) in zip(rows, scores, strict=True)]

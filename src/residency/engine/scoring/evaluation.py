"""Scoring one state on every domain: one pass of likelihoods, one of generation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from residency.adapters.base import changes
from residency.core.ranks import spread
from residency.core.types import Example, Row, Split
from residency.domains.base import Domain
from residency.domains.stream_data import StreamData
from residency.domains.written_form import as_written
from residency.engine.module import ContinualModule
from residency.engine.scoring.likelihoods import (
    branch_nll,
    completion_nll,
    completions_and_labels,
    pair_rewards,
    prompt_nll,
    text_nll,
)
from residency.engine.scoring.row_scores import Evaluation, RowScore
from residency.engine.scoring.settings import EvaluationSettings
from residency.scorers.base import Answer, LabelScore, Scorer

__all__ = ["evaluate"]

MERGE_FROM_TOKENS = 256  # of one column's rows; below, folding an adapter in costs more than it saves

Advance = Callable[[str, int], None]


def evaluate(
    module: ContinualModule,
    data: StreamData,
    *,
    split: Split,
    settings: EvaluationSettings,
    columns: Sequence[str] | None = None,
    learned: int = 0,
    advance: Advance = lambda column, rows: None,
) -> Evaluation:
    """Score the module's current state. Leaves it as it was: mode, gradients and random state included.

    Args:
        module: Built.
        data: Domains and probes.
        split: Which rows.
        settings: Batch sizes.
        columns: Names to score; all by default.
        learned: After how many stages: says which labels compete (`data.classes`).
        advance: Called with (column, rows done) for progress.

    Returns:
        Every score of every row.
    """
    training, begun = module.model.training, module.backbone.learned
    module.model.eval()
    module.backbone.learned = learned
    scores: Evaluation = []
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]), _Folding(module) as folding:
            for name in columns or data.columns:
                domain = data.columns[name]
                tokenizer = module.backbone.tokenizer
                most = settings.accuracy_rows
                examples = data.evaluation_examples(name, split, tokenizer, competing=most, learned=learned)
                labels = data.labels(name, learned)
                generated = {e.row for e in examples[: settings.generation_rows]}
                answers: dict[str, Answer] = {}
                for context, group in module.adapter.route(module.model, name, examples, partial(prompt_nll, module)):
                    with context, folding.of(group):
                        found = _likelihoods(module, domain, group, labels, settings, advance)
                        if any(s.needs != "likelihood" for s in domain.scorers.values()):
                            written = [e for e in group if e.row in generated]
                            found = _with_texts(found, _generations(module, written, settings))
                        answers |= found
                scores += _judged(domain, examples, answers, split, tokenizer)
                scores += _extra(module, name, examples)
    finally:
        module.model.train(training)
        module.backbone.learned = begun
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


def _extra(module: ContinualModule, column: str, examples: Sequence[Example]) -> Evaluation:
    """What the adapter scores beside."""
    functions = partial(completion_nll, module), partial(prompt_nll, module)
    found = module.adapter.extra_scores(module.model, column, examples, *functions)
    weighed = {name for name, info in module.adapter.scorers.items() if info.per_token}
    return [
        RowScore(e.domain, e.row, scorer, float(value), tokens, tokens if scorer in weighed else 1)
        for scorer, values in found.items()
        for e, value in zip(examples, values, strict=True)
        for tokens in [e.targets]
    ]


def _likelihoods(
    module: ContinualModule,
    domain: Domain,
    examples: Sequence[Example],
    names: Sequence[str],
    settings: EvaluationSettings,
    advance: Advance,
) -> dict[str, Answer]:
    """{row: what the likelihoods say}, as much of it as the domain's scorers read."""
    budget, scorers = settings.batch_tokens, domain.scorers.values()
    # A prompt alone has no likelihood to read.
    bare, examples = [e.row for e in examples if not e.branches], [e for e in examples if e.branches]
    found = completions_and_labels(module, examples, batch_tokens=budget, advance=advance)
    everything = [e for e in examples if e.alternatives] if any(s.labels == "all" for s in scorers) else []
    nll = branch_nll(module, everything, batch_tokens=budget)
    rows = {row.id: row for row in domain.rows(everything[0].split)} if everything else {}
    labels = {e.row: _label_scores(rows[e.row], e, names, nll[e.row].tolist()) for e in everything}
    texts = text_nll(module, examples, batch_tokens=budget) if any(s.text_likelihood for s in scorers) else {}
    asked = {getattr(scorer, "token", None) for scorer in scorers if scorer.rewards}
    worth = {token: pair_rewards(module, examples, token=token, batch_tokens=budget) for token in asked}
    return {row: Answer() for row in bare} | {
        e.row: Answer(
            nll=found[e.row][0],
            tokens=e.targets,
            best=found[e.row][1] if e.alternatives else None,
            labels=labels.get(e.row, {}),
            rewards={token: of_row[e.row] for token, of_row in worth.items()},
            **texts.get(e.row, {}),
        )
        for e in examples
    }


def _label_scores(row: Row, example: Example, names: Sequence[str], nll: Sequence[float]) -> dict[str, LabelScore]:
    """Of every label, the row's own first, then the others in the order in which the template encoded them; of a pair,
    the chosen answer and the rejected one.
    """
    tokens = [example.completion, *example.alternatives]
    others = (row.rejected,) if row.kind == "pair" else names
    texts = [row.completion, *(label for label in others if label != row.completion)]
    return {
        text: LabelScore(nll=value, tokens=len(ids), bytes=len(text.encode()))
        for text, ids, value in zip(texts, tokens, nll, strict=True)
    }


def _generations(
    module: ContinualModule, examples: Sequence[Example], settings: EvaluationSettings
) -> dict[str, tuple[str, bool]]:
    """{row: (what the model writes, stripped; whether it ended by itself)}."""
    tokenizer = module.backbone.tokenizer
    # Of a conversation the last answer is written: everything before it is given.
    examples = [e.last_turn() for e in examples]
    ordered = sorted(examples, key=lambda e: len(e.prompt))
    texts: dict[str, tuple[str, bool]] = {}
    if not examples:
        return {}
    # Whoever writes more than the longest reference has not written it exactly, and need not be waited for.
    limit = max(len(e.completion) for e in examples) or settings.generation_tokens
    groups = [ordered[i : i + settings.generation_batch] for i in range(0, len(ordered), settings.generation_batch)]

    def write(group: Sequence[Example]) -> list[list[int]]:
        prompts = [e.prompt for e in group]
        written = module.backbone.generate(module.model, prompts, max_new_tokens=limit, layout=module.layout)
        return [list(map(int, ids)) for ids in written]

    for group, written in zip(groups, spread(write, groups), strict=True):
        texts |= {
            e.row: (tokenizer.decode(ids).strip(), len(ids) < limit) for e, ids in zip(group, written, strict=True)
        }
    return texts


def _with_texts(answers: Mapping[str, Answer], texts: Mapping[str, tuple[str, bool]]) -> dict[str, Answer]:
    return {
        row: replace(answer, text=texts[row][0], ended=texts[row][1]) if row in texts else answer
        for row, answer in answers.items()
    }


def _judged(
    domain: Domain, examples: Sequence[Example], answers: Mapping[str, Answer], split: Split, tokenizer: Any
) -> Evaluation:
    """The scores of every scorer on the rows that it can judge; texts are held against what can be written."""
    rows = {row.id: row for row in domain.rows(split)}
    writable = {e.row: as_written(rows[e.row], tokenizer) for e in examples if answers[e.row].text is not None}
    scores: Evaluation = []
    for name, scorer in domain.scorers.items():
        # An answer that is not wanted is nothing to be good at.
        able = [e for e in examples if rows[e.row].wanted and _judges(scorer, answers[e.row])]
        asked = writable if scorer.needs == "generation" else rows
        of, own = [asked[e.row] for e in able], [answers[e.row] for e in able]
        judged = zip(able, scorer(of, own), scorer.weights(of, own), strict=True)
        ends = scorer.needs == "likelihood"
        scores += [
            RowScore(e.domain, e.row, name, float(v), e.targets, int(w), ends or answers[e.row].ended)
            for e, v, w in judged
        ]
    return scores


def _judges(scorer: Scorer, answer: Answer) -> bool:
    """Whether all that a scorer reads is there: not every row is generated, and not every row has other labels."""
    written = scorer.needs == "likelihood" or answer.text is not None
    spelt = not scorer.text_likelihood or answer.text_bytes > 0
    return written and spelt and (scorer.labels == "none" or answer.best is not None)

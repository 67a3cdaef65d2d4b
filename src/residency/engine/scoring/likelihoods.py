"""Likelihoods of completions and labels: one pass over all rows, and a second one for labels that may still win."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from residency.core.batching import by_token_budget, make_batch
from residency.core.ranks import spread
from residency.core.types import Example
from residency.engine.module import ContinualModule
from residency.objectives.reward_model import asked_behind, branch_rewards, reward_token
from residency.scorers.likelihood import label_is_best

__all__ = ["branch_nll", "completion_nll", "completions_and_labels", "pair_rewards", "prompt_nll", "text_nll"]

EXTRA_TOKENS = 1024  # per pass of `completion_nll`


def branch_nll(module: ContinualModule, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, Tensor]:
    """{row: (branches,) summed negative log-likelihood of each branch, in nats, float64}."""
    found: dict[str, Tensor] = {}
    # Rows of one length together: nothing is wasted where batches must be padded.
    groups = list(by_token_budget(sorted(examples, key=len), tokens=batch_tokens))
    for group, nll in zip(groups, spread(partial(_branch_nll, module), groups, one_pass=True), strict=True):
        found |= zip((e.row for e in group), map(_float64, nll), strict=True)
    return found


def completions_and_labels(
    module: ContinualModule,
    examples: Sequence[Example],
    *,
    batch_tokens: int,
    advance: Callable[[str, int], None] = lambda column, rows: None,
) -> dict[str, tuple[float, bool]]:
    """{row: (summed nats of the completion, whether it is likelier than every alternative)}.

    What follows the first token of a label can only make it less likely, and first tokens cost nothing: the last
    position of the prompt predicts all of them. So a label whose first token alone is less likely than the whole
    completion has lost, and is not read; of the others, one that is likelier settles the row (`_beaten`). Where
    prompts are long and labels short, reading a prompt twice would cost more than that saves, and all is done at once.
    """
    # Padded, every label is a row of its own with the whole prompt in it: then nothing is free.
    looks = {e.row: _first_look(e) if module.layout == "packed" else e for e in examples}
    found: dict[str, Tensor] = {}
    groups = list(by_token_budget(sorted(looks.values(), key=len), tokens=batch_tokens))

    def read(group: Sequence[Example]) -> list[list[float]]:
        nll = _branch_nll(module, group)
        advance(group[0].domain, len(group))
        return nll

    for group, nll in zip(groups, spread(read, groups, one_pass=True), strict=True):
        found |= zip((e.row for e in group), map(_float64, nll), strict=True)
    contests = [_contest(e, found[e.row]) for e in examples if looks[e.row] is not e]
    beaten = _beaten(module, [c for c in contests if c.open], batch_tokens=batch_tokens)
    beaten |= {e.row for e in examples if looks[e.row] is e and not label_is_best(found[e.row])}
    return {e.row: (float(found[e.row][0]), e.row not in beaten) for e in examples}


def _first_look(example: Example) -> Example:
    """The example with its labels' first tokens only, if that can save more than reading the prompt again costs."""
    if sum(len(tokens) - 1 for tokens in example.alternatives) <= len(example.prompt):
        return example
    return example.competing([tokens[:1] for tokens in example.alternatives])


@dataclass(frozen=True, slots=True, kw_only=True)
class _Contest:
    """A row and the labels that may still be as likely as its completion.

    Args:
        example: The row.
        own: Summed nats of its completion.
        open: {label: nats of its first token}.
    """

    example: Example
    own: float
    open: dict[tuple[int, ...], float]

    def ask(self, labels: Sequence[tuple[int, ...]]) -> Example:
        """The row with labels in place of its completion."""
        return self.example.answered(labels[0], labels[1:])

    def lost_to(self, nll: Tensor) -> bool:
        """Whether one of the labels is at least as likely; what is no number is no victory."""
        return not bool((nll > self.own).all())


def _contest(example: Example, nll: Tensor) -> _Contest:
    """(1 + alternatives,) nats of the completion and of the labels' first tokens -> what is still open."""
    firsts = zip(example.alternatives, nll[1:].tolist(), (nll[1:] > nll[0]).tolist(), strict=True)
    return _Contest(example=example, own=float(nll[0]), open={label: first for label, first, out in firsts if not out})


def _beaten(module: ContinualModule, contests: Sequence[_Contest], *, batch_tokens: int) -> set[str]:
    """Rows for which some label is as likely as the completion.

    One such label is proof enough, and the prompt hardly matters for how a label goes on behind its first token. So
    one row's labels are read to learn that, then every other row's most promising label, and all of them only where
    that one has not won: a quarter to a third of the tokens, on 22 labels of 9 tokens.
    """
    if not contests:
        return set()
    widest = max(contests, key=lambda c: len(c.open))
    labels = tuple(widest.open)
    nll = branch_nll(module, [widest.ask(labels)], batch_tokens=batch_tokens)[widest.example.row]
    beaten = {widest.example.row} if widest.lost_to(nll) else set()
    rest = dict(zip(labels, (nll - nll.new_tensor([*widest.open.values()])).tolist(), strict=True))
    unseen = sum(rest.values()) / len(rest)
    others = {c.example.row: c for c in contests if c is not widest}
    likeliest = {}
    for row, c in others.items():
        whole = {label: first + rest.get(label, unseen) for label, first in c.open.items()}
        likeliest[row] = min(whole, key=whole.__getitem__)
    beaten |= _losers(module, [(c, [likeliest[row]]) for row, c in others.items()], batch_tokens=batch_tokens)
    left = [
        (c, [label for label in c.open if label != likeliest[row]]) for row, c in others.items() if row not in beaten
    ]
    return beaten | _losers(module, left, batch_tokens=batch_tokens)


def _losers(
    module: ContinualModule, asked: Sequence[tuple[_Contest, Sequence[tuple[int, ...]]]], *, batch_tokens: int
) -> set[str]:
    """Rows that lose to one of the labels they are asked about."""
    examples = [contest.ask(labels) for contest, labels in asked if labels]
    found = branch_nll(module, examples, batch_tokens=batch_tokens)
    return {c.example.row for c, labels in asked if labels and c.lost_to(found[c.example.row])}


def completion_nll(module: ContinualModule, examples: Sequence[Example]) -> Tensor:
    """(B,) mean negative log-likelihood of each completion's supervised tokens, in nats."""
    rows = [replace(e.alone(), row=str(i)) for i, e in enumerate(examples)]
    found = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        scored = [e for e in rows if e.targets]
        for row, nll in branch_nll(module, scored, batch_tokens=EXTRA_TOKENS).items():
            found[int(row)] = nll[0] / rows[int(row)].targets
    return found


def text_nll(module: ContinualModule, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, dict[str, Any]]:
    """{row: {"text_nll": nats of the completion without its end token, "text_bytes": UTF-8 bytes that it spells}}.

    What is left of a completion that was cut has no end token and counts whole; a row of nothing but an end token is
    left out.
    """
    tokenizer = module.backbone.tokenizer
    end = tokenizer.eos_token_id
    examples = [e.last_turn() for e in examples]
    texts = {e.row: e.completion[:-1] if e.completion[-1] == end else e.completion for e in examples}
    kept = [e.answered(texts[e.row]) for e in examples if texts[e.row]]
    nll = branch_nll(module, kept, batch_tokens=batch_tokens)
    return {
        e.row: {"text_nll": float(nll[e.row][0]), "text_bytes": len(tokenizer.decode(e.completion).encode())}
        for e in kept
    }


def pair_rewards(
    module: ContinualModule, examples: Sequence[Example], *, token: str | None, batch_tokens: int
) -> dict[str, tuple[float, float]]:
    """{row: what a reward model gives the chosen answer and the rejected one}, of the pairs among the rows."""
    place = reward_token(module.backbone.tokenizer, token)
    pairs = [asked_behind(e, place) for e in examples if [b.role for b in e.branches] == ["chosen", "rejected"]]
    found: dict[str, tuple[float, float]] = {}
    for group in by_token_budget(sorted(pairs, key=len), tokens=batch_tokens):
        batch = make_batch(group, layout=module.layout).to(module.device)
        rewards = branch_rewards(module.forward(batch), batch).tolist()
        found |= {e.row: (chosen, rejected) for e, (chosen, rejected) in zip(group, rewards, strict=True)}
    return found


def prompt_nll(module: ContinualModule, examples: Sequence[Example]) -> Tensor:
    """(B,) mean negative log-likelihood of each prompt's tokens after its first one, in nats; 0 for a single token."""
    return completion_nll(module, [replace(e, prompt=e.prompt[:1]).answered(e.prompt[1:]) for e in examples])


_float64 = partial(torch.tensor, dtype=torch.float64)


def _branch_nll(module: ContinualModule, group: Sequence[Example]) -> list[list[float]]:
    batch = make_batch(group, layout=module.layout).to(module.device)
    nll = module.backbone.target_nll(module.model, batch).double()
    width = int(batch.target_branch.max()) + 1
    table = nll.new_zeros(batch.size * width).index_add(0, batch.target_example * width + batch.target_branch, nll)
    rows: list[list[float]] = table.view(batch.size, width).tolist()
    return [row[: len(example.branches)] for row, example in zip(rows, group, strict=True)]

"""Likelihoods of completions and labels: one pass over all rows, and a second one for labels that may still win."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from residency.batching import by_token_budget, make_batch
from residency.module import ContinualModule
from residency.scorers import label_is_best
from residency.types import Example

__all__ = ["branch_nll", "completion_nll", "completions_and_labels", "prompt_nll"]

EXTRA_TOKENS = 1024  # per pass of `completion_nll`


def branch_nll(module: ContinualModule, examples: Sequence[Example], *, batch_tokens: int) -> dict[str, Tensor]:
    """{row: (1 + alternatives,) summed negative log-likelihood of each branch, in nats, float64}."""
    found: dict[str, Tensor] = {}
    # Rows of one length together: nothing is wasted where batches must be padded.
    for group in by_token_budget(sorted(examples, key=len), tokens=batch_tokens):
        found |= zip((e.row for e in group), _branch_nll(module, group), strict=True)
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
    completion has lost, and is not read. Where prompts are long and labels short, reading a prompt twice would cost
    more than that saves, and all is done at once.
    """
    # Padded, every label is a row of its own with the whole prompt in it: then nothing is free.
    looks = {e.row: _first_look(e) if module.layout == "packed" else e for e in examples}
    found: dict[str, Tensor] = {}
    for group in by_token_budget(sorted(looks.values(), key=len), tokens=batch_tokens):
        found |= zip((e.row for e in group), _branch_nll(module, group), strict=True)
        advance(group[0].domain, len(group))
    open_rows = [rest for e in examples if looks[e.row] is not e and (rest := _undecided(e, found[e.row])) is not None]
    labels = branch_nll(module, open_rows, batch_tokens=batch_tokens)
    result = {}
    for example in examples:
        own, others = found[example.row][:1], found[example.row][1:]
        if looks[example.row] is not example:
            others = labels.get(example.row, others[:0])
        result[example.row] = float(own), label_is_best(torch.cat([own, others]))
    return result


def _first_look(example: Example) -> Example:
    """The example with its labels' first tokens only, if that can save more than reading the prompt again costs."""
    if sum(len(tokens) - 1 for tokens in example.alternatives) <= len(example.prompt):
        return example
    return replace(example, alternatives=tuple(tokens[:1] for tokens in example.alternatives))


def _undecided(example: Example, nll: Tensor) -> Example | None:
    """The labels that may still be as likely as the completion, as branches of the prompt; `None` if there are none.

    Args:
        example: With all labels.
        nll: (1 + alternatives,) of the completion and of the labels' first tokens.
    """
    lost = (nll[1:] > nll[0]).tolist()
    left = [tokens for tokens, out in zip(example.alternatives, lost, strict=True) if not out]
    return replace(example, completion=left[0], alternatives=tuple(left[1:])) if left else None


def completion_nll(module: ContinualModule, examples: Sequence[Example]) -> Tensor:
    """(B,) mean negative log-likelihood of each completion's tokens, in nats."""
    rows = [replace(e, row=str(i), alternatives=()) for i, e in enumerate(examples)]
    found = torch.zeros(len(rows), dtype=torch.float64)
    with torch.no_grad():
        scored = [e for e in rows if e.completion]
        for row, nll in branch_nll(module, scored, batch_tokens=EXTRA_TOKENS).items():
            found[int(row)] = nll[0] / len(rows[int(row)].completion)
    return found


def prompt_nll(module: ContinualModule, examples: Sequence[Example]) -> Tensor:
    """(B,) mean negative log-likelihood of each prompt's tokens after its first one, in nats; 0 for a single token."""
    return completion_nll(
        module, [replace(e, prompt=e.prompt[:1], completion=e.prompt[1:], alternatives=()) for e in examples]
    )


def _branch_nll(module: ContinualModule, group: Sequence[Example]) -> list[Tensor]:
    batch = make_batch(group, layout=module.layout).to(module.device)
    nll = module.backbone.target_nll(module.model, batch).double()
    width = int(batch.target_branch.max()) + 1
    table = nll.new_zeros(batch.size * width).index_add(0, batch.target_example * width + batch.target_branch, nll)
    rows = table.view(batch.size, width).cpu()
    return [row[: 1 + len(example.alternatives)] for row, example in zip(rows, group, strict=True)]

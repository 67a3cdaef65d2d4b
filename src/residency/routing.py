"""How well the parts of an adapter can be told apart without the task id: the `routing` entry of results.json.

An adapter with a part per domain forgets nothing if it is told the domain. What that help is worth shows beside it:

    C         C[a][j]: nats per completion token of part a on domain j; its diagonal is what the oracle gets
    oracle    {domain: C[j][j]}
    agnostic  {domain: nats per completion token when every row is answered by the part that finds its PROMPT most
              likely}, no task id
    error     {domain: share of its rows for which that is another domain's part}
    parts     names of the rows of C;  domains  names of its columns;  split  which rows were scored
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from residency.adapters.base import changes
from residency.batching import by_token_budget, make_batch
from residency.data import StreamData
from residency.evaluation import EvaluationSettings, prompt_nll
from residency.module import ContinualModule
from residency.objectives.sft import token_nll
from residency.types import Example, Split

__all__ = ["routing_record", "routing_summary"]


def routing_record(
    module: ContinualModule, data: StreamData, *, split: Split, settings: EvaluationSettings
) -> dict[str, Any] | None:
    """Score every part of the module's adapter on every domain, at the module's current state.

    Costs one pass over completions and one over prompts per part; nothing for an adapter without parts.

    Returns:
        The entry, or `None`.
    """
    adapter, model = module.adapter, module.model
    routes = adapter.routes(model) if changes(adapter, "routes") else {}
    if not routes:
        return None
    rows = {d: data.evaluation_examples(d, split, module.backbone.tokenizer, competing=0) for d in data.order}
    flat = [example for examples in rows.values() for example in examples]
    completions, prompts = [], []
    training = model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            for context in routes.values():
                with context:
                    completions.append(_completion_nll(module, flat, settings))
                    prompts.append(prompt_nll(module, flat))
    finally:
        model.train(training)
    column = torch.tensor([j for j, examples in enumerate(rows.values()) for _ in examples])
    tokens = torch.tensor([float(len(example.completion)) for example in flat], dtype=torch.float64)
    found = routing_summary(
        completion=torch.stack(completions), prompt=torch.stack(prompts), tokens=tokens, column=column,
        parts=list(routes), domains=list(rows),
    )  # fmt: skip
    return found | {"split": split}


def routing_summary(
    *,
    completion: Tensor,
    prompt: Tensor,
    tokens: Tensor,
    column: Tensor,
    parts: list[str],
    domains: list[str],
) -> dict[str, Any]:
    """From the likelihoods of every row under every part.

    Args:
        completion: (A, N) nats of each row's whole completion.
        prompt: (A, N) nats per prompt token.
        tokens: (N,) completion tokens.
        column: (N,) index of each row's domain.
        parts: A names.
        domains: Names of the columns; without rows, a domain is missing from the result.

    Returns:
        See the module.
    """
    choice = prompt.argmin(0)
    chosen = completion.gather(0, choice[None])[0]
    table: list[list[float | None]] = [[None] * len(domains) for _ in parts]
    oracle, agnostic, error = {}, {}, {}
    for j, domain in enumerate(domains):
        if not (here := column == j).any():
            continue
        total = tokens[here].sum()
        for a in range(len(parts)):
            table[a][j] = float(completion[a, here].sum() / total)
        agnostic[domain] = float(chosen[here].sum() / total)
        if domain in parts:
            oracle[domain] = table[parts.index(domain)][j]
            error[domain] = float((choice[here] != parts.index(domain)).double().mean())
    return {"parts": parts, "domains": domains, "C": table, "oracle": oracle, "agnostic": agnostic, "error": error}


def _completion_nll(module: ContinualModule, examples: list[Example], settings: EvaluationSettings) -> Tensor:
    """(N,) summed nats of each completion."""
    found = torch.zeros(len(examples), dtype=torch.float64)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    start = 0
    for group in by_token_budget([examples[i] for i in order], tokens=settings.batch_tokens):
        batch = make_batch(group, layout=module.layout).to(module.device)
        nll = token_nll(module.forward(batch), batch.targets).double()
        sums = nll.new_zeros(batch.size).index_add(0, batch.target_example, nll).cpu()
        found[torch.tensor(order[start : start + len(group)])] = sums
        start += len(group)
    return found

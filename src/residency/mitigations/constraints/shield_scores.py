"""How much the source needs each input column of a matrix: the scores of source shielding, as pure functions, and the
text that stands for the source.

    wanda_paper   S_j = sum_i |W_ij| · ‖x_j‖₂           the paper (after Sun et al. 2024)
    ssu_repo      S_j = ‖W_:j‖₂ · E[x_j²]                the authors' released code
    magnitude     S_j = sum_i |W_ij|                     control: weights alone
    fisher        S_j = sum_i E[(∂ log p / ∂W_ij)²]      control: per example, squared before it is averaged
    random        S_j uniform                            control: as many columns, any
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from residency.core.batching import make_batch
from residency.core.losses import token_nll
from residency.core.randomness import generator, seed_of
from residency.core.types import Example
from residency.mitigations.constraints.linear_maps import layer_weight, passes
from residency.mitigations.contract import StageModule

__all__ = ["Score", "column_scores", "fisher_columns", "frozen_columns", "input_squares", "own_text", "score_layers"]

Score = Literal["wanda_paper", "ssu_repo", "magnitude", "fisher", "random"]


def column_scores(weight: Tensor, squares: Tensor, tokens: int, *, score: Score) -> Tensor:
    """The scores that follow from weights and inputs.

    Args:
        weight: W, (out, in).
        squares: Sum of x_j² over the source's tokens, (in,); not read by `magnitude`.
        tokens: How many there were.
        score: Of the first three in the table above.

    Returns:
        S, (in,).
    """
    if score == "wanda_paper":
        return weight.abs().sum(0) * squares.sqrt()
    if score == "ssu_repo":
        # Over all tokens. The released code averages the means of batches: the same where batches are of one size.
        norms: Tensor = weight.norm(dim=0)
        return norms * (squares / tokens)
    if score == "magnitude":
        return weight.abs().sum(0)
    raise ValueError(f"{score} does not follow from weights and inputs")


def frozen_columns(scores: Tensor, ratio: float) -> Tensor:
    """(in,) bool: the floor(ratio · in) columns of the largest scores; of equal ones the first."""
    count = int(ratio * len(scores) + 1e-9)
    order = torch.argsort(scores, descending=True, stable=True)
    mask = torch.zeros(len(scores), dtype=torch.bool, device=scores.device)
    mask[order[:count]] = True
    return mask


def score_layers(
    module: StageModule, layers: Sequence[str], examples: Sequence[Example], *, score: Score, seed: int
) -> dict[str, Tensor]:
    """S of every layer, (in,), at the weights as they are.

    Args:
        module: The module, as pretrained.
        layers: Paths of linear layers, adapted or not.
        examples: What stands for the source.
        score: Which.
        seed: Of `random`.
    """
    model = module.model
    if score == "random":
        widths = {layer: layer_weight(model, layer).shape[1] for layer in layers}
        return {n: torch.rand(w, generator=generator(seed, "shield", n)) for n, w in widths.items()}
    if score == "fisher":
        return fisher_columns(module, layers, examples)
    none = (torch.zeros(0), 0)
    found = {} if score == "magnitude" else input_squares(model, layers, passes(module, examples))
    return {n: column_scores(layer_weight(model, n), *found.get(n, none), score=score) for n in layers}


def input_squares(model: nn.Module, layers: Sequence[str], runs: Iterable[Any]) -> dict[str, tuple[Tensor, int]]:
    """Sum of x_j² over all tokens that a layer saw, and how many these were.

    Args:
        model: Owner of the layers.
        layers: Their paths.
        runs: Runs the model over batches without padding while it is read.
    """
    found: dict[str, tuple[Tensor, int]] = {}

    def keep(path: str, layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x = inputs[0].detach().float().flatten(0, -2)
        total, count = found.get(path, (torch.zeros_like(x[0]), 0))
        found[path] = (total + x.square().sum(0), count + len(x))

    handles = [model.get_submodule(n).register_forward_pre_hook(partial(keep, n)) for n in layers]
    try:
        for _ in runs:
            pass
    finally:
        for handle in handles:
            handle.remove()
    return found


def fisher_columns(module: StageModule, layers: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
    """Column sums of the empirical Fisher diagonal of every layer's weight, trainable or not.

    One pass per example; the gradient of W is dyᵀ x with the layer's own input and the gradient at its output.
    """
    model = module.model
    training = model.training
    found: dict[str, Tensor] = {}
    model.eval()
    try:
        for example in examples:
            batch = make_batch([example], layout=module.layout).to(module.device)
            with torch.enable_grad(), _calls(model, layers) as calls:
                loss = token_nll(module.forward(batch), batch.targets).sum()
                gradients = torch.autograd.grad(loss, [y for _, y in calls.values()], allow_unused=True)
            for (path, (x, _)), dy in zip(calls.items(), gradients, strict=True):
                if dy is None:
                    continue
                gradient = dy.flatten(0, -2).float().T @ x.flatten(0, -2).float()
                share = gradient.square().sum(0) / len(examples)
                found[path] = found[path] + share if path in found else share
    finally:
        model.train(training)
    return found


@contextmanager
def _calls(model: nn.Module, layers: Sequence[str]) -> Iterator[Mapping[str, tuple[Tensor, Tensor]]]:
    """Input and output of every layer's last call."""
    calls: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        calls[path] = (inputs[0].detach(), output)

    handles = [model.get_submodule(n).register_forward_hook(partial(keep, n)) for n in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def own_text(module: StageModule, *, samples: int, tokens: int, seed: int) -> list[Example]:
    """What the model writes when nothing is asked of it: draws from its own distribution, from the start of a text on.

    Args:
        module: The module, as pretrained.
        samples: Texts.
        tokens: Longest text.
        seed: Of the draws, which leave the global generator as it was.
    """
    from transformers import GenerationConfig

    tokenizer, model = module.backbone.tokenizer, module.model
    end = tokenizer.eos_token_id
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else end
    settings = GenerationConfig(
        max_new_tokens=tokens, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, eos_token_id=end, pad_token_id=end
    )
    ids = torch.full((samples, 1), start, device=module.device)
    training, generate = model.training, model.generate
    model.eval()
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed_of(seed, "own text"))
            rows = generate(input_ids=ids, attention_mask=torch.ones_like(ids), generation_config=settings)  # type: ignore[operator]
    finally:
        model.train(training)
    texts = [row[1:] for row in rows.tolist()]
    texts = [text[: text.index(end) + 1] if end in text else text for text in texts]
    return [
        Example.of(domain="own text", row=str(i), prompt=(start,), completion=tuple(text))
        for i, text in enumerate(texts)
    ]

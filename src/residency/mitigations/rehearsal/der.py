"""Dark experience replay (Buzzega et al. 2020): keep what the model said about old examples, not only the examples.

    L = L_t + α · D(stored, h(x)) + β · NLL(y | x')        x, x' two independent draws from a reservoir

What is stored are the k largest log-probabilities at every completion token, in evaluation mode, at the end of the
example's domain; D compares them with the model's log-probabilities of the same tokens. Log-probabilities and not
logits, because logits have no zero: a constant added to all of them changes nothing that the model says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.batching import make_batch, own_places
from residency.core.errors import UserError
from residency.core.losses import IMPOSSIBLE
from residency.core.randomness import permutation
from residency.core.types import Batch, Example, Outputs, Stage, supervised_tokens
from residency.domains.sampler import rememberable_examples
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.rehearsal.memory import into_reservoir, kept_rows, pack_examples, unpack_examples
from residency.mitigations.rehearsal.model_views import evaluating, passes

__all__ = ["DER", "stored_kl", "stored_mse", "top_log_probs"]

Distance = Literal["mse", "kl"]
# An example with its log-probabilities (n, k) and the tokens they belong to (n, k); `None` where yet to be read.
_Item = tuple[Example, tuple[Tensor, Tensor] | None]


def top_log_probs(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest log-probabilities of each position, and the tokens they belong to.

    Args:
        logits: (M, V).
        k: Of a smaller vocabulary, all.

    Returns:
        ((M, k) float32 in nats, (M, k) int32).
    """
    values, tokens = logits.float().log_softmax(-1).topk(min(k, logits.shape[-1]), dim=-1)
    return values, tokens.int()


def stored_mse(logits: Tensor, values: Tensor, tokens: Tensor, *, count: float | None = None) -> Tensor:
    """Mean squared difference of log-probabilities over positions and stored tokens, in nats².

    Args:
        logits: (M, V) of the student.
        values: (M, k) stored log-probabilities; what could not be chosen when they were stored takes no part.
        tokens: (M, k) the tokens they belong to.
        count: What the sum over positions is divided by (`Batch.normaliser`); `None` = M, the mean.
    """
    differences = logits.float().log_softmax(-1).gather(-1, tokens.long()) - values
    possible = values > IMPOSSIBLE / 2  # labels that a classifier did not know yet
    squares = differences.masked_fill(~possible, 0.0).square().sum(-1) / possible.sum(-1).clamp_min(1)
    return squares.sum() / (len(logits) if count is None else count)


def stored_kl(logits: Tensor, values: Tensor, tokens: Tensor, *, count: float | None = None) -> Tensor:
    """KL(stored ‖ student), mean over positions, in nats; all tokens that are not stored count as one.

    Args:
        logits: (M, V) of the student.
        values: (M, k) stored log-probabilities.
        tokens: (M, k) the tokens they belong to.
        count: What the sum over positions is divided by (`Batch.normaliser`); `None` = M, the mean.
    """
    student = logits.float().log_softmax(-1).gather(-1, tokens.long())
    kept = (values.exp() * (values - student)).sum(-1)
    rest, guess = ((1 - each.exp().sum(-1)).clamp_min(1e-7) for each in (values, student))
    divergence = kept + rest * (rest.log() - guess.log())
    return divergence.sum() / (len(logits) if count is None else count)


class DER(Mitigation):
    """Dark experience replay; DER++ with beta > 0.

    The extra forward passes, one per term, are on drawn examples only. With alpha = 0 it is experience replay as an
    added loss.

    Args:
        alpha: α, weight of the distance to what was stored. 0 = no such term.
        beta: β, weight of the likelihood of a second draw (DER++). 0 = no such term; both 0 = off.
        capacity: Examples in the reservoir, over all domains.
        top_k: Log-probabilities stored per completion token: 8 bytes each.
        distance: `mse` of log-probabilities, or `kl` with one bucket for the tokens that are not stored.
        draws: Examples per draw and step; `null` = as many as the batch has.
    """

    shardable = True
    reads_weights = False
    follows = Mitigation.follows - {"prompt"}
    keeps_examples = True
    training_only: ClassVar[frozenset[str]] = frozenset({"alpha", "beta", "distance", "draws"})

    def __init__(
        self,
        *,
        alpha: float = 0.3,
        beta: float = 0.5,
        capacity: int = 500,
        top_k: int = 32,
        distance: Distance = "mse",
        draws: int | None = None,
    ) -> None:
        super().__init__()
        if not alpha >= 0 or not beta >= 0 or capacity < 1 or top_k < 1 or (draws is not None and draws < 1):
            raise UserError(
                f"DER with alpha={alpha}, beta={beta}, capacity={capacity}, top_k={top_k}, draws={draws}",
                why="alpha and beta weigh two losses and are at least 0; capacity, top_k and draws are at least 1",
                fix="for DER give alpha: 0.3 and beta: 0.0; for DER++ alpha: 0.3 and beta: 0.5",
            )
        self.alpha = alpha
        self.beta = beta
        self.capacity = capacity
        self.top_k = top_k
        self.distance = distance
        self.draws = draws
        self.add_state("seen", torch.zeros((), dtype=torch.long))
        self.add_state("buffer", pack_examples([]))
        self.add_state("values", torch.zeros(0, 0))
        self.add_state("tokens", torch.zeros(0, 0, dtype=torch.int32))
        self._view: tuple[object, list[_Item]] = (None, [])

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """`stored` and `replay`; nothing before the first domain is finished."""
        items = self.items() if self.alpha or self.beta else []
        if not items:
            return {}
        terms = {}
        if self.alpha:
            drawn, old, count = self._own(module, batch, items, "stored", supervised_tokens)
            compare = stored_mse if self.distance == "mse" else stored_kl
            read = [stored for _, stored in drawn if stored is not None]
            terms["stored"] = outputs.loss.new_zeros(())
            if old is not None:
                values, tokens = (torch.cat([pair[i] for pair in read]) for i in (0, 1))
                terms["stored"] = self.alpha * compare(module.forward(old), values, tokens, count=count)
        if self.beta:
            _, old, count = self._own(module, batch, items, "replay", module.objective.units)
            terms["replay"] = outputs.loss.new_zeros(())
            if old is not None:
                terms["replay"] = self.beta * module.example_losses(old).sum() / count
        return terms

    def _own(
        self,
        module: StageModule,
        batch: Batch,
        items: Sequence[_Item],
        purpose: str,
        units: Callable[[Example], float] = supervised_tokens,
    ) -> tuple[list[_Item], Batch | None, float]:
        """What a micro-batch has of the step's draw without repetition: the items, the same laid out (`None` where it
        has none), and the units of the whole draw per micro-batch.
        """
        stage, whole = module.stage, batch.whole
        order = permutation(len(items), stage.seed, "der", self.name, purpose, stage.index, module.global_step)
        drawn = [items[i] for i in order[: self.draws or len(whole.examples)]]
        own = [drawn[i] for i in own_places(len(drawn), batch)]
        old = make_batch([example for example, _ in own], layout=module.layout).to(module.device) if own else None
        return own, old, sum(units(example) for example, _ in drawn) / whole.parts

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Offer the domain's examples to the reservoir, and read those that stay at the final weights."""
        new: list[_Item] = [(example, None) for example in rememberable_examples(module.dataset, stage.domain)]
        seen = self.state["seen"]
        assert isinstance(seen, Tensor)
        items = into_reservoir(self.items(), new, seen=int(seen), capacity=self.capacity, seed=stage.seed)
        unread = [i for i, (_, read) in enumerate(items) if read is None]
        fresh = self._read(module, [items[i][0] for i in unread])
        for i, read in zip(unread, fresh, strict=True):
            items[i] = (items[i][0], read)
        found = [read for _, read in items if read is not None]
        self.state.update(
            seen=seen + len(new),
            buffer=pack_examples([example for example, _ in items]),
            values=torch.cat([values for values, _ in found]),
            tokens=torch.cat([tokens for _, tokens in found]),
        )

    @torch.no_grad()
    def _read(self, module: StageModule, examples: Sequence[Example]) -> list[tuple[Tensor, Tensor]]:
        """What the model says about each example, in evaluation mode."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        with evaluating(module):
            for rows, batch in passes(module, examples):
                lengths = [supervised_tokens(example) for example in batch.examples]
                values, tokens = top_log_probs(module.forward(batch), self.top_k)
                found |= zip(rows, zip(values.split(lengths), tokens.split(lengths), strict=True), strict=True)
        return [found[i] for i in range(len(examples))]

    def items(self) -> list[_Item]:
        """The reservoir, slot by slot."""
        buffer, values, tokens = (self.state[key] for key in ("buffer", "values", "tokens"))
        assert isinstance(buffer, dict)
        assert isinstance(values, Tensor)
        assert isinstance(tokens, Tensor)
        if self._view[0] is not buffer:
            items: list[_Item] = []
            start = 0
            for example in unpack_examples(buffer):
                own = slice(start, start + supervised_tokens(example))
                items.append((example, (values[own], tokens[own])))
                start = own.stop
            self._view = buffer, items
        return list(self._view[1])

    def kept_rows(self) -> Mapping[str, int]:
        """{domain: rows of it in the memory}."""
        return kept_rows(example for example, _ in self.items())

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """What the reservoir holds: `examples`, and `bytes` of all state."""
        return {"examples": len(self.items()), "bytes": self.state_bytes()}

    def touches_training(self, index: int) -> bool:
        """Not with both weights 0."""
        return (self.alpha > 0 or self.beta > 0) and super().touches_training(index)

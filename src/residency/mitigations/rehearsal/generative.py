"""Generative replay: the model writes its own rehearsal before it learns something else.

With few-shot prompts from a handful of kept examples (self-synthesized rehearsal, SSR; Huang et al. 2024), or with
nothing kept at all, from the domain's name, which the model learns to continue with the domain's prompts (LAMOL; Sun et
al. 2020). In both the answers are the latest model's own, so that what is rehearsed is what it does now.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from residency.core.batching import make_batch
from residency.core.errors import UserError
from residency.core.losses import token_nll
from residency.core.randomness import permutation, seed_of
from residency.core.types import Batch, Example, Outputs, Stage
from residency.domains.sampler import rememberable_examples
from residency.mitigations.base import Guarantee, Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.rehearsal.generation import (
    close,
    degenerate,
    draw_texts,
    label,
    pack_shapes,
    shape_of,
    unpack_shapes,
)
from residency.mitigations.rehearsal.memory import Source, mixed_in, pack_examples, unpack_examples
from residency.mitigations.rehearsal.model_views import mean_hidden
from residency.mitigations.rehearsal.selection import fair_quotas, kmeans_order

__all__ = ["GenerativeReplay"]


class GenerativeReplay(Mitigation):
    """Mix examples into every batch that the model itself wrote about earlier domains.

    When a domain is finished, the model at its final weights writes prompts of all domains so far and answers them; the
    examples are part of the state and replace new ones in the next stage, as those of `Replay` do. Prompts that are
    empty, go round in circles or repeat another one are dropped, and so are empty answers; `accept_rate` is what is
    left.

    Args:
        ratio: Share of each batch that is written, in [0, 1): exact over a run, spread evenly. 0 = off.
        examples: To be written, over all earlier domains together, in equal numbers.
        shots: Kept examples in front of each prompt that is written (SSR: 2). 0 = none.
        kept: Training examples kept per domain to take the shots from.
        oversample: Write so many times more, and keep one per k-means cluster of their mean last hidden states.
        temperature: Of the draws of prompts; answers are greedy.
        top_k: Prompts are drawn from the k most likely tokens; 0 = from all.
        prompt_loss: Weight of the loss of prompts given the domain's name (LAMOL: 0.25), from the first domain on; the
            name takes the place of the shots. 0 = none.
    """

    shardable = True
    reads_weights = False
    holds: ClassVar[frozenset[Guarantee]] = frozenset({"slots"})
    follows = frozenset({"completion"})
    keeps_examples = True
    not_on_classifiers = "it lets the model write, and a classifier writes nothing"
    training_only: ClassVar[frozenset[str]] = frozenset({"ratio"})

    def __init__(
        self,
        *,
        ratio: float = 0.25,
        examples: int = 64,
        shots: int = 2,
        kept: int = 8,
        oversample: int = 1,
        temperature: float = 1.0,
        top_k: int = 20,
        prompt_loss: float = 0.0,
    ) -> None:
        super().__init__()
        _check_shares(ratio=ratio, examples=examples, oversample=oversample, temperature=temperature, top_k=top_k)
        _check_sources(shots=shots, kept=kept, prompt_loss=prompt_loss)
        self.ratio = ratio
        self.examples = examples
        self.shots = shots
        self.kept = kept
        self.oversample = oversample
        self.temperature = temperature
        self.top_k = top_k
        self.prompt_loss = prompt_loss
        if prompt_loss:
            # The first domain's prompts have to be learned, too, if they are to be written later.
            self.first_domain = 0
        self.add_state("shots", pack_examples([]))
        self.add_state("written", pack_examples([]))
        self.add_state("shapes", pack_shapes({}))
        self.add_state("counts", torch.zeros(3, dtype=torch.long))  # asked for, accepted, cut

    def transform_dataset(self, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """Replace evenly spread positions by written examples."""
        written = self.written()
        if not written or self.ratio == 0:
            return dataset
        source = Source(name=self.name, memory=written, ratio=self.ratio)
        return mixed_in(dataset, source, stage=stage)

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """With `prompt_loss`, the mean negative log-likelihood of the batch's prompts as `prompts`."""
        if self.prompt_loss == 0:
            return {}
        end = module.backbone.tokenizer.eos_token_id
        prompts = [replace(e, prompt=_start(module, e.domain)).answered((*e.prompt, end)) for e in batch.examples]
        read = make_batch(prompts, layout=module.layout).to(module.device)
        count = batch.normaliser(lambda example: len(example.prompt) + 1)
        return {"prompts": self.prompt_loss * token_nll(module.forward(read), read.targets).sum() / count}

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """Keep some examples as shots, and write about all domains so far."""
        new = [example.last_turn() for example in rememberable_examples(module.dataset, stage.domain)]
        packed, shots = self.state["shapes"], self._packed("shots")
        assert isinstance(packed, Tensor)
        # A stage of old examples alone has taught nothing that could be written about.
        shapes = unpack_shapes(packed) | ({stage.domain: shape_of(new)} if new else {})
        shots += [new[i] for i in permutation(len(new), stage.seed, "shots", stage.index)[: self.kept]]
        self.state.update(shapes=pack_shapes(shapes), shots=pack_examples(shots))
        counts = torch.zeros(3, dtype=torch.long)
        found: list[Example] = []
        for domain, quota in zip(shapes, fair_quotas([self.examples] * len(shapes), self.examples), strict=True):
            asked = quota * self.oversample
            prompts = self._prompts(module, stage, domain, asked)
            accepted, cut = label(module, prompts, domain=domain, length=shapes[domain].completion)
            counts += torch.tensor([asked, len(accepted), cut])
            found += self._chosen(module, stage, accepted, quota)
        self.state.update(written=pack_examples(found), counts=counts)

    def _prompts(self, module: StageModule, stage: Stage, domain: str, count: int) -> list[tuple[int, ...]]:
        """What is left of so many prompts that the model was asked to write."""
        packed = self.state["shapes"]
        assert isinstance(packed, Tensor)
        shape = unpack_shapes(packed)[domain]
        own = [example for example in self._packed("shots") if example.domain == domain]
        contexts = [self._context(module, stage, domain, own, i) for i in range(count)]
        how = {"temperature": self.temperature, "top_k": self.top_k}
        texts = draw_texts(module, contexts, length=shape.prompt, stage=stage, domain=domain, **how)  # type: ignore[arg-type]
        if self.prompt_loss:
            return [tuple(text) for text in texts if not degenerate(text)]
        known = {example.prompt for example in own}
        closed = [prompt for text in texts if (prompt := close(text, shape)) is not None]
        return [prompt for prompt in closed if prompt not in known]

    def _context(
        self, module: StageModule, stage: Stage, domain: str, own: Sequence[Example], number: int
    ) -> tuple[int, ...]:
        """What the model is to continue with the prompt of this number."""
        if self.prompt_loss:
            return _start(module, domain)
        packed = self.state["shapes"]
        assert isinstance(packed, Tensor)
        chosen = permutation(len(own), stage.seed, "context", stage.index, domain, number)[: self.shots]
        before = [token for i in chosen for token in (*own[i].prompt, *own[i].completion)]
        text = (*before, *unpack_shapes(packed)[domain].head)
        return text or (module.backbone.tokenizer.eos_token_id,)

    def _chosen(self, module: StageModule, stage: Stage, accepted: Sequence[Example], quota: int) -> Sequence[Example]:
        if len(accepted) <= quota:
            return accepted
        seed = seed_of(stage.seed, "written", stage.index, accepted[0].domain)
        return [accepted[i] for i in kmeans_order(mean_hidden(module, accepted), quota, seed=seed)]

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`accept_rate` of what was asked for, `cut`: share of answers that were cut, `examples`, `bytes` of state."""
        counts = self.state["counts"]
        assert isinstance(counts, Tensor)
        asked, accepted, cut = counts.tolist()
        rates = {"accept_rate": accepted / asked, "cut": cut / max(accepted, 1)} if asked else {}
        return {**rates, "examples": len(self.written()), "bytes": self.state_bytes()}

    def rehearsal(self) -> tuple[float, int] | None:
        """Its share of the slots, in every how many-th batch."""
        return (self.ratio, 1) if self.ratio > 0 else None

    def touches_training(self, index: int) -> bool:
        """Not at ratio 0 without a loss of prompts."""
        return (self.ratio > 0 or self.prompt_loss > 0) and super().touches_training(index)

    def written(self) -> list[Example]:
        """The examples the model has written when the last domain was finished."""
        return self._packed("written")

    def _packed(self, key: str) -> list[Example]:
        packed = self.state[key]
        assert isinstance(packed, dict)
        return unpack_examples(packed)


def _start(module: StageModule, domain: str) -> tuple[int, ...]:
    """Tokens after which a prompt of a domain begins: the end of any text, and the domain's name on a line."""
    tokenizer = module.backbone.tokenizer
    return (tokenizer.eos_token_id, *tokenizer(f"{domain}\n", add_special_tokens=False).input_ids)


def _check_shares(*, ratio: float, examples: int, oversample: int, temperature: float, top_k: int) -> None:
    if not 0 <= ratio < 1 or examples < 1 or oversample < 1 or not temperature > 0 or top_k < 0:
        raise UserError(
            f"GenerativeReplay with ratio={ratio}, examples={examples}, oversample={oversample}, "
            f"temperature={temperature}, top_k={top_k}",
            why="the ratio is the share of written examples in a batch, in [0, 1); examples, oversample are 1 or more, "
            "the temperature is positive, top_k is a number of tokens or 0",
            fix="for 25 % written examples give ratio: 0.25, with examples: 64, temperature: 1.0, top_k: 20",
        )


def _check_sources(*, shots: int, kept: int, prompt_loss: float) -> None:
    if not 0 <= shots <= kept or not prompt_loss >= 0:
        raise UserError(
            f"GenerativeReplay with shots={shots}, kept={kept}, prompt_loss={prompt_loss}",
            why="shots are taken from the kept examples, so there can be no more of them; a weight is at least 0",
            fix="for SSR give shots: 2 and kept: 8; for no kept examples shots: 0 and kept: 0",
        )
    if prompt_loss and shots:
        raise UserError(
            f"GenerativeReplay with shots={shots} and prompt_loss={prompt_loss}",
            why="a prompt is written after shots or after the domain's name, not after both",
            fix="for SSR set prompt_loss: 0.0; for LAMOL set shots: 0 and kept: 0",
        )

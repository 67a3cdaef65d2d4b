"""Self-distillation on logits (learning without forgetting, Li and Hoiem 2016): stay close to what a teacher says.

    L = L_t + λ τ² KL(p_teacher || p_student),  p = softmax(logits / τ), the mean over the supervised tokens

The inputs are those of the domain that is being learned; nothing of an earlier one is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor

from residency.core.batching import by_token_budget, make_batch, wanted_targets, wanted_tokens
from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.core.tensors import remembered, snapshot
from residency.core.types import Batch, Branch, Example, Outputs, Stage, Tensors
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.distillation.divergences import distillation_loss, top_log_probs
from residency.mitigations.distillation.teachers import follow, teacher_logits
from residency.objectives.dataset import distinct

__all__ = ["SelfDistillation"]

Teacher = Literal["previous", "base", "ema"]


class SelfDistillation(Mitigation):
    """Pull the model's next-token distributions towards a teacher's, on the rows of the new domain.

    No teacher is a second model: `base` is the model with its adapter off, the others are copies of the trainable
    weights that take their place for one forward pass. That pass is what the method costs (a step of 1.46 x the time
    with LoRA on the packaged model); `cache` moves it before the stage (1.02 x).

    Args:
        strength: λ. 0 = off.
        teacher: `previous`: the model as the stage before left it; `base`: the pretrained model, from the first stage
            on (the adapter must provide `reference`); `ema`: a moving average that starts the stage as `previous`.
        temperature: τ > 0.
        ema_rate: Share of the model in the moving average after every step, in (0, 1]. Only with `ema`.
        cache: Keep the k likeliest tokens of the teacher for every row, from one pass over the stage's rows before its
            first step, and treat all others as one; `null` = the whole distribution, from a second forward pass in
            every step. An approximation: at τ = 2 the top 32 hold 75 to 82 % of the teacher's mass (logged as `kept`).
            Takes 8 k bytes per token of the completions, 24 per row. Not with `ema`, which moves.
        batch_tokens: Tokens per pass of the cache; changes memory, not the result (beyond rounding).
    """

    shardable = True
    uses_logits = True

    alternative: ClassVar[str] = "configs/mitigation/self_distillation.yaml, whose teacher is the previous model"
    training_only: ClassVar[frozenset[str]] = frozenset(
        {"strength", "teacher", "temperature", "ema_rate", "cache", "batch_tokens"}
    )

    def __init__(
        self,
        *,
        strength: float = 1.0,
        teacher: Teacher = "previous",
        temperature: float = 2.0,
        ema_rate: float = 0.01,
        cache: int | None = None,
        batch_tokens: int = 1024,
    ) -> None:
        super().__init__()
        wrong = strength < 0 or temperature <= 0 or not 0 < ema_rate <= 1 or batch_tokens < 1
        if wrong or (cache is not None and cache < 1):
            raise UserError(
                f"SelfDistillation with strength={strength}, temperature={temperature}, ema_rate={ema_rate}, "
                f"cache={cache}, batch_tokens={batch_tokens}",
                why="strength is at least 0, temperature above 0, ema_rate in (0, 1], the others at least 1",
                fix="correct these values in model.mitigations",
            )
        if cache is not None and teacher == "ema":
            raise UserError(
                f"SelfDistillation with teacher='ema' and cache={cache}",
                why="this teacher moves at every step, so nothing that it says can be kept",
                fix="set cache to null, or teacher to previous or base",
            )
        if cache is not None:
            # What the objective makes of the rows when the stage begins is not there yet when the teacher is asked.
            self.follows = frozenset({"completion"})
        self.strength = strength
        self.teacher = teacher
        self.temperature = temperature
        self.ema_rate = ema_rate
        self.cache = cache
        self.batch_tokens = batch_tokens
        if teacher == "base":
            # Both narrowed per instance: this teacher has something to protect from the first step on.
            self.requires = frozenset({"reference"})
            self.first_domain = 0
        if teacher == "base":
            self.not_on_classifiers = "the pretrained model has no trained head (teacher: previous has one)"
        elif cache is not None:
            self.not_on_classifiers = "its cache holds one distribution per label of a row; set cache to null"
        self.needs_continuity = teacher == "previous" and cache is None and strength > 0
        self.add_state("teacher", {})
        self.add_state("step", torch.zeros((), dtype=torch.long))
        self.add_state("cached", {})
        self._places: tuple[Tensor | None, dict[int, tuple[int, int]]] = (None, {})
        self._numbers: dict[str, Tensor] = {}

    def before_adapter(self, module: StageModule, stage: Stage) -> None:
        """With a cache, ask the teacher now: afterwards the adapter may begin the stage with another function."""
        if self.cache is not None and self.touches_training(stage.index):
            self.state["cached"] = self._teach(module, self.cache)

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """Remember the teacher where it is asked in every step."""
        if not self.touches_training(stage.index):
            return
        if self.cache is None and self.teacher != "base":
            leaves = module.adapter.trainable(module.model)
            self.state["teacher"] = remembered(leaves) if self.teacher == "ema" else snapshot(leaves)

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """The next stage has another teacher."""
        self.state.update(teacher={}, step=torch.zeros_like(self._step), cached={})

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """λ τ² KL."""
        if not self.touches_training(module.stage.index):
            return {}
        whole = module.backbone.family != "classifier"  # what a classifier knew before is another choice of labels
        known = outputs.logits if whole else None
        logits = module.backbone.distilled(module.model, batch) if known is None else known
        ids = None
        if self.cache is None:
            teacher = teacher_logits(module, batch, self._weights(module))
        else:
            teacher, ids = self._recall(module, batch)
        wanted = wanted_targets(batch)
        if not bool(wanted.all()):
            # What a model should not write is nothing to be kept.
            logits, teacher, ids = logits[wanted], teacher[wanted], None if ids is None else ids[wanted]
        count = batch.normaliser(wanted_tokens) or 1.0
        loss = distillation_loss(logits, teacher, temperature=self.temperature, ids=ids, count=count)
        self._numbers = {"kl": loss.detach() / self.temperature**2}
        if ids is not None:
            self._numbers["kept"] = teacher.exp().sum(-1).mean()
        return {"distillation": self.strength * loss}

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`kl`: nats per token at temperature τ; `kept`: the teacher's mass on the tokens of the cache."""
        return {name: float(value) for name, value in self._numbers.items()}

    def remembers(self, trainable: int, index: int) -> int:
        """The teacher's leaves, where it is asked in every step."""
        asked = self.cache is None and self.teacher != "base" and self.touches_training(index)
        return 4 * trainable * asked

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    @property
    def _step(self) -> Tensor:
        step = self.state["step"]
        assert isinstance(step, Tensor)
        return step

    def _weights(self, module: StageModule) -> Tensors | None:
        """The teacher's leaves; the average takes in what the last step made."""
        if self.teacher == "base":
            return None
        weights = self.state["teacher"]
        assert isinstance(weights, dict)
        if self.teacher == "ema" and module.global_step > int(self._step):
            weights = follow(weights, module.adapter.trainable(module.model), rate=self.ema_rate)
            self.state.update(teacher=weights, step=torch.full_like(self._step, module.global_step))
        return weights

    # -- cache --------------------------------------------------------------------------------------------------

    def _teach(self, module: StageModule, k: int) -> dict[str, Tensor]:
        """What the teacher says about every row: (n, k) `log_probs` and `ids` of n tokens, and (R, 3) `rows`.

        Of a row: the key of its tokens, the first of them that was asked about, and where that lies among the n.
        """
        prompts = module.objective.learns_prompts
        rows = dict.fromkeys(_whole(example, prompts) for example in distinct(module.dataset))
        ends = list(accumulate(len(row.completion) for row in rows))
        places = {row: end - len(row.completion) for row, end in zip(rows, ends, strict=True)}
        log_probs, ids = torch.empty(0), torch.empty(0)
        for group in by_token_budget(sorted(places, key=len), tokens=self.batch_tokens):
            batch = make_batch(group, layout=module.layout).to(module.device)
            # The stage has not moved yet: the model as it is is the previous one.
            logits = teacher_logits(module, batch, None if self.teacher == "base" else {})
            top, tokens = top_log_probs(logits, k=k, temperature=self.temperature)
            if not len(log_probs):
                log_probs = top.new_empty(ends[-1], top.shape[1])
                ids = torch.empty_like(log_probs, dtype=torch.int32)
            at = torch.cat([torch.arange(places[row], places[row] + len(row.completion)) for row in batch.examples])
            log_probs[at.to(top.device)], ids[at.to(top.device)] = top, tokens.int()
        found = [[_key(row), len(row.prompt), place] for row, place in places.items()]
        return {"log_probs": log_probs, "ids": ids, "rows": torch.tensor(found, dtype=torch.long).reshape(-1, 3)}

    def _recall(self, module: StageModule, batch: Batch) -> tuple[Tensor, Tensor]:
        """(M, k) log-probabilities and their tokens for a batch, whatever the objective supervises of its rows."""
        cached = self.state["cached"]
        assert isinstance(cached, dict)
        if "rows" not in cached:
            raise UserError(
                f"a checkpoint whose cache of {self.name} does not say which rows it holds",
                why="an earlier version wrote it, and the teacher cannot be asked any more",
                fix="delete checkpoint.safetensors in the run's folder: the stage is trained anew",
            )
        if self._places[0] is not cached["rows"]:
            table = {key: (first, place) for key, first, place in cached["rows"].tolist()}
            self._places = (cached["rows"], table)
        at: list[int] = []
        for example in batch.examples:
            first, place = self._places[1].get(_key(example), (0, -1))
            wanted = [len(example.prompt) + k for branch in example.branches for k in branch.supervised]
            if place < 0 or min(wanted, default=first) < first or len(example.branches) > 1:
                raise UserError(
                    f"row {example.row!r} of {example.domain} is in a batch and not in the cache of {self.name}",
                    why="a mitigation or the objective writes tokens that the teacher was not asked about",
                    fix=f"set model.mitigations.{self.name}.cache to null",
                )
            at += [place + position - first for position in wanted]
        where = torch.tensor(at, dtype=torch.long, device=cached["ids"].device)
        log_probs, ids = cached["log_probs"][where], cached["ids"][where]
        return log_probs.to(batch.targets.device), ids.to(batch.targets.device).long()


def _whole(example: Example, prompts: bool) -> Example:
    """A row as one supervised completion: objectives may leave some of its tokens out, or learn its prompt, too."""
    tokens = (*example.prompt, *example.completion)
    first = 1 if prompts else len(example.prompt)
    return Example(domain="", row="", prompt=tokens[:first], branches=(Branch(tokens=tokens[first:]),))


def _key(example: Example) -> int:
    """63 bits that name the tokens of a row."""
    return seed_of(0, "row", *example.prompt, *example.completion)

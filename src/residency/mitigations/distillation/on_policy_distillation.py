"""On-policy self-distillation (Shenfeld et al. 2026, arXiv 2601.19897): learn from a teacher that has seen the answer.

    y ~ π_θ(. | x);  L = w L_t + λ · mean over the tokens of y of D(π_θ(. | x, y_<t), π_φ(. | x, d, y_<t))

The student writes, and the same model with the demonstration d before the question says at each token what it would
have written. The tokens come from the student's own distribution, and carry no gradient.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from residency.backbones.base import Sampling
from residency.core.batching import make_batch, own_places
from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.core.tensors import remembered
from residency.core.types import Batch, Example, Outputs, Stage, Tensors
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.distillation.divergences import buckets, generalised_jsd
from residency.mitigations.distillation.prompting import check_placeholders, fill, without_end
from residency.mitigations.distillation.teachers import follow, run_as, teacher_logits

__all__ = ["OnPolicyDistillation"]

TEMPLATE = "A question like the next one has this answer:{reference}\n\n{prompt}"


class OnPolicyDistillation(Mitigation):
    """Distil what a demonstration adds to the model's own answers into the model.

    The paper trains on this loss alone (`task_weight: 0`, `fraction: 1`); beside the task's loss it pulls the model
    towards what it would say by itself. Costs generation in every step. Of the paper's settings, several answers per
    prompt and importance weights are not here: a step has one answer per prompt, written by the model as it is. Against
    it: dense on-policy distillation is reported to forget more than sparse rewards do (arXiv 2607.01763).

    Args:
        strength: λ. 0 = off.
        fraction: Share of a step's examples that are answered, at least one, in (0, 1].
        task_weight: w of the task's own loss, in [0, 1].
        teacher: `base`: the pretrained model (the adapter must provide `reference`); `ema`: a moving average of the
            stage's weights; `live`: the model as it is, which only the demonstration tells from the student.
        ema_rate: Share of the model in the moving average after every step, in (0, 1]. Only with `ema`.
        alpha: α of the generalised Jensen-Shannon divergence: 0 = KL(teacher || student), 1 = KL(student || teacher).
        top_k: Compare the teacher's k likeliest tokens and all others as one; `null` = every token by itself.
        template: What the teacher reads; `{prompt}` and `{reference}` become the row's. `{prompt}` alone: no
            demonstration.
        max_new_tokens: Longest answer, its end included; `null` = the longest completion of the rows in hand.
        temperature: Of the student's sampling.
    """

    shardable = True
    first_domain: int = 0
    follows = frozenset({"completion"})
    not_on_classifiers = "it lets the model write, and a classifier writes nothing"
    alternative: ClassVar[str] = "teacher: ema or live, which every adapter can do"

    def __init__(
        self,
        *,
        strength: float = 1.0,
        fraction: float = 0.25,
        task_weight: float = 1.0,
        teacher: Literal["base", "ema", "live"] = "ema",
        ema_rate: float = 0.02,
        alpha: float = 0.5,
        top_k: int | None = 100,
        template: str = TEMPLATE,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        shares = {"task_weight": task_weight, "alpha": alpha}
        sizes = [1 if size is None else size for size in (top_k, max_new_tokens)]
        wrong = strength < 0 or not 0 < fraction <= 1 or not 0 < ema_rate <= 1 or temperature <= 0
        if wrong or min(sizes) < 1 or not all(0 <= share <= 1 for share in shares.values()):
            raise UserError(
                f"OnPolicyDistillation with strength={strength}, fraction={fraction}, {shares}, ema_rate={ema_rate}, "
                f"top_k={top_k}, max_new_tokens={max_new_tokens}, temperature={temperature}",
                why="strength is at least 0, fraction and ema_rate in (0, 1], task_weight and alpha in [0, 1], "
                "temperature above 0, the others at least 1",
                fix="correct these values in model.mitigations",
            )
        check_placeholders(template, ("prompt",), owner="OnPolicyDistillation")
        self.strength = strength
        self.fraction = fraction
        self.task_weight = task_weight
        self.teacher = teacher
        self.ema_rate = ema_rate
        self.alpha = alpha
        self.top_k = top_k
        self.template = template
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        if teacher == "base":
            self.requires = frozenset({"reference"})
        self.add_state("teacher", {})
        self.add_state("step", torch.zeros((), dtype=torch.long))
        self._numbers: dict[str, float] = {}
        self._written: tuple[Any, Sequence[Example], Sequence[Example]] = (None, (), ())

    def on_domain_start(self, module: StageModule, stage: Stage) -> None:
        """The average starts where the stage does."""
        if self.touches_training(stage.index) and self.teacher == "ema":
            self.state["teacher"] = remembered(module.adapter.trainable(module.model))

    def on_domain_end(self, module: StageModule, stage: Stage) -> None:
        """The next stage has an average of its own."""
        self.state.update(teacher={}, step=torch.zeros((), dtype=torch.long))

    def loss_terms(self, module: StageModule, batch: Batch, outputs: Outputs) -> Mapping[str, Tensor]:
        """λ D, and what is taken off the task's own loss."""
        if self.strength == 0:
            return {}
        rows, answered = self._answers(module, batch.whole.examples)
        # The answers of the whole step, so that each of its tokens counts alike; this micro-batch reads its own.
        count = sum(len(answer.completion) for answer in answered) / batch.whole.parts
        own = own_places(len(rows), batch)
        divergence, kept = outputs.loss.new_zeros(()), 1.0
        if own:
            divergences, kept = self._compare(module, [rows[i] for i in own], [answered[i] for i in own])
            divergence = divergences.sum() / count
        self._numbers = {
            "divergence": float(divergence.detach()),
            "tokens": sum(len(e.completion) for e in answered) / len(answered),
            "kept": kept,
        }
        terms = {"distillation": self.strength * divergence}
        return terms if self.task_weight == 1 else terms | {"task": (self.task_weight - 1) * outputs.loss}

    def _compare(
        self, module: StageModule, rows: Sequence[Example], answered: Sequence[Example]
    ) -> tuple[Tensor, float]:
        """(M,) D at every token of some answers, and the teacher's mean mass on its k tokens."""
        tokenizer = module.backbone.tokenizer
        end = tokenizer.eos_token_id
        shown = [
            fill(tokenizer, self.template, {"prompt": e.prompt, "reference": without_end(e.completion, end)})
            for e in rows
        ]
        taught = [replace(answer, prompt=prompt) for answer, prompt in zip(answered, shown, strict=True)]
        student = module.forward(_batch(module, answered))
        teacher = teacher_logits(module, _batch(module, taught), self._weights(module))
        ids = None if self.top_k is None else teacher.topk(min(self.top_k, teacher.shape[-1]), dim=-1).indices
        known = buckets(teacher, ids)
        kept = 1.0 if known.shape[-1] == teacher.shape[-1] else float(1 - known[:, -1].exp().mean())
        return generalised_jsd(known, buckets(student, ids), alpha=self.alpha), kept

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`divergence` in nats per token, `tokens` per answer, `kept`: the teacher's mass on its k tokens."""
        return self._numbers

    def remembers(self, trainable: int, index: int) -> int:
        """The average that teaches."""
        return 4 * trainable if self.teacher == "ema" and self.touches_training(index) else 0

    def touches_training(self, index: int) -> bool:
        """Not at strength 0."""
        return self.strength > 0 and super().touches_training(index)

    def _answers(
        self, module: StageModule, examples: tuple[Example, ...]
    ) -> tuple[Sequence[Example], Sequence[Example]]:
        """The rows of a global batch that are answered, and the answers: written once per step, by the same weights for
        all of its micro-batches.
        """
        asked = (module.stage.index, module.global_step, examples)
        if self._written[0] != asked:
            rows = self._chosen(module, examples)
            self._written = (asked, rows, self._answer(module, rows))
        return self._written[1:]

    def _chosen(self, module: StageModule, examples: Sequence[Example]) -> list[Example]:
        """The examples of a global batch that are answered: others in every step."""
        stage, count = module.stage, max(1, round(self.fraction * len(examples)))
        words = ("on_policy", stage.index, module.global_step)
        order = sorted(examples, key=lambda e: (seed_of(stage.seed, *words, e.domain, e.row), e.row))
        return [example.last_turn() for example in order[:count]]

    def _answer(self, module: StageModule, rows: Sequence[Example]) -> list[Example]:
        """The rows with the student's own answers; one that comes to an end has the end token too."""
        stage, end = module.stage, module.backbone.tokenizer.eos_token_id
        limit = self.max_new_tokens or max(len(e.completion) for e in rows)
        where = (stage.index, module.global_step, rows[0].domain, rows[0].row)
        how = Sampling(temperature=self.temperature, seed=seed_of(stage.seed, "on_policy", "write", *where))
        prompts = [e.prompt for e in rows]

        def run() -> list[list[int]]:
            return module.backbone.generate(module.model, prompts, max_new_tokens=limit, sampling=how)

        written = run_as(module, {}, run)
        finished = [tuple(ids) if len(ids) == limit else (*ids, end) for ids in written]
        return [e.answered(ids) for e, ids in zip(rows, finished, strict=True)]

    def _weights(self, module: StageModule) -> Tensors | None:
        """The teacher's leaves; the average takes in what the last step made."""
        if self.teacher != "ema":
            return None if self.teacher == "base" else {}
        weights, step = self.state["teacher"], self.state["step"]
        assert isinstance(weights, dict)
        assert isinstance(step, Tensor)
        if module.global_step > int(step):
            weights = follow(weights, module.adapter.trainable(module.model), rate=self.ema_rate)
            self.state.update(teacher=weights, step=torch.full_like(step, module.global_step))
        return weights


def _batch(module: StageModule, examples: Sequence[Example]) -> Batch:
    return make_batch(examples, layout=module.layout).to(module.device)

"""SDFT (Yang et al., ACL 2024): before a stage the model says the reference answers in its own words, and learns those.

ŷ ~ f(. | template(x, y)),  kept if it is an answer and, where that can be checked, the same answer; else y
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from residency.backbones.base import Sampling
from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.core.types import Example, ExampleView, Stage
from residency.domains.sampler import learned_examples, name_at
from residency.mitigations.base import Mitigation
from residency.mitigations.contract import StageModule
from residency.mitigations.distillation.prompting import check_placeholders, fill, without_end
from residency.mitigations.distillation.teachers import run_as
from residency.mitigations.rehearsal.memory import pack_examples, unpack_examples

__all__ = ["SDFT", "Rewritten", "accepted", "label_in"]

# What a model writes that talks about its task instead of doing it (the paper's released code).
BANNED = ("reference answer", "your response", "my response", "your own response", "now it's your turn")
BANNED_STARTS = ("your turn",)

TEMPLATE = (
    "Answer the request below in your own words. A correct answer is given; say the same, the way you would say it.\n\n"
    "Request:\n{prompt}\n\nCorrect answer:\n{reference}\n\nAnswer in your own words:\n"
)

Key = tuple[str, str]


def label_in(text: str, labels: Iterable[str]) -> str | None:
    """The one label that a text names, as whole words in any case.

    A label inside a longer one that is named does not count.

    Returns:
        The label, or `None` if the text names none or several.
    """
    rest, found = _normal(text), []
    for label in sorted(labels, key=lambda label: (-len(label), label)):
        pattern = rf"(?<!\w){re.escape(_normal(label))}(?!\w)"
        if re.search(pattern, rest):
            found.append(label)
            rest = re.sub(pattern, "\0", rest)
    return found[0] if len(found) == 1 else None


def accepted(text: str, reference: str, *, labels: Sequence[str] = ()) -> bool:
    """Whether a rewrite can stand in for the reference.

    Args:
        text: What the model wrote.
        reference: The row's own completion.
        labels: All labels of a domain whose answers can be checked: the text must name the reference and no other.
    """
    plain = _normal(text)
    if not plain or plain.startswith(BANNED_STARTS) or any(phrase in plain for phrase in BANNED):
        return False
    return not labels or label_in(text, labels) == reference.strip()


def _normal(text: str) -> str:
    return " ".join(text.casefold().split())


class Rewritten(ExampleView):
    """A data set in which some rows have another completion; nothing is read before an example is asked for.

    Args:
        current: The data set by position.
        rewrites: Gives the replacements by (domain, row).
    """

    def __init__(self, current: Sequence[Example], rewrites: Callable[[], Mapping[Key, Example]]) -> None:
        self.current = current
        self.rewrites = rewrites

    def __len__(self) -> int:
        return len(self.current)

    def at(self, position: int) -> Example:
        example = self.current[position]
        return self.rewrites().get((example.domain, example.row), example)

    def name_at(self, position: int) -> tuple[str, str]:
        return name_at(self.current, position)

    def own(self) -> Sequence[Example]:
        current = self.current.own() if isinstance(self.current, ExampleView) else self.current
        return Rewritten(current, self.rewrites)


class SDFT(Mitigation):
    """Train on the model's own wording of the reference answers.

    One pass of generation before each stage, over the rows that the stage will use. A rewrite is refused, and the row
    kept as it is, if it does not end, is empty, talks about its task, or (`label` domains) names another label. The
    share that is kept is logged as `accepted`. Only the words between the blanks around a completion are rewritten.

    The published gain is contested: with LoRA of rank 64 on all layers plain fine-tuning did better on GSM8K (42.5
    against 34.6 %, issue 15 of the authors' repository). A small model rarely follows the template: see `accepted`.

    Args:
        share: Share of the rows that are offered to the model, 0 to 1. 0 = off.
        rewriter: `current`: the model as the stage before left it; `base`: the pretrained model (the adapter must
            provide `reference`).
        template: What the model reads; `{prompt}` and `{reference}` become the row's.
        max_new_tokens: Longest rewrite, its end included; `null` = the longest completion of the stage.
        temperature: Of sampling; `null` = greedy.
        generation_batch: Prompts that are continued together.
    """

    shardable = True
    reads_weights = False
    first_domain: int = 0
    follows = frozenset({"completion"})
    not_on_classifiers = "it lets the model write, and a classifier writes nothing"
    alternative: ClassVar[str] = "rewriter: current, which every adapter can do"

    def __init__(
        self,
        *,
        share: float = 1.0,
        rewriter: Literal["current", "base"] = "current",
        template: str = TEMPLATE,
        max_new_tokens: int | None = None,
        temperature: float | None = None,
        generation_batch: int = 48,
    ) -> None:
        super().__init__()
        sizes = [1 if max_new_tokens is None else max_new_tokens, generation_batch]
        if not 0 <= share <= 1 or min(sizes) < 1 or (temperature is not None and temperature <= 0):
            raise UserError(
                f"SDFT with share={share}, max_new_tokens={max_new_tokens}, temperature={temperature}, "
                f"generation_batch={generation_batch}",
                why="the share is in [0, 1], a temperature above 0, the others are at least 1",
                fix="correct these values in model.mitigations (temperature: null for greedy rewrites)",
            )
        check_placeholders(template, ("prompt", "reference"), owner="SDFT")
        self.share = share
        self.rewriter = rewriter
        self.template = template
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.generation_batch = generation_batch
        if rewriter == "base":
            self.requires = frozenset({"reference"})
        self.add_state("rewrites", pack_examples([]))
        self.add_state("counts", torch.zeros(2, dtype=torch.long))  # offered, accepted
        self._unpacked: tuple[Any, dict[Key, Example]] = (None, {})

    def prepare_dataset(self, module: StageModule, dataset: Sequence[Example], stage: Stage) -> None:
        """Let the model write, and keep what is accepted."""
        # What is said in several turns has no one completion that could be said in other words.
        rows = [e for e in learned_examples(dataset, stage.domain) if self._offers(e, stage) and not e.has_turns]
        kept: list[Example] = []
        if rows:
            tokenizer = module.backbone.tokenizer
            texts = [_text(tokenizer, e) for e in rows]
            labels = sorted({text.strip() for text in texts}) if stage.kind == "label" else []
            for example, text, new in zip(rows, texts, self._write(module, rows, stage), strict=True):
                if new is not None and accepted(new, text, labels=labels):
                    kept.append(example.answered(_completion(tokenizer, text, new)))
        self.state.update(rewrites=pack_examples(kept), counts=torch.tensor([len(rows), len(kept)]))

    def transform_dataset(self, dataset: Sequence[Example], stage: Stage) -> Sequence[Example]:
        """The accepted rewrites in the place of their rows; every other example is the very same object."""
        return Rewritten(dataset, self.rewrites) if self.share > 0 else dataset

    def metrics_to_log(self, module: StageModule) -> Mapping[str, float]:
        """`accepted`: share of the offered rows that are trained in the model's own words."""
        counts = self.state["counts"]
        assert isinstance(counts, Tensor)
        return {"accepted": int(counts[1]) / max(1, int(counts[0]))}

    def touches_training(self, index: int) -> bool:
        """Not at share 0."""
        return self.share > 0 and super().touches_training(index)

    def rewrites(self) -> dict[Key, Example]:
        """The accepted rewrites of the running stage by (domain, row)."""
        packed = self.state["rewrites"]
        assert isinstance(packed, dict)
        if self._unpacked[0] is not packed:
            self._unpacked = (packed, {(e.domain, e.row): e for e in unpack_examples(packed)})
        return self._unpacked[1]

    def _offers(self, example: Example, stage: Stage) -> bool:
        return seed_of(stage.seed, "sdft", example.domain, example.row) < self.share * 2**63

    def _write(self, module: StageModule, rows: Sequence[Example], stage: Stage) -> list[str | None]:
        """What the model writes for each row; `None` where it does not come to an end."""
        tokenizer = module.backbone.tokenizer
        end = tokenizer.eos_token_id
        limit = self.max_new_tokens or max(len(e.completion) for e in rows)
        prompts = {
            i: fill(tokenizer, self.template, {"prompt": e.prompt, "reference": without_end(e.completion, end)})
            for i, e in enumerate(rows)
        }
        order = sorted(prompts, key=lambda i: len(prompts[i]))
        found: list[str | None] = [None] * len(rows)
        for first in range(0, len(order), self.generation_batch):
            group = order[first : first + self.generation_batch]
            seed = seed_of(stage.seed, "sdft", "write", stage.index, first)
            how = None if self.temperature is None else Sampling(temperature=self.temperature, seed=seed)
            written = self._generate(module, [prompts[i] for i in group], limit, how)
            for i, ids in zip(group, written, strict=True):
                found[i] = tokenizer.decode(ids, skip_special_tokens=True) if len(ids) < limit else None
        return found

    def _generate(
        self, module: StageModule, prompts: Sequence[Sequence[int]], limit: int, how: Sampling | None
    ) -> list[list[int]]:
        def run() -> list[list[int]]:
            generate = module.backbone.generate
            if self.rewriter == "current":
                return generate(module.model, prompts, max_new_tokens=limit, sampling=how)
            with module.adapter.reference(module.model):
                return generate(module.model, prompts, max_new_tokens=limit, sampling=how)

        return run_as(module, {}, run)


def _text(tokenizer: Any, example: Example) -> str:
    text: str = tokenizer.decode(list(without_end(example.completion, tokenizer.eos_token_id)))
    return text


def _completion(tokenizer: Any, old: str, new: str) -> tuple[int, ...]:
    """The tokens of a rewrite, with the blanks around the old completion: they belong to the domain's template."""
    body = old.strip()
    before, _, after = old.partition(body) if body else (old, "", "")
    return (*tokenizer(before + new.strip() + after, add_special_tokens=False).input_ids, tokenizer.eos_token_id)

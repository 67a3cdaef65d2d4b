"""New prompts of the kind of those that there are, and answers to them, by the pretrained model (Wang et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from residency.core.errors import UserError
from residency.core.randomness import permutation, seed_of
from residency.core.types import Row, RowKind
from residency.domains.augmentation.base import Asked, Attempt, Augmentation, BaseModel, Material
from residency.domains.augmentation.filters import (
    LEAST_DISTINCT,
    LEAST_MARGIN,
    LONGEST,
    MOST_OVERLAP,
    SHORTEST,
    distinct_trigrams,
    is_refusal,
    likeliest_label,
    novelty,
)
from residency.domains.augmentation.paraphrase import check_temperature, room_for

__all__ = ["SelfInstruct", "failed_prompt", "failed_text"]

REQUEST = (
    "Here are three texts of one kind.\n\n1. {0}\n\n2. {1}\n\n3. {2}\n\n"
    "Write one more text of the same kind about something else. Write nothing but the text."
)
SEEDS = 3


def failed_text(text: str | None, others: Sequence[str]) -> str:
    """The first filter of texts that a model wrote by itself which a text fails; empty if it passes all.

    In order: `unfinished`, `empty`, `refusal`, `length` (half of the shortest to twice the longest of the others, in
    characters), `repetition` (distinct sequences of three words below 0.6).

    Args:
        text: The text; `None` = it did not end.
        others: Texts of its kind, at least one.
    """
    if text is None:
        return "unfinished"
    if not text.strip():
        return "empty"
    if is_refusal(text):
        return "refusal"
    lengths = [len(other) for other in others]
    if not SHORTEST * min(lengths) <= len(text) <= LONGEST * max(lengths):
        return "length"
    return "repetition" if distinct_trigrams(text) < LEAST_DISTINCT else ""


def failed_prompt(text: str | None, seeds: Sequence[str]) -> str:
    """The same of a prompt, which must also be new: `overlap` = a ROUGE-L of 0.7 or more with a seed."""
    failed = failed_text(text, seeds)
    return failed or ("overlap" if text is not None and novelty(text, seeds) >= MOST_OVERLAP else "")


class SelfInstruct(Augmentation):
    """Prompts that the pretrained model makes up after three training rows, with its own answers.

    In a domain of labels, the answer is the label that is by 1 nat likelier to the model than any other; a prompt
    without one is dropped. Otherwise the model writes it. The first of the three rows is the parent.

    Args:
        temperature: Logits are divided by it, where prompts and answers are written.
    """

    name: ClassVar[str] = "self_instruct"
    kinds: ClassVar[frozenset[RowKind]] = frozenset({"completion", "labelled", "prompt"})
    needs_base: ClassVar[bool] = True
    kept_in_cache: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        check_temperature(self, temperature)
        self.temperature = temperature

    def check(self, material: Material) -> None:
        """Three rows to begin with.

        Raises:
            UserError: There are fewer, or of another kind.
        """
        super().check(material)
        if len(material.rows) < SEEDS:
            raise UserError(
                f"augment: SelfInstruct of {len(material.rows)} training rows",
                why=f"the model is shown {SEEDS} of them",
                fix="add rows, or leave the method out",
            )

    def attempts(self, asked: Sequence[Asked], material: Material) -> Iterator[Attempt]:
        """Dropped by a filter of prompts, of answers (`answer_` and the filter), or as `label`."""
        base = material.base
        assert base is not None
        place = {row.id: k for k, row in enumerate(material.rows)}
        for one in asked:
            seeds = self._seeds(one, material.rows, place[one.parent.id])
            texts = [row.prompt for row in seeds]
            prompt = self._write(base, REQUEST.format(*texts), texts, one, "prompt")
            failed = failed_prompt(prompt, texts)
            if prompt is None or failed:
                yield Attempt(prompt=prompt or "", dropped=failed, own=True)
                continue
            answer, failed = self._answer(base, prompt, seeds, one, material)
            more = {"seeds": [row.id for row in seeds]}
            yield Attempt(prompt=prompt, completion=answer or "", dropped=failed, more=more, own=True)

    def _seeds(self, asked: Asked, rows: Sequence[Row], own: int) -> list[Row]:
        order = permutation(len(rows), self.seed, self.name, asked.parent.id, asked.number)
        return [asked.parent, *(rows[k] for k in order if k != own)][:SEEDS]

    def _write(self, base: BaseModel, request: str, like: Sequence[str], asked: Asked, what: str) -> str | None:
        seed = seed_of(self.seed, self.name, what, asked.parent.id, asked.number)
        room = room_for(like, base.tokenizer)
        return base.write(request, max_new_tokens=room, temperature=self.temperature, seed=seed)

    def _answer(
        self, base: BaseModel, prompt: str, seeds: Sequence[Row], asked: Asked, material: Material
    ) -> tuple[str | None, str]:
        """(answer to a new prompt, filter that drops it)."""
        if asked.parent.kind == "prompt":
            return "", ""
        if material.labels:
            label = _label(base, replace(asked.parent, prompt=prompt), material)
            return label, "" if label is not None else "label"
        texts = [row.completion for row in seeds]
        answer = self._write(base, prompt, texts, asked, "answer")
        failed = failed_text(answer, texts)
        return answer, f"answer_{failed}" if failed else ""

    def identity(self) -> dict[str, Any]:
        """Options and the request."""
        return {"seed": self.seed, "temperature": self.temperature, "request": REQUEST}


def _label(base: BaseModel, row: Row, material: Material) -> str | None:
    """The label of a prompt, if the model is sure of one."""
    assert material.template is not None
    others = [label for label in material.labels if label != row.completion]
    example = material.template.encode(base.tokenizer, domain="augment", row=row, labels=material.labels, split="test")
    return likeliest_label(base.nll(example), [row.completion, *others], margin=LEAST_MARGIN)

"""Prompts in other words, written by the pretrained model of the run itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from residency.core.errors import UserError
from residency.core.randomness import seed_of
from residency.core.types import Row
from residency.domains.augmentation.base import Asked, Attempt, Augmentation, BaseModel, Material
from residency.domains.augmentation.filters import failed_filter

__all__ = ["Paraphrase", "answer_holds", "check_temperature", "room_for"]

REQUEST = (
    "Rewrite the following text in other words. Keep its meaning, its language, every number and everything in "
    "quotation marks. Write nothing but the rewritten text.\n\n{prompt}"
)
FACTOR = 1.2
"""How much less likely the answer may become."""


def answer_holds(child: float, parent: float, *, factor: float = FACTOR) -> bool:
    """Whether the answer is still one to the reworded prompt: its nll is at most `factor` times what it was.

    Args:
        child: Negative log-likelihood of the answer given the reworded prompt, in nats.
        parent: The same given the prompt.
        factor: At least 1.
    """
    return child <= factor * parent


def room_for(texts: Sequence[str], tokenizer: Any) -> int:
    """Most tokens of a text that is at most twice as long as others, with some to spare."""
    return 2 * max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts) + 16


def check_temperature(method: Augmentation, temperature: float) -> None:
    """A temperature from which can be drawn.

    Raises:
        UserError: It is not above 0.
    """
    if not temperature > 0:
        raise UserError(
            f"augment: {type(method).__name__} with temperature={temperature}",
            why="logits are divided by it, and several children of a row differ by their draws",
            fix="give 0.7",
        )


class Paraphrase(Augmentation):
    """Prompts that the pretrained model of the run has rewritten; the completion stays.

    One fixed request, one counter-based seed per row and number. Kept are rewordings in the same script, with the same
    numbers and quotations, of half to twice the length, a chrF of 0.3 to 0.95 with the prompt, after which the answer
    is at most 1.2 times as unlikely to the model (in nats) as it was. A small model fails this often.

    Args:
        temperature: Logits are divided by it.
    """

    name: ClassVar[str] = "paraphrase"
    needs_base: ClassVar[bool] = True
    kept_in_cache: ClassVar[bool] = True

    def __init__(self, *, temperature: float = 0.7, **options: Any) -> None:
        super().__init__(**options)
        check_temperature(self, temperature)
        self.temperature = temperature

    def attempts(self, asked: Sequence[Asked], material: Material) -> Iterator[Attempt]:
        """Dropped as `unfinished`, by a filter of rewordings (`failed_filter`), or as `answer`."""
        base = material.base
        assert base is not None
        before: dict[str, float] = {}
        for one in asked:
            row = one.parent
            new = base.write(
                REQUEST.replace("{prompt}", row.prompt),
                max_new_tokens=room_for([row.prompt], base.tokenizer),
                temperature=self.temperature,
                seed=seed_of(self.seed, self.name, row.id, one.number),
            )
            reason = "unfinished" if new is None else failed_filter(new, row.prompt)
            if new is None or reason or not row.completion:
                yield Attempt(prompt=new or "", dropped=reason)
                continue
            if row.id not in before:
                before[row.id] = _answer_nll(base, row, material)
            after = _answer_nll(base, replace(row, prompt=new), material)
            ratio = after / before[row.id] if before[row.id] else None
            yield Attempt(prompt=new, dropped="" if answer_holds(after, before[row.id]) else "answer", score=ratio)

    def identity(self) -> dict[str, Any]:
        """Options and the request."""
        return {"seed": self.seed, "temperature": self.temperature, "request": REQUEST, "factor": FACTOR}


def _answer_nll(base: BaseModel, row: Row, material: Material) -> float:
    """Of the row's own completion, as its template writes it."""
    assert material.template is not None
    return base.nll(material.template.encode(base.tokenizer, domain="augment", row=row, split="test"))[0]

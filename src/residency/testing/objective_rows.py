"""Rows of every kind that an objective reads, without files, and a stream of two domains made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from residency.core.types import Branch, Example, Split, Stage
from residency.domains.sampler import StageExamples
from residency.domains.stream_data import StreamData
from residency.objectives.rewards import Answer, Question, Reward

__all__ = ["ExampleData", "Parity", "examples_of"]

_LABELS = [(70, 0), (71, 0), (72, 0)]


class Parity(Reward):
    """1 for every other text: an untrained policy gets it now and then."""

    def __call__(self, questions: Sequence[Question], answers: Sequence[Answer]) -> list[float | None]:
        """0 or 1."""
        return [float(sum(map(ord, answer.text)) % 2 == 0) for answer in answers]


def examples_of(kind: str, *, domain: str = "x", count: int = 8) -> list[Example]:
    """Distinct examples of one kind, of unequal lengths, pairs with a common beginning."""
    found = []
    for i in range(count):
        prompt = tuple((ord(domain[0]) + 5 * i + k) % 200 + 1 for k in range(3 + i % 4))
        answer = (*((40 + 7 * i + k) % 200 + 1 for k in range(2 + i % 3)), 0)
        other = (answer[0], *((90 + 5 * i + k) % 200 + 1 for k in range(4 - i % 3)), 0)
        branches: Mapping[str, tuple[Branch, ...]] = {
            "completion": (Branch(tokens=answer),),
            "prompt": (Branch(tokens=answer),),
            "label": (Branch(tokens=_LABELS[i % 3]),),
            "pair": (Branch(tokens=answer, role="chosen"), Branch(tokens=other, role="rejected")),
            "unpaired": (Branch(tokens=answer, role="rejected" if i % 2 else "chosen"),),
        }
        found.append(Example(domain=domain, row=str(i), prompt=prompt, branches=branches[kind]))
    return found


class ExampleData(StreamData):
    """A stream whose domains are examples already.

    Args:
        domains: Readers of the same names; only their names are used in training.
        kind: Of the rows.
        batch_size: Of a step.
        micro_batch_size: Of a forward pass; `None` = a step is one.
    """

    def __init__(self, *, domains: Any, kind: str, batch_size: int = 4, micro_batch_size: int | None = None) -> None:
        super().__init__(domains=domains, batch_size=batch_size, micro_batch_size=micro_batch_size)
        self.kind = kind

    def examples(self, stage: Stage, tokenizer: Any) -> StageExamples:
        """By position."""
        rows = examples_of(self.kind, domain=stage.domain)
        return StageExamples(rows=len(rows), encode=rows.__getitem__, stage=stage)

    def evaluation_examples(
        self, name: str, split: Split, tokenizer: Any, *, competing: int | None = None, learned: int = 0
    ) -> list[Example]:
        """Of the same kind."""
        return examples_of(self.kind, domain=name, count=2)

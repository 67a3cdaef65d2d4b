"""Rows as files give them, and examples as models read them: one prompt and the branches that go on from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

__all__ = ["Branch", "Example", "Role", "Row", "RowKind", "Split"]

Split = Literal["train", "validation", "test"]

RowKind = Literal["completion", "messages", "text", "prompt", "pair", "unpaired", "labelled"]
"""What a row says.

`completion`: what to write after a prompt. `messages`: a conversation, every assistant turn to be learnt. `text`: text
without a prompt. `prompt`: a prompt alone, with what a reward needs in `Row.extra`. `pair`: a chosen and a rejected
completion. `unpaired`: one completion, wanted or not. `labelled`: a prompt and one of a closed set of labels.
"""

Role = Literal["completion", "label", "chosen", "rejected", "rollout"]
"""What a branch is to the objective that reads it.

`completion`: what should be written. `label`: another label, for scoring. `chosen`, `rejected`: the two of a pair, or
alone the wanted or unwanted completion of an unpaired row. `rollout`: written by a model.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One example of a domain as text. Whatever its kind, `prompt` and `completion` are texts that scores can read.

    Args:
        id: Unique and stable inside its domain (a code, a key, a line number).
        prompt: What the model reads. Never supervised. Of a conversation: all contents before the last answer.
        completion: What the model should write: the completion, the last answer, the chosen one, the label, the text.
        group: Rows of one group never meet in two splits. Defaults to the id.
        kind: What the row says.
        messages: Of a conversation: its turns, or of a pair those before the two answers, as chat templates take them.
        tools: What a conversation may call, as chat templates take it.
        rejected: The other completion of a pair.
        wanted: Of an unpaired row: whether its completion is wanted.
        references: Further right answers.
        weight: Factor of the row in the loss.
        extra: Other columns: what a reward needs, what scores keep.
    """

    id: str
    prompt: str
    completion: str
    group: str = ""
    kind: RowKind = "completion"
    messages: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    tools: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    rejected: str = ""
    wanted: bool = True
    references: tuple[str, ...] = ()
    weight: float = 1.0
    extra: Mapping[str, Any] = field(default_factory=dict, hash=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """Tokens that go on from a prompt.

    Args:
        tokens: The tokens.
        mask: Which of them are supervised, one entry a token; empty = all of them. Several turns of a conversation are
            several supervised runs.
        role: What the branch is.
        weight: Factor of its terms in a loss.
        reference: log-probability of its supervised tokens together, in nats, under the reference of the stage that
            learns from it; `None` where no objective asked for one.

    Raises:
        ValueError: The mask has another length than the tokens.
    """

    tokens: tuple[int, ...]
    mask: tuple[bool, ...] = ()
    role: Role = "completion"
    weight: float = 1.0
    reference: float | None = None

    def __post_init__(self) -> None:
        if self.mask and len(self.mask) != len(self.tokens):
            raise ValueError(f"{len(self.mask)} entries of a mask for {len(self.tokens)} tokens")
        if all(self.mask):
            # One form of each branch, so that equal branches compare equal.
            object.__setattr__(self, "mask", ())

    @property
    def supervised(self) -> tuple[int, ...]:
        """Places of the supervised tokens, in order."""
        return tuple(k for k, on in enumerate(self.mask) if on) if self.mask else tuple(range(len(self.tokens)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """One row as token ids. The packed layout reads the prompt once for all branches, and what branches share once.

    Args:
        domain: Name of the domain the row came from.
        row: `Row.id`.
        prompt: Prompt tokens, at least one; never supervised.
        branches: What goes on from the prompt, none of which sees the others. A completion (or a conversation) is
            first and alone in training; in scoring the other labels follow it. A pair is `chosen`, then `rejected`.
            Empty for a prompt that an objective continues itself.
        split: Where the row came from. Nothing but `train` may be learned from or kept (`mitigations.replay`). It says
            nothing about the tokens and takes no part in comparisons.
        cut_prompt: How many tokens of the prompt a limit has cost.
        cut_completion: How many tokens of the longest branch; with them its end token is gone.
        fewer_shots: How many of the examples that were to stand before it (`data.shots`) found no room.
        extra: `Row.extra`: what a reward needs beside the answer.
    """

    domain: str
    row: str
    prompt: tuple[int, ...]
    branches: tuple[Branch, ...]
    split: Split = field(default="train", compare=False)
    cut_prompt: int = field(default=0, compare=False)
    cut_completion: int = field(default=0, compare=False)
    fewer_shots: int = field(default=0, compare=False)
    extra: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @classmethod
    def of(
        cls,
        *,
        domain: str,
        row: str,
        prompt: tuple[int, ...],
        completion: tuple[int, ...],
        alternatives: Sequence[tuple[int, ...]] = (),
        split: Split = "train",
    ) -> Example:
        """An example of one completion, all of it supervised, and of the labels that compete with it.

        Args:
            domain: Name of the domain.
            row: `Row.id`.
            prompt: Prompt tokens.
            completion: Supervised tokens, the end token included.
            alternatives: For scoring a label: the other labels.
            split: Where the row came from.
        """
        bare = cls(domain=domain, row=row, prompt=prompt, branches=(), split=split)
        return bare.answered(completion, alternatives)

    @property
    def completion(self) -> tuple[int, ...]:
        """Tokens of the first branch, supervised or not; empty without one."""
        return self.branches[0].tokens if self.branches else ()

    @property
    def alternatives(self) -> tuple[tuple[int, ...], ...]:
        """Tokens of the branches behind the first."""
        return tuple(branch.tokens for branch in self.branches[1:])

    @property
    def targets(self) -> int:
        """How many tokens of the first branch are supervised."""
        return len(self.branches[0].supervised) if self.branches else 0

    def answered(self, completion: tuple[int, ...], alternatives: Sequence[tuple[int, ...]] = ()) -> Example:
        """The same prompt with another completion, all of it supervised, and other labels beside it."""
        return replace(self, branches=(Branch(tokens=completion),)).competing(alternatives)

    def competing(self, labels: Sequence[tuple[int, ...]]) -> Example:
        """The example with other labels behind its first branch."""
        return replace(self, branches=(*self.branches[:1], *(Branch(tokens=t, role="label") for t in labels)))

    @property
    def has_turns(self) -> bool:
        """Whether the first branch has tokens that are not supervised: other turns between answers."""
        return bool(self.branches and self.branches[0].mask)

    def alone(self) -> Example:
        """The example with its first branch only."""
        return replace(self, branches=self.branches[:1]) if len(self.branches) > 1 else self

    def last_turn(self) -> Example:
        """The last supervised run as the completion, everything before it as the prompt.

        What generates an answer asks for this one; of a single completion it is the example itself.
        """
        if not self.has_turns:
            return self
        first = self.branches[0]
        end = max(first.supervised, default=-1) + 1
        start = next((k for k in range(end - 1, -1, -1) if not first.mask[k]), -1) + 1
        run = replace(first, tokens=first.tokens[start:end], mask=())
        return replace(self, prompt=(*self.prompt, *first.tokens[:start]), branches=(run, *self.branches[1:]))

    def __len__(self) -> int:
        return len(self.prompt) + sum(len(branch.tokens) for branch in self.branches)

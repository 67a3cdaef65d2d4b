"""What becomes of the rows and tokens of a split: nothing is left out without a number that says so."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Example, Row
from residency.domains.lengths import TooLong

__all__ = ["TokenCounts", "TrainingRows", "check_readable", "count_tokens"]

ALLOWED_SHARE = 0.01  # of a split's training rows, that are left out without being asked for
UNREADABLE_SHARE = 0.5  # of a split's rows, whose answers the tokenizer cannot write


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenCounts:
    """Of one split.

    Args:
        rows: That are used.
        left_out: Training rows that are too long.
        prompts_cut: Rows whose prompt lost tokens, and how many tokens.
        completions_cut: Rows whose completion lost its end, and how many tokens; their end token is gone.
        unwritable: Rows whose completion is another text after encoding and decoding: nothing can write it exactly.
        unknown: Tokens that stand for text which the tokenizer does not know.
        prompt_tokens: Of all rows.
        supervised_tokens: Of all rows and branches.
        longest: Tokens of the longest row.
        highest_id: The largest token id.
        same_answers: Rows whose own answer is, token by token, another of their answers too.
        shots_left_out: Rows with fewer examples before them than were asked for, and how many fewer.
    """

    rows: int
    left_out: int
    prompts_cut: tuple[int, int]
    completions_cut: tuple[int, int]
    unwritable: int
    unknown: int
    prompt_tokens: int
    supervised_tokens: int
    longest: int
    highest_id: int
    same_answers: int = 0
    shots_left_out: tuple[int, int] = (0, 0)


class TrainingRows:
    """Which training rows are used, found while they pass by.

    Args:
        policy: `template.too_long`; `None` allows 1 % to be left out.
    """

    def __init__(self, *, policy: TooLong | None) -> None:
        self.policy = policy
        self.kept: list[int] = []
        self._rows = self._over = self._longest = 0

    def used(self, pairs: Iterable[tuple[Example, Row]]) -> Iterator[tuple[Example, Row]]:
        """Those of the pairs that are trained on, in order; `kept` has their places."""
        for example, row in pairs:
            over = bool(example.cut_prompt or example.cut_completion)
            if over:
                self._over += 1
                self._longest = max(self._longest, len(example) + example.cut_completion)
            if not over or self.policy not in (None, "drop", "refuse"):
                self.kept.append(self._rows)
                yield example, row
            self._rows += 1

    def check(self, *, where: str) -> None:
        """Whether so many may be left out.

        Raises:
            UserError: A row is too long, and the policy refuses that; or more than 1 %, and there is no policy; or all.
        """
        told = self.policy not in (None, "refuse")
        allowed = 0.0 if self.policy == "refuse" else ALLOWED_SHARE * self._rows
        if (told or self._over <= allowed) and (self.kept or not self._rows):
            return
        raise UserError(
            f"{self._over} of {self._rows} training rows of {where} are too long (the longest: {self._longest} tokens)",
            why="template.too_long is refuse" if self.policy == "refuse" else "they would be left out of training",
            fix="raise template.max_tokens, or set template.too_long to drop, truncate_prompt or truncate",
        )


def count_tokens(pairs: Iterable[tuple[Example, Row]], tokenizer: Any) -> TokenCounts:
    """The counts of the examples that are used, each with its row.

    Args:
        pairs: (example, row).
        tokenizer: That encoded them.
    """
    n = unwritable = unknown = prompt_tokens = supervised = longest = highest = same = 0
    prompts, completions, shots = [0, 0], [0, 0], [0, 0]
    for example, row in pairs:
        n += 1
        prompts = [prompts[0] + (example.cut_prompt > 0), prompts[1] + example.cut_prompt]
        completions = [completions[0] + (example.cut_completion > 0), completions[1] + example.cut_completion]
        shots = [shots[0] + (example.fewer_shots > 0), shots[1] + example.fewer_shots]
        same += example.completion in example.alternatives
        unwritable += not example.cut_completion and not _survives(example, row, tokenizer)
        # A classifier's label is the number of a row, not a token of the vocabulary.
        written = () if hasattr(tokenizer, "label_token") else example.branches
        tokens = [example.prompt, *(branch.tokens for branch in written)]
        unknown += _unknown(tokens, tokenizer)
        prompt_tokens += len(example.prompt)
        supervised += sum(len(branch.supervised) for branch in example.branches)
        longest = max(longest, len(example))
        highest = max(highest, *(max(part, default=0) for part in tokens))
    return TokenCounts(
        rows=n,
        left_out=0,
        prompts_cut=(prompts[0], prompts[1]),
        completions_cut=(completions[0], completions[1]),
        unwritable=unwritable,
        unknown=unknown,
        prompt_tokens=prompt_tokens,
        supervised_tokens=supervised,
        longest=longest,
        highest_id=highest,
        same_answers=same,
        shots_left_out=(shots[0], shots[1]),
    )


def _survives(example: Example, row: Row, tokenizer: Any) -> bool:
    """Whether the tokens of the first branch spell the row's completion, up to white space."""
    if hasattr(tokenizer, "label_token"):
        return True
    if not example.branches or not row.completion or any(turn.get("tool_calls") for turn in row.messages[-1:]):
        return True
    written: str = tokenizer.decode(list(example.last_turn().completion), skip_special_tokens=False)
    return " ".join(row.completion.split()) in " ".join(written.split())


def _unknown(tokens: Iterable[tuple[int, ...]], tokenizer: Any) -> int:
    unk = getattr(tokenizer, "unk_token_id", None)
    # Some tokenizers name their end token as the unknown one as well (GPT-2): that says nothing.
    if unk is None or unk == tokenizer.eos_token_id:
        return 0
    return sum(part.count(unk) for part in tokens)


def check_readable(counts: TokenCounts, tokenizer: Any, *, where: str) -> None:
    """What a model can read, before it is asked to.

    Args:
        counts: Of a split.
        tokenizer: Knows how many tokens its model has (`model_vocabulary`), where a backbone told it.
        where: The split, for messages.

    Raises:
        UserError: A token without a row in the embedding, or a tokenizer that does not know most of the text.
    """
    vocabulary = getattr(tokenizer, "model_vocabulary", None)
    if vocabulary is not None and counts.highest_id >= vocabulary:
        token = tokenizer.convert_ids_to_tokens(counts.highest_id)
        raise UserError(
            f"{where}: token {token!r} has the id {counts.highest_id}, and the model has {vocabulary} embedding rows",
            why="the model cannot read a token that it has no row for",
            fix="use the tokenizer of this model, or resize the model's embeddings and save it with the tokenizer",
        )
    if counts.unknown and counts.unwritable > UNREADABLE_SHARE * counts.rows:
        raise UserError(
            f"{where}: {counts.unwritable} of {counts.rows} completions hold text that the tokenizer does not know",
            why="it is replaced by the unknown token, which would be all that is learnt",
            fix="use a model whose tokenizer was made for this language or notation",
        )

"""From a row to token ids, by a plain text around its parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.types import Branch, Example, Role, Row, Split
from residency.domains.lengths import Keep, TooLong, cuttable_tokens, fit_length, model_limits
from residency.domains.tokens import TokenText, Variant, branch_out, common_start, encode_text, mark_control

__all__ = ["Template"]

Tokenise = Literal["apart", "together"]


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""A plain text around prompt and completion, and how many tokens of it are kept.

    What is null is left to the domain: user data goes as far as the model reads; packaged domains keep 96 tokens of a
    prompt and 128 in all, and cut what is longer. Prompt and completion are tokenised apart.

    Args:
        prompt: Text the model reads; every `{prompt}` is replaced by the row's prompt.
        completion: Text the model should write; every `{completion}` is replaced by the row's completion.
        max_prompt_tokens: Longest prompt in tokens; null = no limit of its own.
        max_tokens: Longest prompt and completion together in tokens; null = what the model can read.
        too_long: What happens to longer rows (see `TooLong`); null = training rows are left out, up to 1 % of them.
        keep_prefix: Characters of a prompt that are never cut (an instruction); `line` = its first line.
        tokenise: `apart` = prompt and completion each by itself, so that their border is exact; `together` = as one
            text, as pretraining saw it: a token over the border belongs to the completion.

    Raises:
        UserError: A placeholder is missing, or the limits leave no room for a completion.
    """

    prompt: str = "{prompt}\n"
    completion: str = " {completion}"
    max_prompt_tokens: int | None = None
    max_tokens: int | None = None
    too_long: TooLong | None = None
    keep_prefix: Keep = 0
    tokenise: Tokenise | None = None

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("completion", self.completion)):
            if f"{{{name}}}" not in value:
                raise UserError(
                    f"template.{name} = {value!r}",
                    why=f"without {{{name}}} the text of the rows has no place in it",
                    fix=f"put {{{name}}} where the row's {name} belongs",
                )
        prompt, whole = self.max_prompt_tokens, self.max_tokens
        if (
            (prompt is not None and prompt < 1)
            or (whole is not None and whole < 2)
            or (prompt or 1) >= (whole or 10**9)
        ):
            raise UserError(
                f"template.max_prompt_tokens = {prompt}, template.max_tokens = {whole}",
                why="a prompt needs at least one token, and the completion at least one more",
                fix="choose 1 <= max_prompt_tokens < max_tokens",
            )

    def encode(
        self, tokenizer: Any, *, domain: str, row: Row, labels: Sequence[str] = (), split: Split = "train"
    ) -> Example:
        """Turn one row into token ids.

        Args:
            tokenizer: A transformers tokenizer.
            domain: Name of the domain, stored in the example.
            row: The row, of any kind but `messages`.
            labels: All labels of the domain; those other than the row's own become branches behind it, in this order.
            split: Where the row comes from; says what happens to one that is too long.

        Raises:
            UserError: The tokenizer has no end-of-text token, the row is a conversation, or the limits cut two labels
                down to the same tokens.
        """
        if row.messages:
            raise UserError(
                f"row {row.id!r} of {domain} is a conversation",
                why="a plain template has one prompt and one completion",
                fix="set template: chat",
            )
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__} without an end-of-text token",
                why="a completion has to end, or generation never stops",
                fix="set eos_token in the tokenizer's folder (tokenizer_config.json)",
            )
        limits = model_limits(tokenizer, self.max_tokens, self.max_prompt_tokens, self.too_long, split)
        front = _front(tokenizer)
        said = "" if row.kind == "text" else self.prompt.replace("{prompt}", mark_control(tokenizer, row.prompt))
        before = encode_text(tokenizer, said)
        label_of = getattr(tokenizer, "label_token", None)
        if label_of is not None:
            # A classifier reads the prompt, and chooses among labels instead of writing them.
            start = (*front, *before.ids)
            variants = [_labelled(start, label_of(domain, text), role) for text, role in _answers(row, labels)]
        else:
            variants = [self._variant(tokenizer, front, said, before, *answer) for answer in _answers(row, labels)]
        # A text without tokens still needs something before the completion: the token between two texts.
        prompt, branches = (*front, *before.ids) or (tokenizer.eos_token_id,), tuple[Branch, ...]()
        if variants:
            prompt, branches = branch_out(variants, start=tokenizer.eos_token_id)
        weighted = tuple(replace(branch, weight=row.weight) for branch in branches)
        example = Example(
            domain=domain, row=row.id, prompt=prompt, branches=weighted, split=split, extra=dict(row.extra)
        )
        return fit_length(example, self._cuttable(before, row, len(front), len(prompt)), limits)

    def _variant(
        self, tokenizer: Any, front: tuple[int, ...], said: str, before: TokenText, text: str, role: Role
    ) -> Variant:
        """Prompt and one completion with its end, as token ids."""
        template = "{completion}" if not said else self.completion
        answer = template.replace("{completion}", mark_control(tokenizer, text))
        if self.tokenise == "together" and said:
            ids = encode_text(tokenizer, said + answer).ids
            border = common_start([before.ids, ids])
        else:
            ids = (*before.ids, *encode_text(tokenizer, answer).ids)
            border = len(before.ids)
        whole = (*front, *ids, tokenizer.eos_token_id)
        mask = (*(False for _ in range(len(front) + border)), *(True for _ in range(len(whole) - len(front) - border)))
        return Variant(ids=whole, mask=mask, role=role)

    def _cuttable(self, before: TokenText, row: Row, front: int, length: int) -> tuple[int, int]:
        """The tokens of the prompt that may be cut: the row's own, or all where the tokenizer cannot tell."""
        first, last = cuttable_tokens(before, row.prompt, self.keep_prefix) if before.spans else (0, len(before.ids))
        return min(front + first, length), min(front + last, length)


def _front(tokenizer: Any) -> tuple[int, ...]:
    bos = tokenizer.bos_token_id
    # Only a leading bos is kept of what the tokenizer adds: a closing token would end the text before the answer.
    adds_bos = bos is not None and tokenizer("a", add_special_tokens=True).input_ids[0] == bos
    return (bos,) if adds_bos else ()


def _labelled(prompt: tuple[int, ...], label: int, role: Role) -> Variant:
    return Variant(ids=(*prompt, label), mask=(*(False for _ in prompt), True), role=role)


def _answers(row: Row, labels: Sequence[str]) -> list[tuple[str, Role]]:
    """What may follow the prompt of a row, its own first."""
    if row.kind == "prompt":
        return []
    if row.kind == "pair":
        return [(row.completion, "chosen"), (row.rejected, "rejected")]
    role: Role = "completion" if row.kind != "unpaired" else "chosen" if row.wanted else "rejected"
    others: list[tuple[str, Role]] = [(label, "label") for label in labels if label != row.completion]
    return [(row.completion, role), *others]

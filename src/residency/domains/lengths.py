"""What is too long: one stated policy, and a count of every token that it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.types import Branch, Example, Split
from residency.domains.tokens import TokenText

__all__ = ["Keep", "Limits", "TooLong", "cuttable_tokens", "fit_length", "model_limits"]

Keep = int | Literal["line"]
"""How much of the beginning of a prompt is never cut: characters, or its first line."""

TooLong = Literal["drop", "truncate_prompt", "truncate", "refuse"]
"""What happens to a row that is longer than its limits.

`drop`: it is left out of training; in evaluation its prompt is cut, because a test row is never left out.
`truncate_prompt`: tokens of the row's own prompt are cut from the left; template and completion stay whole.
`truncate`: the prompt is cut as well, then the end of the completion, and with it its end token.
`refuse`: the command stops.
"""

_UNKNOWN = 10**9  # more than any model reads: what tokenizers that do not know it say, or more


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long an example may be.

    Args:
        tokens: Prompt and longest branch together.
        prompt: The prompt; `None` = as long as the whole may be.
        policy: What happens to what is longer.
    """

    tokens: int
    prompt: int | None
    policy: TooLong


def fit_length(example: Example, cuttable: tuple[int, int], limits: Limits) -> Example:
    """An example that keeps its limits.

    Args:
        example: As long as its row is.
        cuttable: The tokens of the prompt that the row itself brought: only these are cut, from the left.
        limits: What it has to keep.

    Returns:
        The example, with `cut_prompt` and `cut_completion` saying how many tokens are gone. `drop` and `refuse` cut
        nothing of a training row: `cut_*` then says how many tokens are too many.

    Raises:
        UserError: Cutting the prompt alone cannot make it fit, or cutting answers makes two of them equal.
    """
    longest = max((len(branch.tokens) for branch in example.branches), default=0)
    allowed = limits.tokens if limits.prompt is None else min(limits.prompt, limits.tokens)
    over = max(len(example.prompt) + longest - limits.tokens, len(example.prompt) - allowed)
    if over <= 0:
        return example
    if limits.policy in ("drop", "refuse") and example.split == "train":
        return replace(example, cut_prompt=over)
    cuts_end = limits.policy == "truncate"
    room = min(allowed, limits.tokens - longest)
    if cuts_end:
        # Where the end is cut too, the prompt keeps three quarters at most, so that something can be learnt.
        room = max(room, allowed if limits.prompt is not None else limits.tokens * 3 // 4)
    prompt, lost = _cut_left(example.prompt, cuttable, len(example.prompt) - room)
    left = limits.tokens - len(prompt)
    if left < 1 or limits.policy == "refuse" or (not cuts_end and (len(prompt) > room or longest > left)):
        raise UserError(
            f"row {example.row!r} of {example.domain} ({example.split}): {len(example.prompt)} tokens to read, "
            f"{len(prompt)} of them not to be cut, and {longest} to write; limit {limits.tokens}",
            why="a row that is scored is never left out, and its completion is never cut without being asked to",
            fix=f"raise template.max_tokens to {len(prompt) + longest}, or set template.too_long: truncate",
        )
    gone = max(0, longest - left)
    branches = tuple(_cut_right(branch, left) for branch in example.branches) if gone else example.branches
    found = replace(example, prompt=prompt, branches=branches, cut_prompt=lost, cut_completion=gone)
    if gone and found.completion in found.alternatives and example.completion not in example.alternatives:
        raise UserError(
            f"row {example.row!r} of {example.domain}: two of its answers have the same first {left} tokens",
            why="behind the limit nothing tells them apart, neither in training nor when they are scored",
            fix="raise template.max_tokens, or shorten the answers",
        )
    return found


def _cut_left(prompt: tuple[int, ...], cuttable: tuple[int, int], many: int) -> tuple[tuple[int, ...], int]:
    """The prompt without the first `many` of its cuttable tokens, and how many those were."""
    first, last = cuttable
    lost = max(0, min(many, last - first))
    # One token has to stay: the completion is predicted from it.
    lost = min(lost, len(prompt) - 1)
    return (*prompt[:first], *prompt[first + lost :]), lost


def _cut_right(branch: Branch, room: int) -> Branch:
    return replace(branch, tokens=branch.tokens[:room], mask=branch.mask[:room])


def model_limits(
    tokenizer: Any, tokens: int | None, prompt: int | None, policy: TooLong | None, split: Split
) -> Limits:
    """The limits of a template, where it leaves them to the model.

    Args:
        tokenizer: Knows what its model can read (`model_max_length`).
        tokens: `template.max_tokens`.
        prompt: `template.max_prompt_tokens`.
        policy: `template.too_long`.
        split: Rows that are scored are never left out: their prompts are cut instead.

    Raises:
        UserError: The limit is beyond what the model can read.
    """
    context = min(int(getattr(tokenizer, "model_max_length", _UNKNOWN)), _UNKNOWN)
    if tokens is not None and tokens > context:
        raise UserError(
            f"template.max_tokens = {tokens}",
            why=f"the model reads at most {context} tokens",
            fix=f"set template.max_tokens to at most {context}, or to null",
        )
    policy = policy or "drop"
    if policy == "drop" and split != "train":
        policy = "truncate_prompt"
    return Limits(tokens=context if tokens is None else tokens, prompt=prompt, policy=policy)


def cuttable_tokens(text: TokenText, value: str, keep: Keep) -> tuple[int, int]:
    """The tokens that lie wholly in a value of a text, behind what is kept of it.

    Args:
        text: With the value in it.
        value: What a row brought.
        keep: How much of its beginning stays.
    """
    at = text.text.find(value)
    if at < 0:
        value = value.strip()
        at = text.text.find(value)
    if at < 0 or not text.spans:
        return 0, 0
    kept = len(value.partition("\n")[0]) + 1 if keep == "line" else keep
    first = next((k for k, (a, _) in enumerate(text.spans) if a >= at + kept), len(text.ids))
    last = next((k for k, (_, b) in enumerate(text.spans) if b > at + len(value)), len(text.ids))
    return first, max(first, last)

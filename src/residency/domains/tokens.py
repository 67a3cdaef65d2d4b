"""Text to tokens: control tokens only where a template wrote them, and which tokens a span of characters covers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Branch, Role

__all__ = [
    "TokenText",
    "Variant",
    "branch_out",
    "clean_place",
    "common_start",
    "control_end",
    "encode_text",
    "mark_control",
    "supervised_tokens",
]

# Around what looks like a control token in a row, while its text goes through a template: private-use characters, as
# transformers' `mark_control_tokens` uses them for the same purpose.
_START, _END = "\U000f0000", "\U000f0001"


@dataclass(frozen=True, slots=True)
class TokenText:
    """A text and its tokens.

    Args:
        text: Without marks.
        ids: (n,) its tokens.
        spans: (n,) characters of each token, start and end; empty where the tokenizer cannot tell.
    """

    text: str
    ids: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One way a row may go on, from its first token.

    Args:
        ids: (n,) tokens of prompt and branch.
        mask: (n,) which of them are supervised.
        role: Of the branch.
    """

    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    role: Role = "completion"


def _control_tokens(tokenizer: Any) -> tuple[str, ...]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    special = {str(token) for token in added.values() if getattr(token, "special", False)}
    return tuple(sorted(special | {*getattr(tokenizer, "all_special_tokens", ())}, key=len, reverse=True))


@lru_cache(maxsize=64)
def _pattern(tokens: tuple[str, ...]) -> re.Pattern[str]:
    # The longest first: a token takes priority over those it contains.
    return re.compile("|".join(map(re.escape, tokens)) or "(?!)")


def mark_control(tokenizer: Any, text: str) -> str:
    """A text of a row with marks around what the tokenizer would read as control tokens: it stays text."""
    if _START in text or _END in text:
        # Marks that are there already could forge an end of a mark.
        text = text.replace(_START, "").replace(_END, "")
    return _pattern(_control_tokens(tokenizer)).sub(f"{_START}\\g<0>{_END}", text)


def clean_place(marked: str, place: int) -> int:
    """A place in a marked text as a place in the text without marks."""
    return place - marked.count(_START, 0, place) - marked.count(_END, 0, place)


def control_end(tokenizer: Any, marked: str) -> int:
    """Where the last control token of a text ends that is not marked as text; the end of the text if there is none."""
    found = _pattern(_control_tokens(tokenizer)).finditer(marked)
    ends = [match.end() for match in found if marked[match.start() - 1 : match.start()] != _START]
    return ends[-1] if ends else len(marked)


def encode_text(tokenizer: Any, marked: str) -> TokenText:
    """The tokens of a text; what is marked is encoded as plain text.

    Args:
        tokenizer: A transformers tokenizer; nothing is added in front or behind.
        marked: The text, with marks of `mark_control`.
    """
    if _START not in marked:
        return _piece(tokenizer, marked, plain=False)
    ids: list[int] = []
    spans: list[tuple[int, int]] = []
    text = ""
    # The odd pieces were between marks. A template may have torn a pair apart: lone marks only separate.
    for number, part in enumerate(re.split(f"{_START}([^{_START}{_END}]*){_END}", marked)):
        part = part.replace(_START, "").replace(_END, "")
        if not part:
            continue
        encode = _inner if text else _piece
        piece = encode(tokenizer, part, plain=number % 2 == 1)
        ids += piece.ids
        spans += [(a + len(text), b + len(text)) for a, b in piece.spans]
        text += part
    return TokenText(text, tuple(ids), tuple(spans))


def _piece(tokenizer: Any, text: str, *, plain: bool) -> TokenText:
    options = {"split_special_tokens": True} if plain else {}
    if not getattr(tokenizer, "is_fast", False):
        return TokenText(text, tuple(tokenizer(text, add_special_tokens=False, **options).input_ids), ())
    options |= {"return_offsets_mapping": True, "verbose": False}
    try:
        found = tokenizer(text, add_special_tokens=False, **options)
    except Exception as error:  # the tokenizers library raises plain exceptions
        if "UNK" not in str(error).upper():
            raise
        raise UserError(
            f"{text[:60]!r}: {error}",
            why="the tokenizer does not know a part of it, and has no token for what it does not know",
            fix="use a model whose tokenizer was made for this language or notation",
        ) from error
    return TokenText(text, tuple(found.input_ids), tuple(map(tuple, found.offset_mapping)))


def _inner(tokenizer: Any, text: str, *, plain: bool) -> TokenText:
    """A piece that does not begin its text: behind a line end, so that SentencePiece puts no blank in front of it."""
    before = _piece(tokenizer, "\n", plain=True).ids
    found = _piece(tokenizer, "\n" + text, plain=plain)
    if found.ids[: len(before)] != before:
        return _piece(tokenizer, text, plain=plain)
    spans = [(max(a - 1, 0), max(b - 1, 0)) for a, b in found.spans[len(before) :]]
    return TokenText(text, found.ids[len(before) :], tuple(spans))


def supervised_tokens(spans: Sequence[tuple[int, int]], supervised: Sequence[tuple[int, int]]) -> list[bool]:
    """Which tokens lie in supervised characters.

    A token that says it begins behind the end of the one before it covers the gap too (blanks that a tokenizer trims
    from its offsets), and the later tokens of one character (an emoji) cover that character: for both transformers'
    own assistant mask is wrong.

    Args:
        spans: (n,) characters of each token.
        supervised: Ranges of characters, start and end.

    Returns:
        (n,) flags; a token over the border of a range is in it.
    """
    flags: list[bool] = []
    reached = 0
    for start, end in spans:
        first = min(start, reached)
        last = max(end, first)
        flags.append(any(max(first, a) < min(last, b) if first < last else a <= first < b for a, b in supervised))
        reached = max(reached, end)
    return flags


def common_start(sequences: Sequence[Sequence[int]]) -> int:
    """How many tokens all sequences begin with."""
    # In the order of words, the first and the last share no more than all of them do.
    shortest, longest = min(map(tuple, sequences)), max(map(tuple, sequences))
    return next((k for k, token in enumerate(shortest) if token != longest[k]), len(shortest))


def branch_out(variants: Sequence[Variant], *, start: int) -> tuple[tuple[int, ...], tuple[Branch, ...]]:
    """The prompt that variants share, and what each goes on with.

    Args:
        variants: At least one; each with a supervised token.
        start: The token to put in front where the first token of all is supervised already: between two texts.

    Returns:
        (prompt, branches): the prompt ends where the first variant parts or is supervised; a branch ends with its last
        supervised token.
    """
    firsts = [next(k for k, on in enumerate(v.mask) if on) for v in variants]
    border = min(*firsts, common_start([v.ids for v in variants]) if len(variants) > 1 else firsts[0])
    front = () if border else (start,)
    branches = []
    for variant in variants:
        end = max(k for k, on in enumerate(variant.mask) if on) + 1
        branches.append(Branch(tokens=variant.ids[border:end], mask=variant.mask[border:end], role=variant.role))
    return (*front, *variants[0].ids[:border]), tuple(branches)

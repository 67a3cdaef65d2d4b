"""Putting examples into other texts, as token ids: what was tokenised once is not decoded and tokenised again."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from residency.core.errors import UserError

__all__ = ["check_placeholders", "fill", "without_end"]


def fill(tokenizer: Any, template: str, parts: Mapping[str, Sequence[int]]) -> tuple[int, ...]:
    """The tokens of a text, with given tokens in the place of its `{name}`s.

    Args:
        tokenizer: Of the backbone. The text between the placeholders is tokenised piece by piece.
        template: Text; `"{prompt}"` gives exactly the tokens of `parts["prompt"]`.
        parts: Tokens by name. A begin-of-text token that one of them starts with is moved to the front.
    """
    bos = tokenizer.bos_token_id
    found: list[int] = []
    begins = False
    for i, piece in enumerate(re.split(_any_of(parts), template)):
        if i % 2 == 0:
            found += tokenizer(piece, add_special_tokens=False).input_ids if piece else []
            continue
        ids = list(parts[piece])
        if bos is not None and ids[:1] == [bos]:
            begins, ids = True, ids[1:]
        found += ids
    return (bos, *found) if begins else tuple(found)


def _any_of(names: Mapping[str, Any]) -> str:
    return r"\{(" + "|".join(map(re.escape, names)) + r")\}"


def without_end(completion: Sequence[int], end: int) -> tuple[int, ...]:
    """A completion without the end-of-text token that closes it, where there is one."""
    return tuple(completion[:-1] if completion and completion[-1] == end else completion)


def check_placeholders(template: str, names: Sequence[str], *, owner: str) -> None:
    """Refuse a template that leaves something out.

    Raises:
        UserError: A `{name}` is missing.
    """
    missing = [name for name in names if f"{{{name}}}" not in template]
    if missing:
        raise UserError(
            f"{owner} with template={template!r}",
            why=f"without {{{missing[0]}}} the row's {missing[0]} has no place in it",
            fix=f"put {' and '.join(f'{{{name}}}' for name in names)} where they belong",
        )

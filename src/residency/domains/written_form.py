"""What a tokenizer makes of an answer: a model cannot write "Soup" if its tokens spell "soup"."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from residency.core.types import Row

__all__ = ["as_written", "written_form"]


def written_form(text: str, tokenizer: Any) -> str:
    """A text as its tokens spell it, where the tokenizer's own normalisation (case, accents) is all that changed it.

    What a tokenizer does not know is no form of the text: where letters are lost or become the unknown token, the text
    itself is returned, which nothing written equals.

    Args:
        text: An answer.
        tokenizer: Of transformers; only fast ones tell how they normalise.
    """
    back: str = tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids)
    normalizer = getattr(getattr(tokenizer, "backend_tokenizer", None), "normalizer", None)
    if back.split() == text.split() or normalizer is None:
        return text
    return back if _solid(back) == _solid(normalizer.normalize_str(text)) else text


def as_written(row: Row, tokenizer: Any) -> Row:
    """A row whose right answers are what the tokenizer can write of them; itself where nothing changes.

    Args:
        row: What was asked, with its completion and further references.
        tokenizer: Of the model that answered.
    """
    if hasattr(tokenizer, "label_token"):
        return row  # A classifier chooses its labels by number: their texts never meet the tokenizer.
    completion = written_form(row.completion, tokenizer)
    others = tuple(written_form(text, tokenizer) for text in row.references)
    return (
        row
        if (completion, others) == (row.completion, row.references)
        else replace(row, completion=completion, references=others)
    )


def _solid(text: str) -> str:
    """Without white space: tokenizers of words put blanks around marks."""
    return "".join(text.split())

"""Answers are held against what the tokenizer can write of them, and never against what it lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from residency.core.types import Row
from residency.domains.written_form import as_written, written_form
from residency.testing.tiny_models import write_tokenizer

LOWER = normalizers.Lowercase()
PLAIN_LETTERS = normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()])


def of_bytes(normalizer: Any) -> PreTrainedTokenizerFast:
    """Bytes of a normalised text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={"<|end|>": 0} | {c: i + 1 for i, c in enumerate(alphabet)}, merges=[]))
    inner.normalizer, inner.decoder = normalizer, decoders.ByteLevel()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def of_words(*known: str) -> PreTrainedTokenizerFast:
    """Whole lower-case words and marks; the rest is `<unk>`."""
    inner = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<|end|>", "<unk>", *known])}, unk_token="<unk>"))
    inner.normalizer, inner.pre_tokenizer = LOWER, pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


@pytest.mark.parametrize(
    ("tokenizer", "text", "written"),
    [
        (of_bytes(LOWER), "Soup", "soup"),
        (of_bytes(LOWER), "soup", "soup"),
        (of_bytes(PLAIN_LETTERS), "Crème", "creme"),
        (of_words("soup", ",", "tart"), "Soup, tart", "soup , tart"),
        (of_words("soup"), "Soup verbena", "Soup verbena"),
        (of_words(), "Soup", "Soup"),
    ],
)
def test_only_what_the_tokenizer_normalises_is_another_form(tokenizer: Any, text: str, written: str) -> None:
    assert written_form(text, tokenizer) == written


def test_tokenizers_that_change_nothing_change_nothing(tmp_path: Path) -> None:
    tokenizer = write_tokenizer(tmp_path)
    row = Row(id="1", prompt="p", completion="Größe \n  <|end|> 👩 NA", references=("A", "b  c"))
    assert as_written(row, tokenizer) is row


def test_every_right_answer_takes_its_written_form() -> None:
    row = Row(id="1", prompt="What?", completion="Soup", references=("Stew", "broth"))
    found = as_written(row, of_bytes(LOWER))
    assert (found.prompt, found.completion, found.references) == ("What?", "soup", ("stew", "broth"))


def test_the_labels_of_a_classifier_stay_as_they_are() -> None:
    """It chooses them by number, so that their texts never meet the tokenizer."""
    tokenizer = of_bytes(LOWER)
    tokenizer.label_token = lambda domain, text: 0
    row = Row(id="1", prompt="What?", completion="Soup")
    assert as_written(row, tokenizer) is row

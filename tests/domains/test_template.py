"""Properties of templates: what is kept, what is cut, how a completion ends."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains.base import Template

BOS, EOS = 1, 2


class CharTokenizer:
    """One token per character; can add a bos token in front, or a closing token behind."""

    def __init__(self, *, bos: bool = False, closing: bool = False, eos: int | None = EOS) -> None:
        self.bos_token_id = BOS
        self.eos_token_id = eos
        self.front = [BOS] if bos else []
        self.back = [EOS] if closing else []

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> Any:
        ids = [ord(character) for character in text]
        return SimpleNamespace(input_ids=[*self.front, *ids, *self.back] if add_special_tokens else ids)


def row(prompt: str = "why?", completion: str = "yes") -> Row:
    return Row(id="r", prompt=prompt, completion=completion)


def ids(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def test_the_template_puts_the_row_into_the_text_and_ends_the_completion() -> None:
    example = Template(prompt="Q: {prompt}\nA:").encode(CharTokenizer(), domain="d", row=row(prompt="why?"))
    assert example.prompt == ids("Q: why?\nA:")
    assert example.completion == (*ids(" yes"), EOS)
    assert (example.domain, example.row, example.alternatives) == ("d", "r", ())


def test_braces_in_the_data_are_harmless() -> None:
    odd = row(prompt="{0} {completion} {prompt", completion="{x} {completion}")
    example = Template().encode(CharTokenizer(), domain="d", row=odd)
    assert example.prompt == ids("{0} {completion} {prompt\n")
    assert example.completion == (*ids(" {x} {completion}"), EOS)


def test_alternatives_are_the_other_labels_in_order() -> None:
    example = Template().encode(CharTokenizer(), domain="d", row=row(completion="b"), labels=("a", "b", "c"))
    assert example.alternatives == ((*ids(" a"), EOS), (*ids(" c"), EOS))


def test_a_leading_bos_is_kept_and_a_closing_token_is_not() -> None:
    tokenizer = CharTokenizer(bos=True, closing=True)
    template = Template(max_prompt_tokens=4, max_tokens=9, too_long="truncate")
    example = template.encode(tokenizer, domain="d", row=row(prompt="abcdef"))
    assert example.prompt == (BOS, *ids("ef\n"))
    assert example.completion == (*ids(" yes"), EOS)


@settings(deadline=None, database=None, max_examples=60)
@given(
    prompt=st.text("abc", min_size=1, max_size=30),
    completion=st.text("xyz", min_size=1, max_size=30),
    limit=st.integers(1, 20),
    more=st.integers(1, 20),
    bos=st.booleans(),
)
def test_limits_keep_the_last_prompt_tokens_and_the_first_of_the_completion(
    prompt: str, completion: str, limit: int, more: int, bos: bool
) -> None:
    template = Template(max_prompt_tokens=limit, max_tokens=limit + more, too_long="truncate")
    given_row = row(prompt=prompt, completion=completion)
    example = template.encode(CharTokenizer(bos=bos), domain="d", row=given_row)
    assert 1 <= len(example.prompt) <= limit
    assert len(example.completion) >= 1
    assert len(example) <= limit + more
    kept = example.prompt[1:] if bos else example.prompt
    assert kept == ids(prompt + "\n")[len(prompt) + 1 - len(kept) :]
    has_bos = example.prompt[0] == BOS
    assert has_bos == bos
    whole = (*ids(f" {completion}"), EOS)
    assert example.completion == whole[: limit + more - len(example.prompt)]
    ended = example.completion[-1] == EOS
    assert ended == (len(example.completion) == len(whole))


def test_labels_that_the_limit_makes_equal_are_refused() -> None:
    template = Template(max_prompt_tokens=3, max_tokens=7, too_long="truncate")
    with pytest.raises(UserError, match="same first 4 tokens"):
        template.encode(CharTokenizer(), domain="d", row=row(completion="abcd"), labels=("abcd", "abce"))


def test_a_tokenizer_without_an_end_is_refused() -> None:
    with pytest.raises(UserError, match="end-of-text"):
        Template().encode(CharTokenizer(eos=None), domain="d", row=row())


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"prompt": "no place"}, "template.prompt"),
        ({"completion": "no place"}, "template.completion"),
        ({"max_prompt_tokens": 96, "max_tokens": 96}, "template.max_tokens = 96"),
        ({"max_prompt_tokens": 0}, "template.max_prompt_tokens = 0"),
    ],
)
def test_a_template_that_cannot_work_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        Template(**options)

"""Numbers of what is left out of rows that are tokenised, by hand."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from residency.core.errors import UserError
from residency.core.types import Example, Row, Stage
from residency.domains import Chat, Template
from residency.domains.left_out import in_words, of_tokens, told
from residency.domains.sampler import StageExamples, count_learned
from residency.domains.token_counts import count_tokens
from residency.mitigations.rehearsal.memory import Source, mixed_in
from residency.objectives.dataset import Mapped, Repeated

WORDS = ["<|end|>", "<unk>", "ask", "yes", "no", ">"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    """Lower-case words, six of them."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer, words.normalizer = pre_tokenizers.WhitespaceSplit(), normalizers.Lowercase()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|end|>", unk_token="<unk>")


def row(number: int, completion: str, rejected: str = "") -> Row:
    return Row(
        id=str(number),
        prompt="ask",
        completion=completion,
        rejected=rejected,
        kind="pair" if rejected else "completion",
    )


def test_what_the_tokenizer_cannot_tell_apart_or_does_not_know(tokenizer: Any) -> None:
    rows = [row(0, "Yes", "yes"), row(1, "yes", "no"), row(2, "maybe so"), row(3, "no")]
    template = Template(prompt="{prompt} >", completion=" {completion}", tokenise="apart", max_tokens=64)
    counts = count_tokens(((template.encode(tokenizer, domain="a", row=r), r) for r in rows), tokenizer)
    found = {one.what: (one.count, one.of) for one in of_tokens("train", counts)}
    # Prompts are two tokens; completions with their ends two, of pairs each, and three.
    assert {k: found[k] for k in ("same_answers", "unwritable", "unknown")} == {
        "same_answers": (1, 4),
        "unwritable": (2, 4),
        "unknown": (2, 4 * 2 + 2 * 4 + 3 + 2),
    }
    assert {what: count for what, (count, _) in found.items() if count} == {
        "same_answers": 1, "unwritable": 2, "unknown": 2
    }  # fmt: skip


def test_answers_that_a_cut_makes_equal_are_refused(tokenizer: Any) -> None:
    """Whoever wrote the template: a pair without a difference would train on nothing, a label could never win."""
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}{% endif %}"
    )
    pair = row(0, "yes yes no", "yes yes yes")
    for template in (Template(max_tokens=3, too_long="truncate"), Chat(max_tokens=3, too_long="truncate")):
        with pytest.raises(UserError, match="two of its answers have the same first"):
            template.encode(tokenizer, domain="a", row=pair)


def examples(rows: int, steps: int, batch_size: int) -> tuple[StageExamples, Stage, list[int]]:
    """A stage's examples, the stage, and which were made."""
    stage = Stage(index=1, domain="a", stages=2, seed=0, steps=steps, batch_size=batch_size)
    made: list[int] = []

    def encode(index: int) -> Example:
        made.append(index)
        return Example.of(domain="a", row=str(index), prompt=(1,), completion=(2,))

    return StageExamples(rows=rows, encode=encode, stage=stage, names=str), stage, made


@pytest.mark.parametrize(("rows", "steps", "batch_size"), [*itertools.product((5, 8, 40), (1, 3, 12), (1, 4))])
def test_rows_in_some_batch(rows: int, steps: int, batch_size: int) -> None:
    """As many as positions until all were seen, and nothing is tokenised to know it."""
    dataset, stage, made = examples(rows, steps, batch_size)
    assert count_learned(dataset, "a", positions=steps * batch_size) == min(rows, steps * batch_size)
    assert count_learned(Mapped(dataset, lambda e: e), "a", positions=steps * batch_size) == min(
        rows, steps * batch_size
    )
    old = [Example.of(domain="old", row=str(i), prompt=(1,), completion=(2,)) for i in range(3)]
    mixed = mixed_in(dataset, Source(name="replay", memory=old, ratio=0.5), stage=stage)
    twice = Repeated(dataset, times=2, batch_size=batch_size)
    assert not made
    for view in (mixed, twice):
        seen = {view[p].row for p in range(steps * batch_size) if view[p].domain == "a"}
        assert count_learned(view, "a", positions=steps * batch_size) == len(seen)


def test_lines_for_a_terminal() -> None:
    """One sentence for all columns of which it is true."""
    entry = {"split": "train", "count": 1234, "of": 2000, "unit": "rows", "how": "in no batch"}
    entries = [{**entry, "column": name} for name in ("a", "b\x1b[2J")]
    assert in_words(entry) == "1,234 of 2,000 rows in no batch"
    assert told([*entries, {**entry, "column": "c", "split": ""}]) == [
        "a, b[2J, train: 1,234 of 2,000 rows in no batch",
        "c: 1,234 of 2,000 rows in no batch",
    ]

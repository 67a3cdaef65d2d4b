"""Filters of what models write, by hand."""

from __future__ import annotations

import pytest

from residency.domains.augmentation.filters import (
    closeness,
    distinct_trigrams,
    failed_filter,
    is_refusal,
    likeliest_label,
    main_script,
    novelty,
    numbers,
    quotations,
)
from residency.domains.augmentation.paraphrase import answer_holds
from residency.domains.augmentation.self_instruct import failed_prompt, failed_text
from residency.scorers.overlap import rouge_l

PARENT = 'The 3 doctors met on 2024-07-26 and called it "a success" in the end.'
REWORDED = 'In the end the 3 doctors met on 2024-07-26 and named it "a success".'


@pytest.mark.parametrize(
    ("child", "filter"),
    [
        (REWORDED, ""),
        ("   ", "empty"),
        ("三名医生见面了", "script"),
        (REWORDED.replace("3", "4"), "numbers"),
        (REWORDED.replace("26", "27"), "numbers"),
        (REWORDED.replace("success", "triumph"), "quotations"),
        (REWORDED.replace('"', ""), "quotations"),
        ('3: 2024-07-26, "a success"', "length"),
        (REWORDED + " On that they all agreed, and so they went home, glad and tired, to sleep.", "length"),
        (PARENT.replace(".", "!"), "too_close"),
        (PARENT, "too_close"),
    ],
)
def test_the_first_filter_that_fails(child: str, filter: str) -> None:
    assert failed_filter(child, PARENT) == filter


def test_another_language_is_too_far() -> None:
    """By characters: it needs no model that tells languages."""
    parent = "The doctors met in the evening and called it a success."
    for other in (
        "Die Mediziner trafen sich am Abend: ein Erfolg.",
        "Los médicos se reunieron por la noche: un éxito.",
    ):
        assert failed_filter(other, parent) == "too_far"


def test_chrf_of_a_text_with_itself_is_one() -> None:
    assert closeness("a text", "a text") == pytest.approx(1)
    assert closeness("the cat sat", "the cat sat on the mat") == pytest.approx(0.49593, abs=1e-5)  # sacrebleu 2.6


def test_numbers_and_quotations_are_counted() -> None:
    assert numbers("1,000 or 3.5 and 3.5, 2024-07-26") == {"1,000": 1, "3.5": 2, "2024": 1, "07": 1, "26": 1}
    assert quotations('"a" and `b` and «c» and “d”, "a"') == {"a": 2, "b": 1, "c": 1, "d": 1}


@pytest.mark.parametrize(
    ("text", "script"),
    [("word", "Latin"), ("λόγος word λόγος", "Greek"), ("漢字とかな", "Kana"), ("漢字", "Han"), ("12 + 3", "")],
)
def test_the_script_of_most_letters(text: str, script: str) -> None:
    assert main_script(text) == script


def test_distinct_sequences_of_three_words() -> None:
    assert distinct_trigrams("a b c") == distinct_trigrams("one") == 1
    # a b a b a b has four sequences, two of them distinct.
    assert distinct_trigrams("a b a b a b") == 0.5


def test_overlap_is_the_largest_with_a_seed() -> None:
    assert novelty("the cat sat", ["a dog ran", "the cat sat on the mat"]) == pytest.approx(2 / 3, abs=1e-3)
    assert novelty("漢字学", ["漢字書"]) == pytest.approx(2 / 3, abs=1e-3), "of any script"
    assert rouge_l(["漢字学"], ["漢字書"]) == [0.0]
    assert novelty("x", []) == 0


@pytest.mark.parametrize(
    ("text", "refused"),
    [
        ("I'm sorry, but I can't do that.", True),
        ("As an AI, I have no opinion.", True),
        ("I cannot help with this", True),
        ("I apologize for the inconvenience", True),
        ("I cannot see the moon from here", False),
        ("Sorry is the name of a game.", False),
    ],
)
def test_refusals(text: str, refused: bool) -> None:
    assert is_refusal(text) == refused


@pytest.mark.parametrize(
    ("nll", "label"), [((3.0, 4.0, 9.0), "a"), ((3.0, 3.9, 9.0), None), ((9.0, 1.0, 2.5), "b"), ((2.0, 2.0, 2.0), None)]
)
def test_a_label_must_be_likelier_by_a_nat(nll: tuple[float, ...], label: str | None) -> None:
    assert likeliest_label(nll, ["a", "b", "c"]) == label


def test_an_answer_holds_up_to_a_fifth_more_nats() -> None:
    assert [answer_holds(child, 10.0) for child in (3.0, 12.0, 12.1)] == [True, True, False]
    assert answer_holds(0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "failed"),
    [
        (None, "unfinished"),
        (" ", "empty"),
        ("I'm sorry, I am unable to write that text.", "refusal"),
        ("Why so", "length"),
        ("Which river crosses the city? " * 9, "length"),
        ("a b a b a b a b a b a b a b", "repetition"),
        ("Name the tallest tower of Spain?", ""),
    ],
)
def test_texts_of_a_models_own(text: str | None, failed: str) -> None:
    seeds = ["What is the capital of France?", "Which river crosses the city of Cologne?", "Who wrote the hymn?"]
    assert failed_text(text, seeds) == failed_prompt(text, seeds) == failed
    assert failed_prompt("What is the capital of Spain?", seeds) == "overlap"
    assert failed_text("What is the capital of Spain?", seeds) == ""

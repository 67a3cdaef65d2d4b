"""Near-duplicates: found by prefix filtering, equal to comparing all pairs."""

from __future__ import annotations

import random
from functools import cache

import pytest

from residency.domains.doctor.similarity import NearIndex, ngram_overlap, normal_text, shingles, shingles_of, text_key


def jaccard(a: str, b: str) -> float:
    """Largest over the kinds of shingles that both have."""
    left, right = kinds(a), kinds(b)
    return max((len(left[k] & right[k]) / len(left[k] | right[k]) for k in left.keys() & right.keys()), default=0.0)


@cache
def kinds(text: str) -> dict[str, set[int]]:
    """{kind: shingles} of a text."""
    return {kind: {*hashes.tolist()} for kind, hashes in shingles(text).items()}


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("words", [8, 18, 24, 60, 110])
def test_equal_to_all_pairs(words: int, threshold: float) -> None:
    draw = random.Random(words)
    vocabulary = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(60)]
    texts = [draw.choices(vocabulary, k=words) for _ in range(30)]
    changed = []
    for text in texts:
        copy = [*text]
        for place in draw.sample(range(words), k=draw.randint(0, 3)):
            copy[place] = draw.choice(vocabulary)
        changed.append(" ".join(copy))
    stored = [" ".join(text) for text in texts]
    index = NearIndex(stored, threshold=threshold)
    met = 0
    for text in changed:
        wanted = {i for i, other in enumerate(stored) if jaccard(text, other) >= threshold}
        assert index.similar(text) == wanted
        met += len(wanted)
    assert met


@pytest.mark.parametrize("pairs", [1, 50, 4_000_000])
def test_many_texts_at_once(pairs: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of all lengths, some of them empty, repeated or with shingles that all have; however many pairs are counted."""
    monkeypatch.setattr("residency.domains.doctor.similarity._PAIRS", pairs)
    draw = random.Random(3)
    words = ["".join(draw.choices("abcdef", k=4)) for _ in range(40)]
    stored = [" ".join(draw.choices(words, k=draw.choice((0, 1, 2, 5, 18, 24, 60, 90, 110)))) for _ in range(60)]
    stored += [
        "one frame that all of these texts have in common, whatever else they may say: " + words[i] for i in range(20)
    ] + ["abc", "...", stored[7]]
    asked = [text + " more" * draw.randint(0, 2) for text in stored] + ["\u00fc\u00df \u4f60\u597d", ""]
    found = NearIndex(stored).similar_to(shingles_of(asked))
    wanted = {(i, j) for i, a in enumerate(asked) for j, b in enumerate(stored) if jaccard(a, b) >= 0.8}
    assert found == wanted
    assert len(wanted) > len(stored)
    assert NearIndex([]).similar_to(shingles_of(asked)) == NearIndex(stored).similar_to(shingles_of([])) == set()


def test_shingles_of_words_and_letters() -> None:
    """One word replaced in 60: 3-word shingles keep 0.89 of Jaccard; texts at a border have both kinds."""
    words = [f"word{i}" for i in range(60)]
    other = [*words[:30], "else", *words[31:]]
    assert jaccard(" ".join(words), " ".join(other)) == pytest.approx(55 / 61)
    assert [*shingles("a b c")] == ["characters"]
    assert [*shingles(" ".join(words[:20]))] == ["3 words", "characters"]
    assert [*shingles(" ".join(words * 2))] == ["5 words", "3 words"]
    assert shingles("abc") == {}


def test_normal_forms() -> None:
    assert normal_text("  The\tCAT, ") == normal_text("the cat")
    assert normal_text("\uff21\uff22") == "ab"
    assert text_key("+") != text_key("-")


def test_thirteen_words_in_a_row() -> None:
    words = [f"w{i}" for i in range(40)]
    queries = [" ".join(["x", *words[5:18], "y"]), " ".join(words[5:17]), "short"]
    assert ngram_overlap(queries, iter([" ".join(words)])) == [0]
    assert ngram_overlap([], iter(["x"])) == []

"""What answers are worth, and which rewards are refused."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.objectives.rewards import (
    Answer,
    ByScorer,
    Contains,
    ExactLabel,
    JsonValid,
    LengthPenalty,
    NumericEqual,
    Question,
    Regex,
    Reward,
    Sum,
)


def value(reward: Reward, text: str, reference: str = "", *, tokens: int = 3) -> float | None:
    question = Question(prompt="?", reference=reference, row="a 1", extra={"solution": "#### 42"})
    (found,) = reward([question], [Answer(text=text, tokens=tokens, ended=True)])
    assert found is None or reward.lowest <= found <= reward.highest
    return found


@pytest.mark.parametrize(
    ("reward", "text", "reference", "expected"),
    [
        (ExactLabel(), " Lateral  Movement\n", "lateral movement", 1.0),
        (ExactLabel(), "lateral movement and more", "lateral movement", 0.0),
        (Contains(), "It is LATERAL movement.", "lateral movement", 1.0),
        (Contains(), "It is lateral.", "lateral movement", 0.0),
        (NumericEqual(), "so 3 times 4 is 1,200.0", "#### 1200", 1.0),
        (NumericEqual(), "so 3 times 4 is 12", "#### 13", 0.0),
        (NumericEqual(tolerance=0.1), "about 1e3", "1050", 1.0),
        (NumericEqual(), "none", "7", 0.0),
        (NumericEqual(), "7", "none", None),
        (Regex(pattern=r"[A-Z]\d{2}(\.\d)?"), " K52.9 ", "", 1.0),
        (Regex(pattern=r"[A-Z]\d{2}(\.\d)?"), "K52.9 or so", "", 0.0),
        (Regex(), "yes", "yes|no", 1.0),
        (Regex(pattern="a+"), "a" * 10_001, "", 0.0),
        (NumericEqual(column="solution"), "it is 42", "41", 1.0),
        (Contains(column="solution"), "it is #### 42.", "", 1.0),
        (ByScorer(scorer="exact_match"), " a  b ", "a b", 1.0),
        (ByScorer(scorer="exact_match", column="solution"), "#### 42", "a b", 1.0),
        (ByScorer(scorer="numeric"), "so 3", "4", 0.0),
        (ByScorer(scorer="json_valid"), "[1]", "", 1.0),
        (JsonValid(), '{"a": [1, 2]}', "", 1.0),
        (JsonValid(), '{"a": [1, 2]', "", 0.0),
        (JsonValid(), "[" * 200_000, "", 0.0),
    ],
)
def test_an_answer_is_worth(reward: Reward, text: str, reference: str, expected: float | None) -> None:
    assert value(reward, text, reference) == expected


def test_json_that_does_not_fit_its_schema() -> None:
    if importlib.util.find_spec("jsonschema") is None:
        pytest.skip("needs jsonschema")
    schema = {"type": "object", "required": ["code"]}
    assert value(JsonValid(schema=schema, partial=0.25), '{"code": 1}') == 1.0
    assert value(JsonValid(schema=schema, partial=0.25), "{}") == 0.25
    assert value(JsonValid(schema=schema), "nothing") == 0.0
    with pytest.raises(UserError, match="schema"):
        JsonValid(schema={"type": 3})


def test_a_sum_weighs_and_logs_its_parts() -> None:
    reward = Sum(
        rewards={"right": ExactLabel(), "short": LengthPenalty(longest=100, cushion=20)}, weights={"short": 0.5}
    )
    assert (reward.lowest, reward.highest, reward.needs_reference) == (-0.5, 1.0, True)
    assert value(reward, "a", "a", tokens=90) == 0.75
    question, answer = Question(prompt="?", reference="a", row="r"), Answer(text="b", tokens=101, ended=False)
    assert reward.parts([question], [answer]) == {"right": [0.0], "short": [-1.0]}
    silent = Sum(rewards={"right": ExactLabel(), "number": NumericEqual()})
    assert value(silent, "a", "a") is None, "what one part cannot score, the sum cannot"


@pytest.mark.parametrize("pattern", ["(a+)+", "(a|b*)*", "((ab?)*c)+", "(?:x{2,})+"])
def test_patterns_that_may_never_end_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match="repeats a repetition"):
        Regex(pattern=pattern)
    with pytest.raises(UserError, match="repeats a repetition"):
        Regex().check([Question(prompt="?", reference=pattern, row="r")])


@pytest.mark.parametrize("pattern", ["a+b*c?", "(ab)+", "(a|b)+", "[a-z ]+", "(ab?)c+", "(a+)?"])
def test_patterns_that_end_are_not(pattern: str) -> None:
    Regex(pattern=pattern)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Regex(pattern="("), "pattern"),
        (lambda: LengthPenalty(longest=10, cushion=11), "cushion"),
        (lambda: Sum(rewards={}), "at least one"),
        (lambda: Sum(rewards={"a": ExactLabel()}, weights={"b": 1.0}), "weights"),
        (lambda: JsonValid(partial=2.0), "partial"),
        (lambda: NumericEqual(tolerance=-1.0), "tolerance"),
        (lambda: ExactLabel().check([Question(prompt="?", reference=" ", row="a 7")]), "a 7"),
    ],
)
def test_refusals(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        make()


def test_a_likelihood_is_no_reward() -> None:
    with pytest.raises(UserError, match="reads likelihoods"):
        ByScorer(scorer="nll")
    with pytest.raises(UserError, match="scorer corpus_bleu"):
        ByScorer(scorer="corpus_bleu")


@pytest.mark.parametrize("reward", [ExactLabel(column="label"), ByScorer(scorer="exact_match", column="label")])
def test_a_column_that_no_row_has(reward: Reward) -> None:
    question = Question(prompt="?", reference="there is one", row="a 1", extra={"solution": "4"})
    with pytest.raises(UserError, match="its columns are solution"):
        reward.check([question])

"""Scores of fixed answers: values of the reference libraries, and cases that a naive scorer gets wrong."""

from __future__ import annotations

import math
import re
import sqlite3
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, LabelScore, Scorer
from residency.scorers.edit import edit_similarity
from residency.scorers.exact import Choice, Regex, last_number, same_number
from residency.scorers.find import find_scorer, known_names, scorers_by_name
from residency.scorers.likelihood import NormalisedAccuracy
from residency.scorers.simplification import SARI, sari
from residency.scorers.sql import SqlExecution
from residency.scorers.structure import JsonSchema


def score(scorer: str | Scorer, answer: str, reference: str, prompt: str = "?") -> float:
    """Of one text."""
    row = Row(id="1", prompt=prompt, completion=reference)
    (value,) = find_scorer(scorer, where="test")([row], [Answer(text=answer)])
    return float(value)


# --- words -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "answer", "reference", "value"),
    [
        ("exact_match", "a  b", "a b", 1.0),
        ("exact_match", "4", "42", 0.0),
        ("exact_match", "Paris", "paris", 0.0),
        ("exact_match_case", "Paris", "paris", 1.0),
        ("exact_match_olora", "Good.", "good", 1.0),
        ("exact_match_olora", "17.48", "1748", 1.0),
        ("f1", "the the cat", "the cat sat", 2 / 3),
        ("rougeL", "the cat sat", "the cat sat on the mat", 2 / 3),
        ("rougeL", "a b c d", "a c b d", 0.75),
        ("rougeL", "the cats sat", "the cat sat", 2 / 3),
        ("rougeL_stemmed", "the cats sat", "the cat sat", 1.0),
        ("rougeL", "über größe", "größe über alles", 4 / 7),
        ("rougeL", "你好 世界", "你好 世界", 0.0),
        ("rougeL_unicode", "你好 世界", "你好 世界", 1.0),
        ("rougeL_unicode", "über größe", "größe über alles", 0.4),
        ("chrf", "the cat sat", "the cat sat on the mat", 0.49593),
        ("chrf++", "the cat sat", "the cat sat on the mat", 0.49836),
        ("edit_similarity", "tide", "diet", 0.5),
        ("edit_similarity", "kitten", "sitting", 8 / 13),
        ("edit_similarity", "x = 0", "x = <NUM_LIT>", 1.0),
        ("edit_similarity", "import os", "import <STR_LIT:os>", 1.0),
    ],
)
def test_a_published_value(name: str, answer: str, reference: str, value: float) -> None:
    assert score(name, answer, reference) == pytest.approx(value, abs=1e-5)


def test_rouge_equals_googles_own() -> None:
    from rouge_score.rouge_scorer import RougeScorer

    pairs = [("The cat sat.", "a cat sat down"), ("x1 y2 x1", "x1 x1"), ("nothing", "in common"), ("", "some")]
    for variant, stem in (("rougeL", False), ("rouge1", False), ("rouge2", False), ("rougeL", True)):
        name = variant + "_stemmed" * stem
        peer = RougeScorer([variant], use_stemmer=stem)
        for answer, reference in pairs:
            assert score(name, answer, reference) == pytest.approx(
                peer.score(reference, answer)[variant].fmeasure, abs=1e-6
            )


ANSWERS = [
    ("the cat sat on mat", ("the cat sat on the mat", "a cat sat on a mat")),
    ("it is guilty", ("it is guilty",)),
    ("", ("nobody knows .",)),
    ("there is no one here but the two of us .", ("there is nobody here but the two of us .", "only we are here .")),
]


@pytest.mark.parametrize("name", ["corpus_bleu", "corpus_chrf", "corpus_chrf++"])
@pytest.mark.parametrize("count", [1, 2, 4])
def test_corpus_scores_are_sacrebleus(name: str, count: int) -> None:
    """Equal to `corpus_score`, with one or several references; the mean of the rows' values is it, too."""
    from sacrebleu import metrics

    options = {
        "corpus_bleu": metrics.BLEU(),
        "corpus_chrf": metrics.CHRF(),
        "corpus_chrf++": metrics.CHRF(word_order=2),
    }
    answers, right = zip(*ANSWERS[:count], strict=True)
    streams = [[own[k] if k < len(own) else None for own in right] for k in range(max(map(len, right)))]
    wanted = options[name].corpus_score(answers, streams).score
    rows = [Row(id=str(i), prompt="?", completion=own[0], references=own[1:]) for i, own in enumerate(right)]
    scorer: Any = find_scorer(name, where="test")
    texts = [Answer(text=text) for text in answers]
    assert scorer.corpus(rows, texts) == wanted / 100
    assert sum(scorer(rows, texts)) / count == pytest.approx(wanted / 100, rel=1e-13)
    back = scorer(rows[::-1], texts[::-1])
    assert back[::-1] == pytest.approx(scorer(rows, texts), rel=1e-12)


def test_a_corpus_score_is_no_mean_of_sentences_and_varies_as_the_jackknife_says() -> None:
    rows = [Row(id=str(i), prompt="?", completion=right[0]) for i, (_, right) in enumerate(ANSWERS)]
    texts = [Answer(text=text) for text, _ in ANSWERS]
    scorer: Any = find_scorer("corpus_chrf", where="test")
    whole, n = scorer.corpus(rows, texts), len(rows)
    sentences = find_scorer("chrf", where="test")(rows, texts)
    assert abs(whole - sum(sentences) / n) > 0.05
    without = [scorer.corpus(rows[:i] + rows[i + 1 :], texts[:i] + texts[i + 1 :]) for i in range(n)]
    jackknife = (n - 1) / n * sum((one - sum(without) / n) ** 2 for one in without)
    values = scorer(rows, texts)
    mean = sum(values) / n
    assert sum((value - mean) ** 2 for value in values) / (n * (n - 1)) == pytest.approx(jackknife)


def test_chrf_and_bleu_are_sacrebleus_sentence_scores() -> None:
    import sacrebleu

    for answer, reference in [("the cat sat on mat", "the cat sat on the mat"), ("hello", "hello there"), ("a", "b")]:
        assert 100 * score("chrf", answer, reference) == sacrebleu.sentence_chrf(answer, [reference]).score
        # One sentence, effective order: as `sacrebleu.sentence_bleu` by default.
        assert 100 * score("bleu", answer, reference) == sacrebleu.sentence_bleu(answer, [reference]).score
    assert score("bleu", "我爱 北京", "我爱北京") == 0.0 < score("bleu_zh", "我爱 北京", "我爱北京")


def test_word_f1_equals_torchmetrics_squad() -> None:
    from torchmetrics.functional.text import squad

    for answer, reference in [("The cat, sat!", "a cat sat down"), ("an apple", "apple"), ("x", "y")]:
        found = squad(
            {"prediction_text": answer, "id": "1"},
            {"answers": {"answer_start": [0], "text": [reference]}, "id": "1"},
        )
        assert 100 * score("f1", answer, reference) == pytest.approx(float(found["f1"]), abs=1e-4)


@given(st.text(max_size=40), st.text(max_size=40))
def test_edit_similarity_is_the_longest_common_subsequence(a: str, b: str) -> None:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    wanted = 2 * table[-1][-1] / (len(a) + len(b)) if a and b else float(a == b)
    assert edit_similarity(a, b) == pytest.approx(wanted)
    assert edit_similarity(a, b) == edit_similarity(b, a)


SOURCE = "About 95 species are currently accepted."
PEOPLE = [
    "About 95 species are currently known.",
    "About 95 species are now accepted.",
    "95 species are now accepted.",
]


def _words(text: str) -> list[str]:
    return text.lower().replace(".", " .").split()


@pytest.mark.parametrize(("answer", "value"), [("About 95 you now get in.", 26.9536), (SOURCE, 55.2066)])
def test_sari_of_the_evaluate_card(answer: str, value: float) -> None:
    found = sari(_words(SOURCE), _words(answer), [_words(text) for text in PEOPLE])
    assert 100 * found == pytest.approx(value, abs=1e-4)


def test_sari_reads_the_source_behind_the_instruction() -> None:
    scorer = SARI(after="Text: ")
    alone = score("sari", PEOPLE[0], PEOPLE[1], prompt=SOURCE)
    assert score(scorer, PEOPLE[0], PEOPLE[1], prompt=f"Simplify. Text: {SOURCE}") == alone
    with pytest.raises(UserError, match="without 'Text: '"):
        scorer.check([Row(id="r", prompt="Simplify this", completion="x")])


# --- numbers, options, patterns --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 3 + 1 = 4", "4"),
        ("1,000", "1000"),
        ("x-1", "1"),
        ("= -1", "-1"),
        ("(-2.5)", "-2.5"),
        ("about 3/4", "0.75"),
        ("50%", "0.5"),
        ("1e3", "1000"),
        ("17.480 euros.", "17.480"),
        ("The answer is 7.", "7"),
        ("1,2,3", "3"),
        ("in 2020-01-05", "5"),
    ],
)
def test_the_last_number(text: str, value: str) -> None:
    assert last_number(text) == Decimal(value)


def test_no_number() -> None:
    assert last_number("none here.") is None
    assert last_number("1/0") is None


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("17.48", "17.480", 1.0),
        ("4", "42", 0.0),
        ("42 apples", "4", 0.0),
        ("0.33333", "0.33", 1.0),
        ("0.3", "0.33", 0.0),
        ("x. Answer: 5. Checked 6", "5", 0.0),
        ("Answer: 5", "5", 1.0),
        ("", "5", 0.0),
    ],
)
def test_numeric(answer: str, reference: str, right: float) -> None:
    assert score("numeric", answer, reference) == right


def test_numbers_that_are_none() -> None:
    assert not same_number(Decimal("NaN"), Decimal(1))
    assert not same_number(None, Decimal(1))


@pytest.mark.parametrize(
    ("answer", "right"),
    [("A because", 1.0), ("(A)", 1.0), ("Apple", 0.0), ("B\nA", 0.0), ("", 0.0), ("a", 0.0), ("Answer: A", 1.0)],
)
def test_choice(answer: str, right: float) -> None:
    assert score(Choice(letters="ABC"), answer, "A") == right


def test_regex() -> None:
    assert score(Regex(pattern=r"\d{4}-\d\d"), "in 2024-05", "x") == 1.0
    assert score(Regex(pattern=r"\d{4}-\d\d", full=True), "in 2024-05", "x") == 0.0
    taken = Regex(pattern=r"total: (\d+)", capture=True, label="total")
    assert (score(taken, "total: 12 now", "total: 12"), score(taken, "total: 13", "total: 12")) == (1.0, 0.0)
    assert taken.name == "total"
    with pytest.raises(UserError, match="unterminated"):
        Regex(pattern="(")


# --- form ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ('{"a": [1, null]}', 1.0),
        ('{"a": NaN}', 0.0),
        ('{"a": 1, "a": 2}', 0.0),
        ("Here: {}", 0.0),
        ("", 0.0),
        ("[" * 100_000, 0.0),
        ("```json\n{}\n```", 0.0),
    ],
)
def test_json_valid(answer: str, right: float) -> None:
    assert score("json_valid", answer, "{}") == right


def test_json_schema(tmp_path: Path) -> None:
    schema: dict[str, Any] = {
        "type": "object",
        "properties": {"day": {"type": "string", "format": "date"}, "n": {"type": "integer"}},
        "required": ["day"],
    }
    scorer = JsonSchema(schema=schema)
    answers = ['{"day": "2024-02-29"}', '{"day": "not a date"}', '{"day": "2024-01-01", "n": true}', "{}", "no"]
    assert [score(scorer, answer, "{}") for answer in answers] == [1.0, 0.0, 0.0, 0.0, 0.0]
    assert score(scorer, '{"day": "2024-01-01", "n": 1.0}', "{}") == 1.0, "1.0 is an integer"
    file = tmp_path / "schema.json"
    file.write_text('{"type": "array"}')
    before = JsonSchema(schema=str(file)).options()
    file.write_text('{"type": "object"}')
    assert JsonSchema(schema=str(file)).options() != before, "an edited file is another scorer"
    with pytest.raises(UserError, match="no JSON Schema"):
        JsonSchema(schema={"type": "nothing"})
    with pytest.raises(UserError, match=r"missing\.json"):
        JsonSchema(schema=str(tmp_path / "missing.json"))


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("SELECT a FROM t WHERE b = 1", 1.0),
        ("WITH x AS (SELECT 1 AS a) SELECT a FROM x", 1.0),
        ("SELECT 1 UNION SELECT 2", 1.0),
        ("```sql\nSELECT 1\n```", 1.0),
        ("hello world", 0.0),
        ("Paris", 0.0),
        ("SELECT", 0.0),
        ("", 0.0),
        ("SELECT a FROM", 0.0),
    ],
)
def test_sql_valid(answer: str, right: float) -> None:
    assert score("sql_valid", answer, "SELECT 1") == right


SCHEMA = "CREATE TABLE t (a INTEGER, b REAL); INSERT INTO t VALUES (1, 0.5), (2, NULL), (2, 0.25);"


@pytest.mark.parametrize(
    ("answer", "reference", "right"),
    [
        ("select b, a from t", "SELECT b, a FROM t", 1.0),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t", 1.0),
        ("SELECT a FROM t ORDER BY a DESC", "SELECT a FROM t ORDER BY a", 0.0),
        ("SELECT DISTINCT a FROM t", "SELECT a FROM t", 0.0),
        ("SELECT a * 1.0 FROM t", "SELECT a FROM t", 1.0),
        ("SELECT 0.1 + 0.2", "SELECT 0.3", 1.0),
        ("SELECT NULL", "SELECT b FROM t WHERE b IS NULL", 1.0),
        ("SELECT c FROM t", "SELECT a FROM t", 0.0),
        ("DELETE FROM t", "SELECT a FROM t", 0.0),
        ("DROP TABLE t", "SELECT a FROM t", 0.0),
        ("ATTACH 'x.db' AS x", "SELECT a FROM t", 0.0),
        ("PRAGMA table_info(t)", "SELECT a FROM t", 0.0),
        ("SELECT load_extension('x')", "SELECT a FROM t", 0.0),
        ("SELECT 1; SELECT a FROM t", "SELECT a FROM t", 0.0),
        ("", "SELECT a FROM t", 0.0),
    ],
)
def test_sql_execution(answer: str, reference: str, right: float) -> None:
    assert score(SqlExecution(schema=SCHEMA), answer, reference) == right


def test_sql_that_never_ends_is_stopped_and_the_database_stays() -> None:
    scorer = SqlExecution(schema=SCHEMA, steps=5)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
    rows = [Row(id=str(i), prompt="?", completion="SELECT count(*) FROM t") for i in range(3)]
    texts = [endless, "DELETE FROM t", "SELECT 3"]
    assert list(scorer(rows, [Answer(text=text) for text in texts])) == [0.0, 0.0, 1.0]
    with pytest.raises(UserError, match="does not run"):
        scorer.check([Row(id="r", prompt="?", completion="SELECT nothing FROM nowhere")])
    with pytest.raises(UserError, match="schema"):
        SqlExecution(schema="CREATE NOTHING")
    assert scorer.options()["sqlite"] == sqlite3.sqlite_version


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("x = 1", 1.0),
        ("```python\ndef f():\n    return 1\n```", 1.0),
        ("return 1", 0.0),
        ("0777", 0.0),
        ("x = (", 0.0),
        ("a\0b", 0.0),
        ("", 0.0),
        ("'\\d'", 1.0),
        ("(" * 5000 + ")" * 5000, 0.0),
        ("x = 1\n" * 20_000, 0.0),
    ],
)
def test_python_compiles(answer: str, right: float) -> None:
    assert score("python_compiles", answer, "x = 1") == right


# --- likelihoods -----------------------------------------------------------------------------------------------------


def test_length_turns_the_order_of_labels_round() -> None:
    """Labels of 1 and 3 tokens at -2 and -3 nats: summed the first wins, per token the second."""
    labels = {"yes": LabelScore(nll=2.0, tokens=1, bytes=3), "not at all": LabelScore(nll=3.0, tokens=3, bytes=10)}
    rows = [Row(id="1", prompt="?", completion="yes"), Row(id="2", prompt="?", completion="not at all")]
    answers = [Answer(best=True, labels=labels), Answer(best=False, labels=labels)]
    assert find_scorer("accuracy", where="")(rows, answers) == [1.0, 0.0]
    assert find_scorer("accuracy_norm", where="")(rows, answers) == [0.0, 1.0]
    tie = {"yes": LabelScore(nll=1.0, tokens=1, bytes=1), "no": LabelScore(nll=2.0, tokens=2, bytes=2)}
    assert NormalisedAccuracy(by="bytes")(rows[:1], [Answer(labels=tie)]) == [0.0], "a tie is wrong"


def test_bits_per_byte() -> None:
    row, answer = Row(id="1", prompt="?", completion="x"), Answer(text_nll=9 * math.log(2), text_bytes=9)
    scorer = find_scorer("bits_per_byte", where="")
    assert scorer([row], [answer]) == [pytest.approx(1.0)]
    assert scorer.weights([row], [answer]) == [9]


# --- what holds for every scorer -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(known_names()))
def test_a_name_leads_to_the_scorer_that_has_it(name: str) -> None:
    assert find_scorer(name, where="").name == name


TEXTS = {
    "numeric": "so it is 12",
    "choice": "B",
    "json_valid": '{"a": 1}',
    "sql_valid": "SELECT a FROM t",
    "python_compiles": "x = 1",
}


@pytest.mark.parametrize("name", sorted(n for n, (k, _) in known_names().items() if k.needs == "generation"))
def test_the_reference_is_best_and_nothing_is_worst(name: str) -> None:
    text = TEXTS.get(name, "the quick brown fox jumps")
    scorer = find_scorer(name, where="")
    scorer.check([Row(id="1", prompt="a source text", completion=text)])
    best, worst = (score(scorer, answer, text, prompt="a source text") for answer in (text, ""))
    assert scorer.higher_is_better
    assert best == pytest.approx(1.0)
    assert worst < best
    assert worst == 0.0 or name == "sari", "deleting everything deletes rightly too"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["exact_mach"], "exact_match"),
        (["nll", "nll"], "two scorers named 'nll'"),
        (["nowhere.Scorer"], "cannot be imported"),
        (["json.JSONDecoder"], "no Scorer"),
        (["residency.scorers.Regex"], "needs options"),
        (["JsonSchema"], "needs options"),
    ],
)
def test_refusals(given: list[str], message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        scorers_by_name(given, where="data.domains.x.scorers")


def test_classes_by_path_and_name() -> None:
    import residency.scorers

    found = scorers_by_name(["residency.scorers.NLL", "ChrF"], where="")
    assert [*found] == ["nll", "chrf"]
    with pytest.raises(AttributeError, match="has no Nothing"):
        _ = residency.scorers.Nothing


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("rougeL", ["你好", "世界"]),
        ("bleu", ["你好", "世界"]),
        ("f1", ["你好世界", "一二三"]),
        ("numeric", ["twelve"]),
        ("sql_valid", ["Paris"]),
    ],
)
def test_what_a_scorer_cannot_judge_is_refused(name: str, rows: list[str]) -> None:
    """It would be 0 whatever is written."""
    with pytest.raises(UserError):
        find_scorer(name, where="").check([Row(id=text, prompt="?", completion=text) for text in rows])

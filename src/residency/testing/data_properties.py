"""What every scorer, every metric of a score matrix and every domain keeps."""

from __future__ import annotations

import json
import math
from dataclasses import is_dataclass

import numpy as np
import pytest

from residency.core.types import Row, RowKind, Split
from residency.domains import Domain
from residency.metrics.definitions.base import About
from residency.metrics.discovery import matrix_metrics
from residency.scorers.base import Scorer
from residency.testing.cases import Case, made
from residency.testing.rows import DomainRow, MetricRow, ScorerRow
from residency.testing.tiny_models import write_tokenizer

__all__ = ["DOMAIN_PROPERTIES", "METRIC_PROPERTIES", "SCORER_PROPERTIES"]

# A full matrix of four domains on which no two definitions of forgetting agree.
_SCORES = np.array(
    [[20, 30, 76, 40], [80, 35, 30, 42], [70, 75, 74, 41], [85, 60, 70, 45], [75, 78, 55, 90]], dtype=np.float64
)
_SPLITS: tuple[Split, ...] = ("train", "validation", "test")


# -- scorers --------------------------------------------------------------------------------------------------------


def tells_good_from_bad(case: Case[ScorerRow]) -> None:
    """Row by row, in any company and order, in the direction that it declares."""
    line, scorer = case.row, made(case.row.make, Scorer, case.name)
    kind: RowKind = "pair" if line.rejected else "completion"
    row = Row(id="1", prompt=line.prompt, completion=line.completion, rejected=line.rejected, kind=kind)
    scorer.check([row])
    if scorer.whole_column:
        (good,), (bad,) = (scorer([row], [answer]) for answer in (line.good, line.bad))
        both, turned = (scorer([row, row], pair) for pair in ([line.good, line.bad], [line.bad, line.good]))
        assert list(both) == list(turned)[::-1], "a column's score depends on the order of its rows"
        assert min(good, bad) < sum(both) / 2 < max(good, bad), "a column is not between its parts"
    else:
        good, bad = scorer([row, row], [line.good, line.bad])
    assert good == pytest.approx(line.best), "the good answer has not the best score that the row names"
    assert good != bad, "both answers have one score"
    assert (good > bad) is scorer.higher_is_better, "`higher_is_better` says the opposite of the scores"
    if not scorer.whole_column:
        alone = [bad, good, bad]
        assert list(scorer([row, row, row], [line.bad, line.good, line.bad])) == alone, "a score depends on other rows"
    assert list(scorer([row], [line.good])) == [good], "a score depends on other rows"
    assert list(scorer([], [])) == [], "no rows are no scores"


def says_what_it_is(case: Case[ScorerRow]) -> None:
    """Under the name of its row, with a unit; equal to another of the same options, which JSON can hold."""
    scorer = case.row.make()
    assert scorer.name == case.name, f"the score is named {scorer.name!r}, its row {case.name!r}"
    assert scorer.info().unit, "the unit is empty"
    assert is_dataclass(scorer), "a scorer is a frozen dataclass: its fields are part of what a score means"
    assert scorer == case.row.make(), "two of the same options are not equal"
    json.dumps([scorer.options(), scorer.versions()])
    assert "missing" not in scorer.versions().values(), f"a library is not installed: {scorer.versions()}"


SCORER_PROPERTIES = (tells_good_from_bad, says_what_it_is)


# -- metrics of a score matrix --------------------------------------------------------------------------------------


def is_found_by_its_name(case: Case[MetricRow]) -> None:
    """Summary, report, search and gate have it: it lies where they look, and says how it is read."""
    assert case.name in matrix_metrics(), (
        f"{case.name} is in no summary: put it into a file of its name in residency.metrics.definitions, "
        "or into a package that RESIDENCY_METRICS names"
    )
    found = matrix_metrics()[case.name]
    assert (found.function, found.about) == (case.row.function, case.row.about), f"another {case.name} is found"
    assert isinstance(found.about, About)
    assert found.about.title, "ABOUT has no title"
    assert found.about.help, "ABOUT has no help"


def a_missing_score_is_never_read(case: Case[MetricRow]) -> None:
    """Without one cell of the matrix it is NaN (it needs that cell) or what it was (it does not)."""
    whole = _value(case, _SCORES)
    assert math.isfinite(whole), "it has no value on a full matrix"
    read = 0
    for cell in np.ndindex(*_SCORES.shape):
        for gap in (math.nan, math.inf):
            holed = _SCORES.copy()
            holed[cell] = gap
            value = _value(case, holed)
            assert math.isnan(value) or value == whole, f"{gap} at row {cell[0]}, column {cell[1]} counts as a score"
            read += math.isnan(value)
    assert read, "it reads no cell"


def a_loss_is_a_score_turned(case: Case[MetricRow]) -> None:
    """Computed on the utility: scores with their sign turned, lower better, give the same value."""
    if case.row.ratio:
        return
    turned = {name: -np.asarray(scores, dtype=np.float64) for name, scores in case.row.references.items()}
    value = float(case.row.function(-_SCORES, higher_is_better=False, **turned))
    assert value == pytest.approx(_value(case, _SCORES), abs=1e-12), "`higher_is_better` is not used on all scores"


def a_table_of_another_shape_is_refused(case: Case[MetricRow]) -> None:
    """One row per domain and one before training, or an error that says so."""
    with pytest.raises(ValueError, match="shape"):
        _value(case, _SCORES[1:])


METRIC_PROPERTIES = (
    is_found_by_its_name,
    a_missing_score_is_never_read,
    a_loss_is_a_score_turned,
    a_table_of_another_shape_is_refused,
)


def _value(case: Case[MetricRow], scores: np.ndarray) -> float:
    return float(case.row.function(scores, higher_is_better=True, **case.row.references))


# -- domains --------------------------------------------------------------------------------------------------------


def says_where_its_rows_come_from(case: Case[DomainRow]) -> None:
    """Source, licence and attribution go into the record of every run."""
    domain = _domain(case)
    assert domain.kind in ("label", "generative")
    for name in ("source", "licence", "attribution"):
        assert str(getattr(domain, name)).strip(), f"{name} is empty"


def rows_are_whole_and_the_same_twice(case: Case[DomainRow]) -> None:
    """Training and test rows, none of them in both; the same rows in every process that reads them."""
    domain, again = _domain(case), _domain(case)
    for split in _SPLITS:
        assert domain.rows(split) == again.rows(split), f"two readers give different {split} rows"
        for row in domain.rows(split):
            asked = row.kind == "prompt"  # its answers are written in training
            assert asked or row.completion, f"{split} row {row.id!r} has no answer to learn"
    assert domain.fingerprint() == again.fingerprint(), "two readers have different fingerprints"
    labels = domain.labels()
    assert domain.kind != "label" or len(labels) > 1, f"labels that can be told apart: {labels}"


def rows_become_tokens_and_scores(case: Case[DomainRow]) -> None:
    """The template encodes rows of every split with something to learn; the scorers accept the test rows."""
    domain, tokenizer = _domain(case), write_tokenizer(case.folder / "tokenizer")
    for split in _SPLITS:
        for row in domain.rows(split)[:8]:
            example = domain.template.encode(tokenizer, domain=case.name, row=row, labels=domain.labels(), split=split)
            learnt = any(branch.tokens for branch in example.branches)
            assert learnt or row.kind == "prompt", f"{split} row {row.id!r} has nothing to learn"
    for scorer in domain.scorers.values():
        scorer.check(list(domain.rows("test")))


DOMAIN_PROPERTIES = (
    says_where_its_rows_come_from,
    rows_are_whole_and_the_same_twice,
    rows_become_tokens_and_scores,
)


def _domain(case: Case[DomainRow]) -> Domain:
    if why := case.row.missing():
        pytest.skip(why)
    case.folder.mkdir(parents=True, exist_ok=True)
    domain: Domain = made(case.row.make, Domain, case.name, case.folder)
    return domain

"""What every augmentation keeps."""

from __future__ import annotations

import json
from collections.abc import Sequence

from residency.core.types import Row
from residency.domains.augmentation.base import PROVENANCE, Asked, Attempt, Augmentation, Material
from residency.domains.augmentation.children import Written, make_children, plan
from residency.domains.template import Template
from residency.testing.cases import Case, made
from residency.testing.rows import AugmentationRow
from residency.testing.scripted_model import ScriptedModel
from residency.testing.tiny_models import write_tokenizer

__all__ = ["PROPERTIES"]

_PLACES = ("kitchen", "garden", "cellar", "harbour")
_ROWS = tuple(
    Row(id=str(i), prompt=f"the physician left a car beside the {place} of house {i}", completion=f"on day {i}")
    for i, place in enumerate(_PLACES)
)


def an_attempt_depends_on_its_own_row_alone(case: Case[AugmentationRow]) -> None:
    """One for every child that is asked for; the same in every order, and when it is asked for again."""
    method, material = _method(case), _material(case)
    asked = plan(material.rows, len(material.rows) * method.per_row)
    found = list(method.attempts(asked, material))
    assert len(found) == len(asked)
    assert [*method.attempts(asked[::-1], material)][::-1] == found, "the order of what is asked for changes attempts"
    assert [*_method(case).attempts(asked, material)] == found, "another object of the same options attempts otherwise"


def children_are_new_rows_with_their_origin(case: Case[AugmentationRow]) -> None:
    """Id, group and provenance are the parent's; no prompt is there twice."""
    method, material = _method(case), _material(case)

    def write(method: Augmentation, asked: Sequence[Asked], material: Material) -> Written:
        found = tuple(method.attempts(asked, material))
        # Whether models of a test write what passes is not the point here.
        return Written(attempts=found if case.row.accepted else tuple(_accepted(k) for k in range(len(found))))

    children, (counts,) = make_children([method], material, [], max_share=0.5, write=write)
    assert children
    assert counts.kept == len(children) == counts.asked - sum(counts.dropped.values())
    for child in children:
        origin = child.extra[PROVENANCE]
        assert child.id.startswith(f"{origin['parent']}~{method.name}")
        assert child.group == origin["parent"], "a child would leave the split of its parent"
        assert origin["method"] == method.name
        assert child.completion, "nothing to learn"
    prompts = [row.prompt for row in (*material.rows, *children)]
    assert len({*prompts}) == len(prompts)


def what_decides_it_can_be_written_down(case: Case[AugmentationRow]) -> None:
    """Options and digests are JSON values, and the same in every process."""
    first, second = (json.dumps(_method(case).identity(), sort_keys=True) for _ in range(2))
    assert first == second


PROPERTIES = (
    an_attempt_depends_on_its_own_row_alone,
    children_are_new_rows_with_their_origin,
    what_decides_it_can_be_written_down,
)


def _accepted(number: int) -> Attempt:
    return Attempt(prompt=f"a text of its own, the {number}th")


def _method(case: Case[AugmentationRow]) -> Augmentation:
    case.folder.mkdir(parents=True, exist_ok=True)
    method: Augmentation = made(case.row.make, Augmentation, case.name, case.folder)
    return method


def _material(case: Case[AugmentationRow]) -> Material:
    tokenizer = write_tokenizer(case.folder / "tokenizer")
    answer = case.row.answer
    base = None if answer is None else ScriptedModel(tokenizer, answer=lambda request, seed: answer(request))
    return Material(rows=_ROWS, template=Template(max_tokens=256, tokenise="apart"), base=base)

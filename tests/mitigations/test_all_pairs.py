"""All pairs of mitigations, three stages: each keeps both promises, or is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.mitigations.composition import refusal
from support.mitigation_pairs import FILE, PAIRS, ThreeStages, rendered
from table import ADAPTERS, MITIGATIONS

# The pairs whose guarantees meet in one place; the bulk runs with `make test-pairs`.
MEETING = {
    frozenset(pair)
    for pair in (
        ("gpm", "source_shielding"),
        ("gpm", "migu"),
        ("migu", "source_shielding"),
        ("gpm", "l2_sp"),
        ("gpm", "weight_mixing"),
        ("ewc", "weight_mixing"),
        ("replay", "generative_replay"),
        ("si", "slerp"),
        ("ogd", "ewc"),
        ("fisher_merge", "soup"),
    )
}
CASES = [
    pytest.param(adapter, *pair, marks=() if {*pair} in MEETING else pytest.mark.pairs)
    for adapter in ("lora", "full")
    for pair in PAIRS
]


@pytest.fixture(scope="module")
def stages(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> ThreeStages:
    return ThreeStages(llama, tmp_path_factory.mktemp("three"))


@pytest.mark.parametrize(("adapter", "first", "second"), CASES)
def test_both_promises_hold(adapter: str, first: str, second: str, stages: ThreeStages) -> None:
    one, other = MITIGATIONS[first].make(), MITIGATIONS[second].make()
    provides = ADAPTERS[adapter].make().provides
    if refusal(one, other) is not None or not (one.requires | other.requires) <= provides:
        for parts in ({first: one, second: other}, {second: other, first: one}):
            with pytest.raises(UserError, match=r"model\.mitigations"):
                stages.broken(adapter, parts)
        return
    broken = stages.broken(adapter, {first: one, second: other})
    again = {second: MITIGATIONS[second].make(), first: MITIGATIONS[first].make()}
    broken += [f"in the other order: {found}" for found in stages.broken(adapter, again)]
    assert not broken


def test_the_table_is_what_the_classes_declare() -> None:
    assert FILE.read_text(encoding="utf-8") == rendered()

"""Examples in the prompt: which rows, in which form, and what happens where they do not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from residency.core.errors import UserError
from residency.core.types import Row
from residency.domains import Chat, Template
from residency.domains.jsonl import Jsonl
from residency.domains.shots import pick_shots
from residency.domains.stream_data import StreamData
from residency.testing.tiny_models import write_domain, write_tokenizer
from support.tiny_sweeps import run_sweep, write_study


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return write_tokenizer(tmp_path_factory.mktemp("shots"))


def row(i: int, completion: str) -> Row:
    return Row(id=str(i), prompt=f"p{i}", completion=completion)


def test_every_answer_is_shown_before_one_is_shown_twice() -> None:
    rows = [row(i, answer) for i, answer in enumerate("aaabac")]
    assert [one.id for one in pick_shots(rows, 3)] == ["0", "3", "5"]
    assert [one.id for one in pick_shots(rows, 5)] == ["0", "3", "5", "1", "2"]
    assert len(pick_shots(rows, 99)) == 6


def data(folder: Path, shots: int, **template: Any) -> StreamData:
    options = write_domain(folder, "b", kind="label")["init_args"]
    limits = {"prompt": "{prompt}>", "completion": "{completion}", "max_prompt_tokens": 200, "max_tokens": 220}
    options["template"] = Template(**{**limits, **template})
    return StreamData(domains={"b": Jsonl(**options)}, shots=shots)


def test_training_rows_stand_before_every_scored_row(tokenizer: Any, tmp_path: Path) -> None:
    stream, plain = data(tmp_path, 3), data(tmp_path, 0)
    domain = stream.domains["b"]
    shown = pick_shots(domain.rows("train"), 3)
    told = "".join(f"{one.prompt}>{one.completion}\n\n" for one in shown)
    tests = {one.prompt for one in domain.rows("test")}
    assert not tests & {one.prompt for one in shown}
    found = stream.evaluation_examples("b", "test", tokenizer)
    for example, bare in zip(found, plain.evaluation_examples("b", "test", tokenizer), strict=True):
        assert tokenizer.decode(example.prompt) == told + tokenizer.decode(bare.prompt)
        assert example.branches == bare.branches
    assert stream.fingerprints() == plain.fingerprints()


def test_as_many_are_shown_as_fit(tokenizer: Any, tmp_path: Path) -> None:
    for example in data(tmp_path, 8, max_prompt_tokens=40, max_tokens=60).evaluation_examples("b", "test", tokenizer):
        text = tokenizer.decode(example.prompt)
        assert not example.cut_prompt
        assert 1 <= text.count("\n\n") < 8
        assert len(example.prompt) <= 40


def test_chats_and_negative_numbers_are_refused(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.shots=-1"):
        data(tmp_path, -1)
    stream = data(tmp_path, 2)
    stream.domains["b"].template = Chat()
    with pytest.raises(UserError, match=r"data\.shots=2 and a row of Chat"):
        stream.evaluation_examples("b", "test", tokenizer)


def test_a_study_has_a_prompted_reference(llama: Path, tmp_path: Path) -> None:
    """Nothing is trained for it, and its scores are not those of the base model without examples."""
    study = write_study(
        tmp_path, llama, axes={"x": {"plain": {}}}, references=["frozen", "prompted"], seeds=[0], scorer="nll"
    )
    code, out = run_sweep(study, tmp_path / "study", dry_run=True)
    assert code == 0, out
    assert "prompted-s0" in out
    assert "stages: 3 different ones" in out

"""`residency chat`: answers are those of `predict`, stages switch both ways, turns are read again."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import residency
from residency.core.text import for_terminal
from residency.domains import Chat
from residency.runs.chat import Conversation, converse
from residency.runs.open_run import open_run
from support.cli import call, tiny_config, write_yaml

PROMPT = "3 fluffy kittens"


@pytest.fixture(scope="module")
def run(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    config = tiny_config(folder / "data", llama)
    config["model"]["optimizer"]["init_args"]["lr"] = 0.5  # so far that stages write different things
    result = call("fit", "--config", write_yaml(folder / "c.yaml", config), "--run_dir", folder / "run")
    assert result.code == 0, result.err
    (folder / "prompts.txt").write_text(PROMPT)
    return folder / "run"


@pytest.fixture(scope="module")
def written(run: Path) -> list[str]:
    """What `predict` lets every stage write."""
    prompts = run.parent / "prompts.txt"
    return [residency.predict(run, stage=k, domain="a", prompts=prompts)[0]["written"] for k in range(3)]


def test_a_stage_answers_as_predict_does_and_every_switch_is_exact(run: Path, written: list[str]) -> None:
    assert len({*written}) == 3
    talk = Conversation(open_run(run), stage=2, domain="a", max_new_tokens=32)
    for stage in (2, 0, 1, 2, 1, 0):
        talk.switch(stage)
        assert talk.answer(PROMPT) == written[stage]
    assert talk.saved == {0: "before training", 1: "a", 2: "b"}


def test_through_a_pipe(run: Path, written: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [
        PROMPT,
        "/stage 1",
        "/stage 7",
        "/stage x",
        "/domain b",
        "/domain nowhere",
        "/stages",
        "/help",
        "/quit",
        "?",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    told = call("chat", run, "--domain", "a", "--max_new_tokens", 32)
    assert told.code == 0, told.err
    shown = told.out
    assert shown.startswith(for_terminal(f"{written[2]}\nstage 1, a\n{written[1]}\n"))
    for part in ("saved stages: [1, 2]", "a stage is a number", "the template of b", "there are a, b", "2  b", "/new"):
        assert part in shown
    assert call("chat", run.parent).code == 2


def test_turns_are_read_again_with_a_chat_template(run: Path) -> None:
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    cli = open_run(run)
    cli.datamodule.domains["a"].template = Chat(jinja=template + "{% if add_generation_prompt %}assistant: {% endif %}")
    seen: list[str] = []
    original = cli.model.backbone.generate

    def generate(model: object, prompts: list[list[int]], **options: object) -> list[list[int]]:
        seen.extend(cli.model.backbone.tokenizer.decode(ids) for ids in prompts)
        return original(model, prompts, **options)  # type: ignore[arg-type]

    cli.model.backbone.generate = generate  # type: ignore[method-assign, assignment]
    talk = Conversation(cli, stage=1, domain="a", max_new_tokens=4)
    first, *_ = converse(talk, ["hello", "again", "/new", "alone"])
    assert f"user: hello\nassistant: {first}\nuser: again\nassistant: " in seen[1]
    assert "hello" not in seen[2]

"""Preferences, wanted answers and prompts from JSON Lines files: fit, scores, record, report, and what does not fit."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from residency.study.api import load_run
from support.cli import call, read_json, tiny_config, write_yaml

Line = Mapping[str, Any]


def _pair(prompt: str) -> Line:
    return {"prompt": prompt, "chosen": prompt[::-1], "rejected": prompt[:2] + "zz"}


def _unpaired(prompt: str) -> Line:
    good = sum(map(ord, prompt)) % 2 == 0
    return {"prompt": prompt, "completion": prompt[::-1] if good else "zz", "label": good}


def _prompt(prompt: str) -> Line:
    return {"prompt": prompt, "solution": prompt[:1]}


def _completion(prompt: str) -> Line:
    return {"prompt": prompt, "completion": prompt[::-1]}


def _conversation(prompt: str) -> Line:
    turns = [("user", prompt), ("assistant", "no"), ("user", "again"), ("assistant", prompt[:1])]
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


ROWS: dict[str, Callable[[str], Line]] = {
    "pair": _pair,
    "unpaired": _unpaired,
    "prompt": _prompt,
    "completion": _completion,
    "conversation": _conversation,
}
REWARD = {
    "class_path": "residency.objectives.rewards.Contains",
    "init_args": {"column": "solution"},
}
JSON_VALID = {"class_path": "residency.scorers.JsonValid"}


def table(folder: Path, name: str, kind: str, *, rows: int = 40, **options: Any) -> dict[str, Any]:
    """One file of rows; validation and test are carved from it."""
    draw = random.Random(name)
    prompts = sorted({"".join(draw.choices("abcdefgh", k=draw.randint(3, 6))) for _ in range(2 * rows)})[:rows]
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(ROWS[kind](prompt)) + "\n" for prompt in prompts), encoding="utf-8")
    template = {"prompt": "{prompt}>", "completion": "{completion}"}
    return {"class_path": "residency.domains.Table", "init_args": {"train": str(path), "template": template, **options}}


def objective(name: str, **arguments: Any) -> dict[str, Any]:
    path = f"residency.objectives.{name}"
    return {"class_path": path, "init_args": arguments}


SHORT: dict[str, Any] = {"group": 4, "max_new_tokens": 4, "truncated": "as_is", "informative": 0.0}
GRPO = objective("GRPO", reward=REWARD, **SHORT)
LEARNT: dict[str, tuple[dict[str, Any], str]] = {
    "dpo": (objective("Preference"), "pair"),
    "orpo": (objective("Preference", loss="orpo"), "pair"),
    "simpo": (objective("Preference", loss="simpo", beta=2.0), "pair"),
    "kto": (objective("KTO", wanted=1.1), "unpaired"),
    "grpo": (GRPO, "prompt"),
}
PREFERENCES = {
    f"{name}/{side}"
    for name, sides in {
        "rewards": ["chosen", "rejected", "margins", "accuracies"],
        "logps": ["chosen", "rejected"],
    }.items()
    for side in sides
} | {"length/chosen", "length/rejected", "nll"}
LOGGED = {
    "dpo": PREFERENCES,
    "orpo": PREFERENCES,
    "simpo": PREFERENCES,
    "kto": {"kl", "rewards/chosen", "rewards/rejected"},
    "grpo": {"reward", "reward/std", "groups/informative", "rollouts/length", "rollouts/truncated", "policy/entropy"},
}


def config(folder: Path, backbone: Path, what: dict[str, Any], kind: str, **options: Any) -> dict[str, Any]:
    """A stream of two domains of one kind."""
    found = tiny_config(folder, backbone)
    found["model"]["objective"] = what
    scorers = {"scorers": [JSON_VALID]} if kind == "prompt" else {}
    found["data"]["domains"] = {n: table(folder, n, kind, **scorers, **options) for n in ("first", "second")}
    found["data"]["batch_size"] = 4
    return found


@pytest.mark.filterwarnings("ignore:KTO on")
@pytest.mark.parametrize("name", LEARNT)
def test_rows_of_a_file_are_learnt_and_scored(name: str, tmp_path: Path, llama: Path) -> None:
    what, kind = LEARNT[name]
    path = write_yaml(tmp_path / "run.yaml", config(tmp_path / "data", llama, what, kind))
    result = call("fit", "--config", path, "--run_dir", tmp_path / "run")
    assert result.code == 0, result.err
    record = read_json(tmp_path / "run" / "results.json")
    scores = {"pair": {"nll", "preference_accuracy"}, "unpaired": {"nll"}, "prompt": {"json_valid"}}[kind]
    assert {*record["scores"]} == scores
    for score in record["scores"].values():
        assert all(value is not None for row in score["R"] for value in row), "three rows, two columns"
        assert [len(row) for row in score["R"]] == [2, 2, 2]
    history = load_run(tmp_path / "run").history
    assert {*history.columns} >= LOGGED[name]
    assert history.select(LOGGED[name]).null_count().sum_horizontal().item() == 0 or name == "kto"
    report = call("report", tmp_path / "run")
    assert report.code == 0, report.err


def refusal(folder: Path, backbone: Path, what: dict[str, Any], kind: str, **options: Any) -> str:
    """What stands on the screen of a fit that does not begin."""
    path = write_yaml(folder / "run.yaml", config(folder / "data", backbone, what, kind, **options))
    result = call("fit", "--config", path, "--run_dir", folder / "run")
    assert result.code == 2
    assert not [*(folder / "run").glob("stages/0-base/*")], "before anything is scored"
    return " ".join(result.err.split())


SFT = objective("SFT")
EXACT = objective("RLOO", reward={"class_path": "residency.objectives.rewards.ExactLabel"})


@pytest.mark.parametrize(
    ("what", "kind", "said", "instead"),
    [
        (SFT, "pair", '"chosen"', "objective/dpo.yaml"),
        (SFT, "unpaired", '"label": true', "objective/kto.yaml"),
        (objective("Preference"), "completion", '"rejected"', "objective/sft.yaml"),
        (objective("KTO"), "pair", '"chosen"', "objective/dpo.yaml"),
        (EXACT, "unpaired", '"label": true', "objective/kto.yaml"),
        (objective("DFT"), "prompt", '{"prompt": "..."}', "objective/grpo.yaml"),
    ],
)
def test_rows_that_an_objective_cannot_read(
    what: dict[str, Any], kind: str, said: str, instead: str, tmp_path: Path, llama: Path
) -> None:
    scorers = {"scorers": []}
    text = refusal(tmp_path, llama, what, kind, **({} if kind == "prompt" else scorers))
    assert f"model.objective {what['class_path'].rpartition('.')[2]} and data.domains.first" in text
    assert said in text
    assert instead in text


def test_prompts_alone_have_no_likelihood(tmp_path: Path, llama: Path) -> None:
    found = config(tmp_path / "data", llama, GRPO, "prompt")
    found["data"]["domains"]["first"]["init_args"]["scorers"] = ["json_valid", "nll"]
    result = call("fit", "--config", write_yaml(tmp_path / "run.yaml", found), "--run_dir", tmp_path / "run")
    assert result.code == 2
    assert "'nll'" in result.err
    assert "without a completion" in " ".join(result.err.split())


def test_a_column_that_is_not_there(tmp_path: Path, llama: Path) -> None:
    wrong = {**REWARD, "init_args": {"column": "answer"}}
    found = config(tmp_path / "data", llama, objective("GRPO", reward=wrong, informative=0.0), "prompt")
    result = call("fit", "--config", write_yaml(tmp_path / "run.yaml", found), "--run_dir", tmp_path / "run")
    assert result.code == 2
    text = " ".join(result.err.split())
    assert "without a column 'answer'; its columns are solution" in text


def test_prompts_are_replayed_with_what_their_reward_needs(tmp_path: Path, llama: Path) -> None:
    found = config(tmp_path / "data", llama, GRPO, "prompt")
    replay = {"class_path": "residency.mitigations.Replay", "init_args": {"ratio": 0.5}}
    ewc = {"class_path": "residency.mitigations.EWC", "init_args": {"strength": 1.0}}
    found["model"]["mitigations"] = {"replay": replay, "ewc": ewc}
    result = call("fit", "--config", write_yaml(tmp_path / "run.yaml", found), "--run_dir", tmp_path / "run")
    assert result.code == 0, result.err
    history = load_run(tmp_path / "run").history
    assert history["reward"].is_not_null().all()


def test_of_a_conversation_the_last_answer_is_written(tmp_path: Path, llama: Path) -> None:
    chat = {"jinja": "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"}
    learnt = objective("RLOO", reward={"class_path": "residency.objectives.rewards.Contains"}, **SHORT)
    found = config(tmp_path / "data", llama, learnt, "conversation", template=chat, scorers=["nll"])
    found["data"]["order"] = ["first"]
    result = call("fit", "--config", write_yaml(tmp_path / "run.yaml", found), "--run_dir", tmp_path / "run")
    assert result.code == 0, result.err

"""`kill -9` at any moment, then the same command: bit for bit the uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.runs.folder import RunFolder
from support.killed_runs import Kill, in_child
from support.same_run import assert_same_run

COMBINATIONS = [[], ["replay"], ["ewc"], ["ewc_online"], ["weight_mixing"], ["ewc", "replay", "weight_mixing"]]
# Before the first checkpoint, between two, in a later stage; and inside the writes that end a stage.
KILLS = [
    Kill(stage=1, step=1),
    Kill(stage=2, step=3),
    Kill(stage=3, step=2),
    Kill(write=4, moment="middle"),
    Kill(write=3, moment="after"),
    Kill(write=1, moment="before"),
]


# Everything at once in `make test`, each by itself in `make test-slow`.
EACH = [pytest.param(names, marks=() if len(names) == 3 else pytest.mark.slow) for names in COMBINATIONS]


@pytest.mark.parametrize("adapter", [pytest.param("full", marks=pytest.mark.slow), "lora"])
@pytest.mark.parametrize("mitigations", EACH, ids=lambda m: "+".join(m) or "none")
def test_killed_run_equals_the_uninterrupted_one(
    adapter: str, mitigations: list[str], llama_dropout: Path, tmp_path: Path
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert in_child(whole, llama_dropout, adapter, mitigations) == 0
    deaths = [in_child(killed, llama_dropout, adapter, mitigations, kill) for kill in KILLS]
    assert deaths.count(-9) >= 4, f"the run was to be killed again and again, exit codes {deaths}"
    assert not (killed / "results.json").exists()
    assert in_child(killed, llama_dropout, adapter, mitigations) == 0
    assert_same_run(whole, killed)


@pytest.mark.parametrize(
    "objective",
    ["grpo", pytest.param("dapo", marks=pytest.mark.slow), pytest.param("grpo_pretrained", marks=pytest.mark.slow)],
)
def test_on_policy_with_replay_and_ewc_goes_on_exactly(objective: str, llama_dropout: Path, tmp_path: Path) -> None:
    """Answers are functions of weights and numbers: `dapo` is killed between the two updates of one rollout, too."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    names, options = ["ewc", "replay"], {"objective": objective, "steps": 5, "every": 1}
    assert in_child(whole, llama_dropout, "lora", names, **options) == 0
    kills = [Kill(stage=1, step=3), Kill(stage=2, step=2), Kill(stage=2, step=3), Kill(write=2, moment="middle")]
    assert [in_child(killed, llama_dropout, "lora", names, kill, **options) for kill in kills] == [-9] * len(kills)
    assert in_child(killed, llama_dropout, "lora", names, **options) == 0
    assert_same_run(whole, killed)
    rewards = [line["reward"] for line in RunFolder(killed).history()]
    assert len({*rewards}) > 1, "the policy was rewarded, and not always alike"


def test_an_objective_per_stage_goes_on_exactly(llama_dropout: Path, tmp_path: Path) -> None:
    """SFT, a reward model, and a policy that learns from it, as one stream with EWC; killed in the last two stages."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = {"stream": "support.preference_stream:sft_then_reward_then_policy", "every": 1}
    assert in_child(whole, llama_dropout, "lora", ["ewc"], **options) == 0
    kills = [Kill(stage=2, step=2), Kill(stage=3, step=1), Kill(stage=3, step=3)]
    assert [in_child(killed, llama_dropout, "lora", ["ewc"], kill, **options) for kill in kills] == [-9] * len(kills)
    assert in_child(killed, llama_dropout, "lora", ["ewc"], **options) == 0
    assert_same_run(whole, killed)
    lines = RunFolder(killed).history()
    assert ["rewards/accuracies" in line for line in lines] == [False] * 4 + [True] * 4 + [False] * 4
    assert ["reward" in line for line in lines] == [False] * 8 + [True] * 4
    assert all(line["stage"] == 1 or line["loss/ewc/penalty"] >= 0 for line in lines)

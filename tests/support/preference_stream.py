"""A stream that learns to answer, then which answer is better, then from that judgement: SFT, reward model, GRPO."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from residency.domains.base import Domain
from residency.domains.table import Table
from residency.domains.template import Template
from residency.engine.stage_overrides import StageOverrides
from residency.objectives import GRPO, RewardModel
from residency.objectives.rewards import ByRewardModel

__all__ = ["judged_domains", "sft_then_reward_then_policy"]


def judged_domains(folder: Path, reads: str) -> dict[str, Domain]:
    """Two domains of rows of pairs, of marked answers, or of prompts with a wanted answer."""
    folder.mkdir(parents=True, exist_ok=True)
    template = Template(prompt="{prompt}>", completion="{completion}")
    found: dict[str, Domain] = {}
    for name in "ab":
        draw = random.Random(name)
        prompts = sorted({"".join(draw.choices("abcdefgh", k=draw.randint(3, 6))) for _ in range(60)})
        rows: list[dict[str, Any]] = []
        for i, prompt in enumerate(prompts):
            if reads == "pair":
                rows.append({"prompt": prompt, "chosen": prompt[: 1 + i % 3], "rejected": prompt[:1] + "zz"})
            elif reads == "unpaired":
                rows.append({"prompt": prompt, "completion": prompt[: 1 + i % 3], "label": bool(i % 2)})
            else:
                rows.append({"prompt": prompt, "completion": prompt[:1]})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        found[name] = Table(train=str(path), template=template, scorers=["nll"])
    return found


def sft_then_reward_then_policy(folder: Path) -> dict[str, Any]:
    """What `tiny_runs.train` takes: three domains of rows of three kinds, and the objectives of two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    template = Template(prompt="{prompt}>", completion="{completion}")
    rows: dict[str, Any] = {
        "answers": lambda p: {"prompt": p, "completion": p[:2]},
        "taste": lambda p: {"prompt": p, "chosen": p[:1], "rejected": p[:1] + "zz", "margin": 0.1},
        "prompts": lambda p: {"prompt": p, "completion": p[:1]},
    }
    domains = {}
    for name, make in rows.items():
        draw = random.Random(name)
        prompts = sorted({"".join(draw.choices("abcdefgh", k=draw.randint(3, 6))) for _ in range(80)})
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps(make(prompt)) + "\n" for prompt in prompts), encoding="utf-8")
        scorers: list[Any] = ["nll", "preference_accuracy"] if name == "taste" else ["nll"]
        domains[name] = Table(train=str(path), template=template, scorers=scorers)
    reward = ByRewardModel(stage=2, token="~")
    policy = GRPO(reward=reward, group=4, max_new_tokens=4, truncated="as_is", informative=0.0)
    stages = {"taste": StageOverrides(objective=RewardModel(token="~")), "prompts": StageOverrides(objective=policy)}
    return {"data": {"domains": domains}, "stages": stages}

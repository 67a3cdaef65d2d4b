"""Verifiable rewards of on-policy learning, chosen by class path: what an answer is worth, without a judge."""

from residency.objectives.rewards.base import Answer, Question, Reward
from residency.objectives.rewards.by_reward_model import ByRewardModel
from residency.objectives.rewards.by_scorer import ByScorer
from residency.objectives.rewards.combined import LengthPenalty, Sum
from residency.objectives.rewards.text import Contains, ExactLabel, JsonValid, NumericEqual, Regex

__all__ = [
    "Answer",
    "ByRewardModel",
    "ByScorer",
    "Contains",
    "ExactLabel",
    "JsonValid",
    "LengthPenalty",
    "NumericEqual",
    "Question",
    "Regex",
    "Reward",
    "Sum",
]

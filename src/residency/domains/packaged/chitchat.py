"""Chit-chat: from one message of an open-domain conversation to the reply.

Source: chitchat-dataset 0.9.0 (BYU Perception, Control and Cognition lab); neighbouring turns of 2 to 50 words, each of
one or more messages in a row by the same person.
Licence: MIT.
Attribution: see `ChitChat.attribution`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from residency.core.assets.locate import locate
from residency.core.types import Row, Split
from residency.domains.base import Domain, drop_ambiguous, split_by_group

__all__ = ["ChitChat"]


class ChitChat(Domain):
    """Message -> reply of a conversation (generative; nll only: a reply has no one right wording)."""

    kind = "generative"
    source = "chitchat-dataset 0.9.0"
    licence = "MIT"
    attribution = (
        "Copyright (c) 2019 Perception, Control and Cognition Lab; Myers, Etchart and Fulda (2020), Conversational "
        "Scaffolding: An Analogy-Based Approach to Response Prioritization in Open-Domain Dialogs"
    )
    default_scorers = ("nll",)

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """All rows, split by conversation."""
        path = locate("chitchat-dataset", "0.9.0", "chitchat_dataset/dataset.json")
        return split_by_group(drop_ambiguous(_rows(path)))


def _rows(path: Path) -> Iterator[Row]:
    for conversation, content in json.loads(path.read_text(encoding="utf-8")).items():
        turns = [" ".join(message["text"] for message in turn).split() for turn in content["messages"]]
        for number, (said, reply) in enumerate(pairwise(turns)):
            if 2 <= len(said) <= 50 and 2 <= len(reply) <= 50:
                yield Row(
                    id=f"{conversation}:{number}",
                    prompt=" ".join(said),
                    completion=" ".join(reply),
                    group=conversation,
                )

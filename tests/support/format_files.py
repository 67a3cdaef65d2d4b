"""The same pairs of question and answer in every format and container that users bring."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["CHATS", "FIVE", "TEXTS", "lines", "plain", "said"]

Pairs = Sequence[tuple[str, str]]

FIVE = [
    ("2+2?", "4"),
    ("Capital of France?", "Paris"),
    ("Größe von 京都 👩?", "groß, 大"),
    ("two\nlines\u2028here", 'a "quoted, text"'),
    ("00123", "NA"),
]


def lines(rows: Sequence[dict[str, Any]]) -> str:
    """JSON Lines."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def said(prompt: str, completion: str) -> list[dict[str, str]]:
    """One question and one answer as turns."""
    return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]


def plain(pairs: Pairs, **names: str) -> list[dict[str, Any]]:
    """Objects with a prompt and a completion, under other names where they are given."""
    return [{names.get("p", "prompt"): p, names.get("c", "completion"): c} for p, c in pairs]


def _delimited(pairs: Pairs, delimiter: str) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=delimiter).writerows([("prompt", "completion"), *pairs])
    return text.getvalue()


def _superni(pairs: Pairs) -> str:
    instances = [{"input": p, "output": [c, "x"]} for p, c in pairs]
    return json.dumps({"Definition": ["d"], "Instances": instances})


def _parts(prompt: str, completion: str) -> dict[str, Any]:
    first, second = said(prompt, completion)
    return {"messages": [{**first, "content": [{"type": "text", "text": prompt}]}, second]}


TEXTS: dict[str, tuple[str, Callable[[Pairs], str]]] = {
    "jsonl": ("jsonl", lambda pairs: lines(plain(pairs))),
    "jsonl, bom and crlf": ("jsonl", lambda pairs: "\ufeff" + lines(plain(pairs)).replace("\n", "\r\n")),
    "jsonl, cr only": ("jsonl", lambda pairs: lines(plain(pairs)).replace("\n", "\r")),
    "json": ("json", lambda pairs: json.dumps(plain(pairs), indent=1)),
    "array named jsonl": ("jsonl", lambda pairs: json.dumps(plain(pairs), indent=1)),
    "csv": ("csv", lambda pairs: _delimited(pairs, ",")),
    "tsv": ("tsv", lambda pairs: _delimited(pairs, "\t")),
    "trace": ("json", lambda pairs: json.dumps(plain(pairs, c="answer"))),
    "question": ("jsonl", lambda pairs: lines(plain(pairs, p="question", c="target"))),
    "alpaca": ("jsonl", lambda pairs: lines([{"instruction": p, "input": None, "output": c} for p, c in pairs])),
    "unpaired": ("jsonl", lambda pairs: lines([row | {"label": True} for row in plain(pairs)])),
    "labelled": ("jsonl", lambda pairs: lines([{"text": p, "label": c} for p, c in pairs])),
    "superni": ("json", _superni),
}
"""{name: (suffix, the file's text)} of formats that give a prompt and a completion."""

CHATS: dict[str, tuple[str, Callable[[Pairs], str]]] = {
    "messages": ("jsonl", lambda pairs: lines([{"messages": said(*pair)} for pair in pairs])),
    "lists": ("jsonl", lambda pairs: lines([{"prompt": said(*x)[:1], "completion": said(*x)[1:]} for x in pairs])),
    "parts": ("jsonl", lambda pairs: lines([_parts(*pair) for pair in pairs])),
    "sharegpt": (
        "jsonl",
        lambda pairs: lines(
            [{"conversations": [{"from": "human", "value": p}, {"from": "gpt", "value": c}]} for p, c in pairs]
        ),
    ),
}
"""The same of formats that give a conversation."""

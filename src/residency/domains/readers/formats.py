"""Formats of rows, and how each becomes a `Row`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from residency.core.types import Row
from residency.domains.readers.conversations import (
    answer_text,
    before_text,
    check_learnable,
    from_sharegpt,
    to_messages,
    to_tools,
)
from residency.domains.readers.records import Record
from residency.domains.readers.strict_json import refuse, short

__all__ = ["COMPLETIONS", "LABELS", "PROMPTS", "TEXTS", "WANTED", "Format", "RowMaker"]

Format = Literal["completion", "messages", "text", "prompt", "pair", "unpaired", "labelled", "alpaca", "sharegpt"]

WANTED: Mapping[Format, str] = {
    "completion": '{"prompt": "...", "completion": "..."}',
    "messages": '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}',
    "text": '{"text": "..."}',
    "prompt": '{"prompt": "..."}',
    "pair": '{"prompt": "...", "chosen": "...", "rejected": "..."}',
    "unpaired": '{"prompt": "...", "completion": "...", "label": true}',
    "labelled": '{"text": "...", "label": "..."}',
    "alpaca": '{"instruction": "...", "input": "...", "output": "..."}',
    "sharegpt": '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}',
}
PROMPTS = ("prompt", "question", "query")
COMPLETIONS = ("completion", "answer", "response", "output", "target")
TEXTS = ("text", "sentence", "content")
LABELS = ("label", "labels", "intent", "category")
_ASKED_AGAIN = ("pair", "unpaired", "prompt")
_COMMON = ("id", "group", "weight", "references", "tools", "system")


@dataclass(frozen=True, kw_only=True)
class RowMaker:
    """Makes the rows of one file.

    Args:
        format: What its records are.
        prefix: Of the ids of rows without one.
        strip: Whether blanks around completions are removed.
        class_names: Names of integer labels, in order; empty = labels are texts.
        stripped: Completions whose blanks were removed since it was last cleared; where they are.
    """

    format: Format
    prefix: str
    strip: bool = True
    class_names: Sequence[str] = ()
    stripped: list[str] = field(default_factory=list)

    def row(self, record: Record) -> Row:
        """The row of a record.

        Raises:
            UserError: A column is missing, empty or of another type; with file and line.
        """
        value, where = record.value, record.where
        facts = _MAKERS[self.format](self, value, where)
        common: dict[str, Any] = {
            "id": self._word(value, "id", where) or f"{self.prefix}:{record.number}",
            "group": self._word(value, "group", where) or self._asked(facts),
            "weight": self._weight(value, where),
            "references": self._references(value, where),
        }
        return Row(**common, **facts)

    # -- formats ------------------------------------------------------------------------------------------------

    def _completion(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        prompt = self._one(value, PROMPTS, where)
        if isinstance(value[prompt], list):
            completion = self._one(value, COMPLETIONS, where)
            return self._said(self._turns(value, prompt, where) + self._turns(value, completion, where), value, where)
        text = self._text(value, prompt, where)
        return {"prompt": text, "completion": self._answer(value, self._one(value, COMPLETIONS, where), where)}

    def _messages(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        self._need(value, "messages", where)
        return self._said(to_messages(value["messages"], where), value, where)

    def _sharegpt(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        return self._said(from_sharegpt(value, where), value, where)

    def _alpaca(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        instruction, more = self._text(value, "instruction", where), value.get("input") or ""
        if not isinstance(more, str):
            self._refuse(where, f"'input' is {type(more).__name__} {short(more)}", "write a text, or null")
        prompt = f"{instruction}\n{more}" if more.strip() else instruction
        answer = self._answer(value, "output", where)
        system, history = value.get("system"), value.get("history") or []
        if not system and not history:
            return {"prompt": prompt, "completion": answer}
        turns = [{"role": "system", "content": system}] if system else []
        for pair in history:
            if not isinstance(pair, list) or len(pair) != 2:
                self._refuse(where, f"'history' holds {short(pair)}", 'write [["question", "answer"], ...]')
            turns += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
        turns += [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
        return self._said(to_messages(turns, where), value, where)

    def _plain_text(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        return {"kind": "text", "prompt": "", "completion": self._text(value, "text", where)}

    def _prompt(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        column = self._one(value, PROMPTS, where)
        extra = {k: v for k, v in value.items() if k != column and k not in _COMMON}
        if isinstance(value[column], list):
            turns = to_messages(value[column], where)
            said = "\n".join(answer_text(turn) for turn in turns)
            return {"kind": "prompt", "prompt": said, "completion": "", "messages": turns, "extra": extra}
        return {"kind": "prompt", "prompt": self._text(value, column, where), "completion": "", "extra": extra}

    def _pair(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        self._need(value, "chosen", where)
        self._need(value, "rejected", where)
        if isinstance(value["chosen"], list) or isinstance(value.get("prompt"), list):
            return self._said_pair(value, where)
        if "prompt" not in value:
            got, fix = "chosen and rejected are texts without a prompt", 'write the "prompt" they share'
            self._refuse(where, got, fix)
        chosen, rejected = self._answer(value, "chosen", where), self._answer(value, "rejected", where)
        self._differ(chosen, rejected, where)
        return {
            "kind": "pair",
            "prompt": self._text(value, "prompt", where),
            "completion": chosen,
            "rejected": rejected,
            "extra": self._margin(value, where),
        }

    def _said_pair(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        start = self._turns(value, "prompt", where) if "prompt" in value else ()
        chosen, rejected = start + self._turns(value, "chosen", where), start + self._turns(value, "rejected", where)
        if len(chosen) != len(rejected) or chosen[:-1] != rejected[:-1] or len(chosen) < 2:
            got = "chosen and rejected differ in more than their last answer"
            self._refuse(where, got, "let both be the same conversation with another last answer")
        for turns in (chosen, rejected):
            check_learnable(turns, where)
        answers = answer_text(chosen[-1]), answer_text(rejected[-1])
        self._differ(*answers, where)
        facts = {"kind": "pair", "prompt": before_text(chosen), "completion": answers[0], "rejected": answers[1]}
        tools, extra = to_tools(value.get("tools"), where), self._margin(value, where)
        return facts | {"messages": chosen[:-1], "tools": tools, "extra": extra}

    def _unpaired(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        self._need(value, "label", where)
        if not isinstance(value["label"], bool):
            self._refuse(where, f"'label' is {type(value['label']).__name__} {short(value['label'])}", "true or false")
        facts = self._completion(value, where)
        return facts | {"kind": "unpaired", "wanted": value["label"]}

    def _labelled(self, value: Mapping[str, Any], where: str) -> dict[str, Any]:
        column = self._one(value, LABELS, where)
        if {"sentence1", "sentence2"} <= value.keys():
            prompt = "\n".join(self._text(value, key, where) for key in ("sentence1", "sentence2"))
        else:
            prompt = self._text(value, self._one(value, (*PROMPTS, *TEXTS), where), where)
        return {"kind": "labelled", "prompt": prompt, "completion": self._label(value, column, where)}

    def _asked(self, facts: Mapping[str, Any]) -> str:
        """Preferences and prompts ask the same thing more than once: what was asked is their group."""
        return " ".join(facts["prompt"].casefold().split()) if facts.get("kind") in _ASKED_AGAIN else ""

    # -- parts --------------------------------------------------------------------------------------------------

    def _said(self, turns: tuple[Mapping[str, Any], ...], value: Mapping[str, Any], where: str) -> dict[str, Any]:
        check_learnable(turns, where)
        facts = {"prompt": before_text(turns), "completion": answer_text(turns[-1]), "messages": turns}
        return facts | {"kind": "messages", "tools": to_tools(value.get("tools"), where)}

    def _turns(self, value: Mapping[str, Any], key: str, where: str) -> tuple[Mapping[str, Any], ...]:
        if not isinstance(value[key], list):
            got = f"{key!r} is {type(value[key]).__name__}, other columns are lists of turns"
            self._refuse(where, got, "write texts in all of them, or turns in all of them")
        return to_messages(value[key], where)

    def _differ(self, chosen: str, rejected: str, where: str) -> None:
        if chosen == rejected:
            self._refuse(where, "chosen and rejected are equal", "delete the row: nothing is preferred in it")

    def _label(self, value: Mapping[str, Any], column: str, where: str) -> str:
        label = value[column]
        if isinstance(label, int) and not isinstance(label, bool):
            if not 0 <= label < len(self.class_names):
                known = len(self.class_names) or "no"
                got = f"{column!r} is the number {label}, and {known} names of classes are known"
                self._refuse(where, got, "name them in order: labels: [first, second, ...]")
            return self.class_names[label]
        return self._answer(value, column, where)

    def _one(self, value: Mapping[str, Any], names: Sequence[str], where: str) -> str:
        """The one of several columns that is there; the first of them is always taken."""
        there = [name for name in names if name in value]
        if not there:
            self._need(value, names[0], where)
        if len(there) > 1 and there[0] != names[0]:
            got = f"{' and '.join(there)} could each be the {names[0]}"
            self._refuse(where, got, f"say which: columns: {{{names[0]}: {there[0]}}}")
        return there[0]

    def _need(self, value: Mapping[str, Any], key: str, where: str) -> None:
        if key not in value:
            self._refuse(where, f"no {key!r}, only {sorted(value)}", f"write {WANTED[self.format]}")

    def _text(self, value: Mapping[str, Any], key: str, where: str) -> str:
        self._need(value, key, where)
        text: Any = value[key]
        if not isinstance(text, str):
            got = f"{key!r} is {type(text).__name__} {short(text)}"
            self._refuse(where, got, f'put the text in quotes: "{key}": "..."')
        if not text.strip():
            self._refuse(where, f"{key!r} is empty", f"write the {key}, or delete the line")
        return str(text)

    def _answer(self, value: Mapping[str, Any], key: str, where: str) -> str:
        text = self._text(value, key, where)
        if self.strip and (bare := text.strip()) != text:
            self.stripped.append(where)
            return bare
        return text

    def _word(self, value: Mapping[str, Any], key: str, where: str) -> str:
        found = value.get(key)
        if found is None or found == "":
            return ""
        # Ids are numbers in many data sets; True is an int in Python, but no id.
        if isinstance(found, str | int) and not isinstance(found, bool):
            return str(found)
        got = f"{key!r} is {type(found).__name__} {short(found)}"
        self._refuse(where, got, f"write {key!r} as a text, or leave it out")
        return ""

    def _weight(self, value: Mapping[str, Any], where: str) -> float:
        weight = value.get("weight", 1.0)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not number or not 0 < weight < float("inf"):
            self._refuse(where, f"'weight' is {short(weight)}", "write a number above 0; delete a row of weight 0")
        return float(weight)

    def _margin(self, value: Mapping[str, Any], where: str) -> dict[str, float]:
        """By how much the chosen answer of a pair should win, where its row says so."""
        margin = value.get("margin", 0)
        number = isinstance(margin, int | float) and not isinstance(margin, bool)
        if not number or not 0 <= margin < float("inf"):
            self._refuse(where, f"'margin' is {short(margin)}", "write a number, 0 or more: how much better chosen is")
        return {"margin": float(margin)} if "margin" in value else {}

    def _references(self, value: Mapping[str, Any], where: str) -> tuple[str, ...]:
        found = value.get("references") or []
        if not isinstance(found, list) or not all(isinstance(text, str) for text in found):
            self._refuse(where, f"'references' is {short(found)}", "write a list of further right answers")
        return tuple(found)

    def _refuse(self, where: str, got: str, fix: str) -> None:
        refuse(where, got, why=f"every row has to be {WANTED[self.format]}", fix=fix)


_MAKERS: Mapping[Format, Callable[[RowMaker, Mapping[str, Any], str], dict[str, Any]]] = {
    "completion": RowMaker._completion,
    "messages": RowMaker._messages,
    "text": RowMaker._plain_text,
    "prompt": RowMaker._prompt,
    "pair": RowMaker._pair,
    "unpaired": RowMaker._unpaired,
    "labelled": RowMaker._labelled,
    "alpaca": RowMaker._alpaca,
    "sharegpt": RowMaker._sharegpt,
}

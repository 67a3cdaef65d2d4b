"""Conversations in the forms that files have them (OpenAI, ShareGPT), as chat templates take them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from residency.domains.readers.strict_json import parse_json, refuse, short

__all__ = ["answer_text", "before_text", "check_learnable", "from_sharegpt", "to_messages", "to_tools"]

Message = Mapping[str, Any]

_WHY = 'a conversation is a list of turns: {"role": "user", "content": "..."}'
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "bot": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def to_messages(value: Any, where: str) -> tuple[Message, ...]:
    """Turns as chat templates take them.

    Args:
        value: `messages` of a file: role, content (text, or parts of text), tool calls.
        where: File and line, for messages.

    Raises:
        UserError: No turn, a role that is not known, content that is no text, arguments of a call that are not JSON.
    """
    if not isinstance(value, list) or not value:
        refuse(where, f"messages are {short(value)}", why=_WHY, fix="write a list of at least one turn")
    return tuple(_message(turn, f"{where}, message {n}") for n, turn in enumerate(value, 1))


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, Mapping):
        refuse(where, f"{type(turn).__name__} {short(turn)}", why=_WHY, fix=f"write {_WHY.partition(': ')[2]}")
    role = turn.get("role")
    if role not in _ROLES:
        refuse(where, f"role {short(role)}", why=_WHY, fix=f"use one of {', '.join(_ROLES)}")
    kept = {key: item for key, item in turn.items() if item is not None}
    calls = kept.get("tool_calls")
    if calls:
        kept["tool_calls"] = [_call(call, where) for call in calls]
    content = kept.get("content")
    if isinstance(content, list):
        kept["content"] = "".join(_part(part, where) for part in content)
    elif content is None and calls:
        kept.pop("content", None)
    elif not isinstance(content, str):
        refuse(where, f"content is {type(content).__name__} {short(content)}", why=_WHY, fix="write a text")
    return kept


def _part(part: Any, where: str) -> str:
    text = part.get("text") if isinstance(part, Mapping) and part.get("type", "text") == "text" else None
    if not isinstance(text, str):
        refuse(where, f"a part that is no text: {short(part)}", why="models of text are trained", fix="remove the part")
    return text


def _call(call: Any, where: str) -> Any:
    """A tool call whose arguments are an object: OpenAI's files write them as JSON text."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if isinstance(function, Mapping) and isinstance(function.get("arguments"), str):
        why, fix = "the arguments of a call are a JSON object", 'write {"name": value, ...}'
        arguments = parse_json(function["arguments"], f"{where}, arguments", why=why, fix=fix)
        return {**call, "function": {**function, "arguments": arguments}}
    return call


def to_tools(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    """Tools as chat templates take them: a list, or the JSON text of one.

    Raises:
        UserError: Neither.
    """
    why, fix = "tools are a list of JSON schemas", 'write [{"type": "function", "function": {...}}, ...]'
    if isinstance(value, str):
        value = parse_json(value, f"{where}, tools", why=why, fix=fix) if value.strip() else None
    if value is None:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, Mapping) for tool in value):
        refuse(where, f"tools are {short(value)}", why=why, fix=fix)
    return tuple(value)


def from_sharegpt(value: Mapping[str, Any], where: str) -> tuple[Message, ...]:
    """`conversations` of `{"from", "value"}`, with `system` in front, as turns.

    Raises:
        UserError: A speaker that is not known, or two users in a row: what such a row means is not certain.
    """
    why = 'ShareGPT rows are {"conversations": [{"from": "human", "value": "..."}, ...]}'
    turns = value.get("conversations")
    if not isinstance(turns, list) or not turns:
        refuse(where, f"conversations are {short(turns)}", why=why, fix="write a list of at least two turns")
    found: list[dict[str, Any]] = []
    if value.get("system"):
        found.append({"role": "system", "content": value["system"]})
    for n, turn in enumerate(turns, 1):
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _SHAREGPT:
            fix = f"use one of {', '.join(_SHAREGPT)}"
            refuse(f"{where}, turn {n}", f"from {short(speaker)}", why=why, fix=fix)
        role, text = _SHAREGPT[speaker], turn.get("value")
        if found and found[-1]["role"] == role and role in ("user", "assistant"):
            fix = "join the two turns, or put the missing one between them"
            refuse(f"{where}, turn {n}", f"two turns of {role} in a row", why=why, fix=fix)
        if speaker == "function_call":
            fix = 'write {"name": ..., "arguments": {...}}'
            call = parse_json(str(text), f"{where}, turn {n}", why="a call is a JSON object", fix=fix)
            found.append({"role": role, "tool_calls": [{"type": "function", "function": call}]})
        else:
            found.append({"role": role, "content": text})
    return to_messages(found, where)


def check_learnable(messages: Sequence[Message], where: str) -> None:
    """A conversation from which an answer can be learnt.

    Raises:
        UserError: Its last turn is not the assistant's, or the assistant says nothing in one of its turns.
    """
    if messages[-1]["role"] != "assistant":
        got = f"the last turn is of {messages[-1]['role']}"
        refuse(where, got, why="answers are learnt: a conversation ends with one", fix="cut the turns behind it")
    for n, message in enumerate(messages, 1):
        if message["role"] == "assistant" and not answer_text(message).strip():
            why = "nothing can be learnt from an empty answer"
            refuse(f"{where}, message {n}", "empty answer", why=why, fix="write the answer, or delete the row")


def answer_text(message: Message) -> str:
    """What a turn says; of a turn that only calls tools, the calls as JSON."""
    content = message.get("content")
    if isinstance(content, str) and content:
        return content
    return json.dumps(message["tool_calls"], ensure_ascii=False) if message.get("tool_calls") else ""


def before_text(messages: Sequence[Message]) -> str:
    """All contents before the last turn, one after another: what leaks and scores are looked for in."""
    return "\n".join(answer_text(message) for message in messages[:-1])

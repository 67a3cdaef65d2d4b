"""Conversations as a chat template writes them, and which of its characters the assistant says."""

from __future__ import annotations

import datetime
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from residency.core.errors import UserError
from residency.core.types import Example, Role, Row, Split
from residency.domains.chat_page import ChatPage, Turn
from residency.domains.lengths import Keep, TooLong, fit_length, model_limits
from residency.domains.tokens import branch_out, encode_text

__all__ = ["Chat"]


_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True, kw_only=True)
class Chat:
    """The tokenizer's chat template, or one of the user's; every answer of the assistant is supervised with its end.

    Where the template marks answers (`{% generation %}`), the marks say what is supervised. Where it does not, an
    answer is what a conversation with it has more than one that asks for it (`add_generation_prompt`). Control tokens
    in the text of rows stay text. Templates run in transformers' sandbox.

    Args:
        system: System turn of conversations that have none; null leaves it to the template, "" is an empty one.
        supervise: `assistant` = every answer, `last` = the last one only (for templates that write earlier answers in
            another way than when they were the last: they drop their thoughts).
        jinja: A template of your own, as a file or as text; it sees `messages`, `tools`, `prompt` and `completion`.
        options: Further variables of the template, such as `enable_thinking`.
        date: What templates that ask for the day are told.
        max_tokens: Longest conversation in tokens; null = what the model can read.
        max_prompt_tokens: Longest prompt in tokens; null = no limit of its own.
        too_long: What happens to longer rows (see `TooLong`); null = training rows are left out, up to 1 % of them.
        keep_prefix: Characters of a prompt that are never cut (an instruction); `line` = its first line.
    """

    system: str | None = None
    supervise: Literal["assistant", "last"] = "assistant"
    jinja: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    date: str = "2024-07-26"
    max_tokens: int | None = None
    max_prompt_tokens: int | None = None
    too_long: TooLong | None = None
    keep_prefix: Keep = 0

    def source(self, tokenizer: Any, *, tools: bool = False) -> str:
        """The text of the template.

        Raises:
            UserError: There is none.
        """
        if self.jinja is not None:
            return self.jinja if "{" in self.jinja else _read_template(self.jinja)
        try:
            found: str = tokenizer.get_chat_template(tools=[{}] if tools else None)
        except (AttributeError, ValueError) as error:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__} without a chat template",
                why="conversations are written in the form that the model was trained on",
                fix="use an instruct model, or give a template of your own: template: {jinja: FILE}",
            ) from error
        return found

    def encode(
        self, tokenizer: Any, *, domain: str, row: Row, labels: Sequence[str] = (), split: Split = "train"
    ) -> Example:
        """Turn one row into token ids.

        Args:
            tokenizer: A transformers tokenizer.
            domain: Name of the domain, stored in the example.
            row: The row, of any kind but `text`.
            labels: All labels of the domain; those other than the row's own become branches behind it, in this order.
            split: Where the row comes from; says what happens to one that is too long.

        Raises:
            UserError: No template, one that does not take the row, or whose answers cannot be found in what it writes.
        """
        if row.kind == "text":
            raise UserError(
                f"row {row.id!r} of {domain} is plain text",
                why="a chat template writes turns, and plain text has none",
                fix="set template: plain",
            )
        source = _fixed_date(self.source(tokenizer, tools=bool(row.tools)), self.date)
        where = f"row {row.id!r} of {domain}"
        page = ChatPage(source=source, options=self.options, tokenizer=tokenizer, row=row, where=where)
        limits = model_limits(tokenizer, self.max_tokens, self.max_prompt_tokens, self.too_long, split)
        bare = Example(domain=domain, row=row.id, prompt=(), branches=(), split=split, extra=dict(row.extra))
        before, answers = _turns(row, self.system, labels)
        if not answers:
            text = encode_text(tokenizer, page.render(before, asks=True))
            return fit_length(replace(bare, prompt=text.ids), page.cuttable(text, before, self.keep_prefix), limits)
        last_only = self.supervise == "last" or row.kind == "pair"
        texts, variants = zip(*(page.variant(before, turn, role, last_only) for turn, role in answers), strict=True)
        start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        prompt, branches = branch_out(variants, start=start)
        example = replace(bare, prompt=prompt, branches=tuple(replace(b, weight=row.weight) for b in branches))
        first, last = page.cuttable(texts[0], before, self.keep_prefix)
        return fit_length(example, (min(first, len(prompt)), min(last, len(prompt))), limits)


def _read_template(name: str) -> str:
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"template.jinja: {name!r}: {error}",
            why="a template without braces is the name of a file",
            fix="give a readable file (UTF-8), or the text of the template",
        ) from error


def _turns(row: Row, system: str | None, labels: Sequence[str]) -> tuple[list[Turn], list[tuple[Turn, Role]]]:
    """The turns of a row that all its answers share, and the answers."""
    turns = list(row.messages) or [{"role": "user", "content": row.prompt}]
    if system is not None and turns[0]["role"] not in ("system", "developer"):
        turns.insert(0, {"role": "system", "content": system})
    if row.kind == "messages":
        return turns[:-1], [(turns[-1], "completion")]
    if row.kind == "prompt":
        return turns, []
    if row.kind == "pair":
        return turns, [(_said(row.completion), "chosen"), (_said(row.rejected), "rejected")]
    role: Role = "completion" if row.kind != "unpaired" else "chosen" if row.wanted else "rejected"
    others = [(_said(label), "label") for label in labels if label != row.completion]
    return turns, [(_said(row.completion), role), *others]  # type: ignore[list-item]


def _said(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _fixed_date(source: str, date: str) -> str:
    """The template with one day: prompts must not depend on when they are written."""
    day = datetime.date.fromisoformat(date)
    return _NOW.sub(lambda found: repr(day.strftime(found[2])), source)

"""Conversations as a chat template writes them, and which of its characters the assistant says."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

from residency.core.errors import UserError
from residency.core.types import Example, Role, Row, Split
from residency.domains.lengths import Keep, TooLong, cuttable_tokens, fit_length, model_limits
from residency.domains.tokens import (
    TokenText,
    Variant,
    branch_out,
    clean_place,
    control_end,
    encode_text,
    mark_control,
    supervised_tokens,
)

__all__ = ["Chat"]

Turn = Mapping[str, Any]
Spans = list[tuple[int, int]]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")
_GROWTH, _SLACK = 20, 100_000


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
        page = _Page(self, tokenizer, row, where=f"row {row.id!r} of {domain}")
        limits = model_limits(tokenizer, self.max_tokens, self.max_prompt_tokens, self.too_long, split)
        bare = Example(domain=domain, row=row.id, prompt=(), branches=(), split=split)
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


class _Page:
    """One row under one template.

    Args:
        style: Of the template.
        tokenizer: Whose template it is, unless the style brings one.
        row: The row.
        where: It is, for messages.
    """

    def __init__(self, style: Chat, tokenizer: Any, row: Row, *, where: str) -> None:
        self.style, self.tokenizer, self.row, self.where = style, tokenizer, row, where
        self.source = _fixed_date(style.source(tokenizer, tools=bool(row.tools)), style.date)
        self.marked = bool(_MARKS.search(self.source))
        self.tools = _marked(tokenizer, list(row.tools)) or None
        self.spans: Spans = []

    def render(self, turns: Sequence[Turn], *, asks: bool = False) -> str:
        """The text of some turns, with marks around control tokens that the row brought; sets `spans`.

        Raises:
            UserError: The template does not take them, or writes far more than it was given.
        """
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        said = turns[-1].get("content", "") if turns and turns[-1]["role"] == "assistant" else ""
        flat = {
            "prompt": mark_control(self.tokenizer, self.row.prompt),
            "completion": mark_control(self.tokenizer, said),
        }
        given = {**self.tokenizer.special_tokens_map, **flat, **self.style.options}
        options = {"add_generation_prompt": asks, "return_assistant_tokens_mask": self.marked, "tools": self.tools}
        try:
            marked = [_marked(self.tokenizer, dict(turn)) for turn in turns]
            texts, spans = render_jinja_template([marked], chat_template=self.source, **options, **given)
        except (TemplateError, TypeError, ValueError) as error:
            self.refuse(
                f"the chat template fails: {type(error).__name__}: {error}",
                "it does not take these turns (roles, tools or empty contents)",
                "change the row, or give a template of your own: template: {jinja: FILE}",
            )
        text: str = texts[0]
        if len(text) > _GROWTH * sum(len(str(turn)) for turn in turns) + _SLACK:
            self.refuse(f"a template that writes {len(text):,} characters", "it repeats itself", "mend the template")
        self.spans = [(a, b) for a, b in spans[0]] if self.marked else []
        return text

    def variant(self, before: Sequence[Turn], answer: Turn, role: Role, last_only: bool) -> tuple[TokenText, Variant]:
        """The tokens of a conversation with one last answer, and which of them are supervised."""
        turns = [*before, answer]
        whole = self.render(turns)
        spans = self._marked_spans(turns, last_only) if self.marked else self._asked_spans(turns, whole, last_only)
        self._check_contents(turns, whole)
        text = encode_text(self.tokenizer, whole)
        if not text.spans:
            fix = "use a fast tokenizer (tokenizer.json)"
            self.refuse("a tokenizer that does not tell where its tokens lie", "answers are found by their places", fix)
        mask = supervised_tokens(text.spans, [(clean_place(whole, a), clean_place(whole, b)) for a, b in spans])
        if not any(mask):
            self.refuse("no token of an answer", "nothing would be learnt", "check the marks of the template")
        ids, mask = self._ended(text.ids, mask)
        return text, Variant(ids=ids, mask=tuple(mask), role=role)

    def _marked_spans(self, turns: Sequence[Turn], last_only: bool) -> Spans:
        spans = self.spans[-1:] if last_only else self.spans
        silent = [k for k, turn in enumerate(_answers(turns)) if turn.get("weight") == 0]
        if silent and not last_only:
            if len(spans) != len(_answers(turns)):
                fix = "let the template mark each answer once"
                self.refuse("turns of weight 0", "its marks do not tell which turn is which", fix)
            spans = [span for k, span in enumerate(spans) if k not in silent]
        return spans

    def _asked_spans(self, turns: Sequence[Turn], whole: str, last_only: bool) -> Spans:
        """Where a template without marks lets the assistant speak: what it has more than one that asks."""
        spans: Spans = []
        for k, turn in enumerate(turns):
            if turn["role"] != "assistant" or turn.get("weight") == 0 or (last_only and k + 1 < len(turns)):
                continue
            asked = self.render(turns[:k], asks=True)
            said = whole if k + 1 == len(turns) else self.render(turns[: k + 1])
            end = len(asked) + control_end(self.tokenizer, said[len(asked) :])
            if not said.startswith(asked) or not whole.startswith(said[:end]):
                self.refuse(
                    f"this template writes answer {k + 1} otherwise when turns follow it",
                    "what is learnt there is not what the model will be asked for",
                    "set template: {supervise: last}, split_turns: true, or give a template with generation marks",
                )
            spans.append((len(asked), end))
        return spans

    def _ended(self, ids: tuple[int, ...], mask: list[bool]) -> tuple[tuple[int, ...], list[bool]]:
        """With the end of every answer supervised: the control token behind it; the last one gets one if need be."""
        control = {*self.tokenizer.all_special_ids}
        for k in range(len(ids) - 1):
            if mask[k] and not mask[k + 1] and ids[k] not in control and ids[k + 1] in control:
                mask[k + 1] = True
        last = max(k for k, on in enumerate(mask) if on)
        if ids[last] in control or self.tokenizer.eos_token_id is None:
            return ids, mask
        return (*ids[: last + 1], self.tokenizer.eos_token_id), [*mask[: last + 1], True]

    def _check_contents(self, turns: Sequence[Turn], whole: str) -> None:
        for turn in turns:
            text = turn.get("content")
            if not isinstance(text, str) or (text := mark_control(self.tokenizer, text)) in whole:
                continue
            lost = "blanks around" if text.strip() in whole else ""
            self.refuse(
                f"the chat template drops {lost or 'the text of'} a turn of {turn['role']}: {text[:60]!r}",
                "what is trained would not be what the row says",
                "strip the texts of the file, or give a template of your own: template: {jinja: FILE}",
            ) if turn["role"] == "assistant" or not lost else None

    def cuttable(self, text: TokenText, turns: Sequence[Turn], keep: Keep) -> tuple[int, int]:
        """Tokens of the longest user turn: what may be cut from an overlong prompt."""
        said = [turn["content"] for turn in turns if turn["role"] == "user" and isinstance(turn.get("content"), str)]
        return cuttable_tokens(text, max(said, key=len), keep) if said else (0, 0)

    def refuse(self, got: str, why: str, fix: str) -> NoReturn:
        """Stop at this row."""
        raise UserError(f"{self.where}: {got}", why=why, fix=fix) from None


def _answers(turns: Sequence[Turn]) -> list[Turn]:
    return [turn for turn in turns if turn["role"] == "assistant"]


def _marked(tokenizer: Any, value: Any) -> Any:
    """A value of a template with the control tokens of all its texts marked."""
    if isinstance(value, str):
        return mark_control(tokenizer, value)
    if isinstance(value, Mapping):
        return {key: _marked(tokenizer, item) for key, item in value.items()}
    return [_marked(tokenizer, item) for item in value] if isinstance(value, list | tuple) else value


def _fixed_date(source: str, date: str) -> str:
    """The template with one day: prompts must not depend on when they are written."""
    day = datetime.date.fromisoformat(date)
    return _NOW.sub(lambda found: repr(day.strftime(found[2])), source)

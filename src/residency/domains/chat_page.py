"""One conversation under one chat template: its text, its tokens, and which of them the assistant says."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from residency.core.errors import UserError
from residency.core.types import Role, Row
from residency.domains.lengths import Keep, cuttable_tokens
from residency.domains.tokens import (
    TokenText,
    Variant,
    clean_place,
    control_end,
    encode_text,
    mark_control,
    supervised_tokens,
)

__all__ = ["ChatPage", "Turn"]

Turn = Mapping[str, Any]
Spans = list[tuple[int, int]]

_MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_GROWTH, _SLACK = 20, 100_000


class ChatPage:
    """One row under one template.

    Args:
        source: The text of the template.
        options: Further variables of it.
        tokenizer: Whose control tokens it writes.
        row: The row.
        where: It is, for messages.
    """

    def __init__(self, *, source: str, options: Mapping[str, Any], tokenizer: Any, row: Row, where: str) -> None:
        self.source, self.options, self.tokenizer, self.row, self.where = source, options, tokenizer, row, where
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
        given = {**self.tokenizer.special_tokens_map, **flat, **self.options}
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
        self._check_contents(turns, whole, last_only=last_only)
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

    def _check_contents(self, turns: Sequence[Turn], whole: str, *, last_only: bool) -> None:
        """What the row says is what the template writes: of answers exactly, of other turns up to blanks around."""
        learnt = turns[-1:] if last_only else _answers(turns)
        for turn in turns:
            text = turn.get("content")
            if not isinstance(text, str) or (last_only and turn["role"] == "assistant" and turn is not turns[-1]):
                continue
            text = mark_control(self.tokenizer, text)
            if text in whole or (text.strip() in whole and not any(turn is one for one in learnt)):
                continue
            self.refuse(
                f"the chat template drops {'blanks around' if text.strip() in whole else 'the text of'} a turn of "
                f"{turn['role']}: {text[:60]!r}",
                "what is trained would not be what the row says",
                "strip the texts of the file, or give a template of your own: template: {jinja: FILE}",
            )

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

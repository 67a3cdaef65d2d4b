"""From a row to token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from residency.core.errors import UserError
from residency.core.types import Example, Row

__all__ = ["Template"]


@dataclass(frozen=True, kw_only=True)
class Template:
    r"""How a row becomes text, and how many tokens of it are kept.

    Args:
        prompt: Text the model reads; every `{prompt}` is replaced by the row's prompt.
        completion: Text the model should write; every `{completion}` is replaced by the row's completion.
        max_prompt_tokens: Longest prompt in tokens; of a longer one the last tokens are kept.
        max_tokens: Longest prompt and completion together in tokens; the end of a longer completion is cut off,
            and the end-of-text token with it.

    Raises:
        UserError: A placeholder is missing, or the limits leave no room for a completion.
    """

    prompt: str = "{prompt}\n"
    completion: str = " {completion}"
    max_prompt_tokens: int = 96
    max_tokens: int = 128

    def __post_init__(self) -> None:
        for name, value in (("prompt", self.prompt), ("completion", self.completion)):
            if f"{{{name}}}" not in value:
                raise UserError(
                    f"template.{name} = {value!r}",
                    why=f"without {{{name}}} the text of the rows has no place in it",
                    fix=f"put {{{name}}} where the row's {name} belongs",
                )
        if not 1 <= self.max_prompt_tokens < self.max_tokens:
            raise UserError(
                f"template.max_prompt_tokens = {self.max_prompt_tokens}, template.max_tokens = {self.max_tokens}",
                why="a prompt needs at least one token, and the completion at least one more",
                fix="choose 1 <= max_prompt_tokens < max_tokens",
            )

    def encode(self, tokenizer: Any, *, domain: str, row: Row, labels: Sequence[str] = ()) -> Example:
        """Turn one row into token ids; prompt and completion are tokenised apart, so their border is exact.

        Args:
            tokenizer: A transformers tokenizer.
            domain: Name of the domain, stored in the example.
            row: The row.
            labels: All labels of the domain; those other than the row's own become `alternatives`, in this order.

        Raises:
            UserError: The tokenizer has no end-of-text token, or the limits cut two labels down to the same tokens.
        """
        prompt = self._prompt_ids(tokenizer, row.prompt)
        room = self.max_tokens - len(prompt)
        completion = self._completion_ids(tokenizer, row.completion, room)
        others = tuple(self._completion_ids(tokenizer, text, room) for text in labels if text != row.completion)
        if completion in others:
            raise UserError(
                f"label {row.completion!r} of {domain} has the same first {room} tokens as another label",
                why="the two cannot be told apart when they are scored",
                fix="raise template.max_tokens, or shorten the labels",
            )
        return Example.of(domain=domain, row=row.id, prompt=prompt, completion=completion, alternatives=others)

    def _prompt_ids(self, tokenizer: Any, text: str) -> tuple[int, ...]:
        text = self.prompt.replace("{prompt}", text)
        bos = tokenizer.bos_token_id
        # Only a leading bos is kept of what the tokenizer adds: a closing token would end the text before the answer.
        adds_bos = bos is not None and tokenizer("a", add_special_tokens=True).input_ids[0] == bos
        start = (bos,) if adds_bos else ()
        ids = tokenizer(text, add_special_tokens=False).input_ids
        room = self.max_prompt_tokens - len(start)
        # A text without tokens still needs something before the completion: the token between two texts.
        return (*start, *(ids[-room:] if room else ())) or (tokenizer.eos_token_id,)

    def _completion_ids(self, tokenizer: Any, text: str, room: int) -> tuple[int, ...]:
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {type(tokenizer).__name__} without an end-of-text token",
                why="a completion has to end, or generation never stops",
                fix="set eos_token in the tokenizer's folder (tokenizer_config.json)",
            )
        ids = tokenizer(self.completion.replace("{completion}", text), add_special_tokens=False).input_ids
        return (*ids, tokenizer.eos_token_id)[:room]

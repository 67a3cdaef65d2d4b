"""The check of every kernel and every layout against the untouched model (design 3.3).

    read     the model as transformers has loaded it: texts one by one, logits at all positions and one gradient
    try      our attention and all kernels at once, padded and packed; nothing differs: done
    fall back  else: attention first (without it there are no packed rows), then kernel by kernel; what differs is left
               out and listed

Windows and chunks are cut down meanwhile, so that short texts reach beyond them. What was found is kept in the assets
cache under everything that can change it; the next run of the same model does not check again.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from residency.backbones.generation import decoded_logits
from residency.backbones.probes import (
    Answers,
    Loss,
    beyond_reach,
    difference,
    narrowed,
    probe_texts,
    read_batch,
    read_one_by_one,
    sees_later_tokens,
)
from residency.core.errors import UserError
from residency.core.types import Example, Layout

__all__ = ["Subject", "Verdict", "examine", "put_in_place"]

Kernels = Mapping[str, Callable[[nn.Module], object]]

# Over the largest value of the untouched model: (logits, gradient). Rounding in float32 is some 1e-6 and 1e-5 for
# tens of layers; a leak between texts, a wrong window or a swallowed keyword are far above.
_TOLERANCE = {torch.float32: (5e-5, 5e-4), torch.float64: (1e-9, 1e-8)}
_LOOSE = (5e-2, 1.5e-1)
_EXACT = "exact on this model (checked against the untouched one)"
_STEPS = 3  # tokens that are read one by one


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What is used on a model.

    Args:
        packed: Whether packed rows are exact, with our attention.
        reason: Why they are, or are not.
        decodes: Whether `residency.backbones.generation` may write with it: its memory of keys and values is exact too.
        left_out: {kernel: what was wrong with it}.
        pads: Whether prompts may be padded on their left to be continued together.
    """

    packed: bool
    reason: str
    decodes: bool = False
    pads: bool = True
    left_out: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A model under examination.

    Args:
        model: As transformers has loaded it, in evaluation mode.
        name: For messages.
        attention: Puts our attention in place (True) or the model's own (False); `None` = there is only its own.
        kernels: Exact replacements by name, in the order in which they are put in place.
        logits: (M, V) of a batch.
        nll: (M,) of a batch.
        positions: Most tokens of a text.
        vocabulary: Token ids are below it.
    """

    model: nn.Module
    name: str
    attention: Callable[[bool], object] | None
    kernels: Kernels
    logits: Loss
    nll: Loss
    positions: int
    vocabulary: int


def put_in_place(subject: Subject, verdict: Verdict) -> None:
    """What an examination found, without another one."""
    if verdict.packed and subject.attention is not None:
        subject.attention(True)
    for name, apply in subject.kernels.items():
        if name not in verdict.left_out:
            apply(subject.model)


def examine(subject: Subject) -> Verdict:
    """Find what is exact on a model, and put it in place.

    Raises:
        UserError: The model is not causal, or its padded rows depend on each other whatever is left out.
    """
    examination = _Examination(subject)
    if examination.passes(("padded", "packed")):
        return Verdict(packed=True, reason=_EXACT, decodes=examination.decodes())
    return examination.fall_back()


class _Examination:
    """Readings of the untouched model, and comparisons with them."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._texts = probe_texts(vocabulary=subject.vocabulary, longest=subject.positions)
        self._untouched = _forwards(subject.model)
        self._far = beyond_reach(subject.model.config)
        try:
            self._expected = [self._read(read_one_by_one, texts, narrow) for texts, narrow in self._situations()]
        except Exception as error:  # models fail in their own ways
            raise UserError(
                f"{subject.name} does not run: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
                why="transformers alone cannot compute the logits of one short text with it",
                fix="check its config.json, or choose a causal language model that reads nothing but token ids",
            ) from error
        if sees_later_tokens(subject.model, self._texts[0][0]):
            raise UserError(
                f"{subject.name} is not causal: what it says at a token depends on the tokens behind it",
                why="a causal language model is trained and scored on predicting the next token",
                fix="choose a decoder (for BERT-like checkpoints there is no causal training), or set is_decoder in "
                "its config.json if it was trained as one",
            )

    def passes(self, layouts: Sequence[Layout]) -> bool:
        """Everything at once: our attention where packed rows are asked for, all kernels."""
        if "packed" in layouts and (self.subject.attention is None or self._far):
            return False
        self._attend("packed" in layouts)
        for apply in self.subject.kernels.values():
            apply(self.subject.model)
        return not any(self.problem(layout) for layout in layouts)

    def fall_back(self) -> Verdict:
        """Attention first, then kernel by kernel."""
        _restore(self.subject.model, self._untouched)
        reason = self._choose_attention()
        layouts: tuple[Layout, ...] = ("padded",) if reason else ("padded", "packed")
        left_out = {}
        for name, apply in self.subject.kernels.items():
            before = _forwards(self.subject.model)
            apply(self.subject.model)
            problem = next(filter(None, map(self.problem, layouts)), "")
            if problem:
                _restore(self.subject.model, before)
                left_out[name] = problem
        packed = not reason
        return Verdict(packed=packed, reason=reason or _EXACT, decodes=packed and self.decodes(), left_out=left_out)

    def _choose_attention(self) -> str:
        """Why packed rows cannot be used; empty if they can."""
        reason = "the model runs its own attention"
        if self._far:
            reason = f"the check of packed rows does not reach as far as {self._far}"
        elif self.subject.attention is not None:
            self._attend(True)
            reason = self.problem("padded") or self.problem("packed")
            if not reason:
                return ""
            self._attend(False)
        if problem := self.problem("padded"):
            raise UserError(
                f"{self.subject.name}: {problem}, with nothing of ours in its way",
                why="the score of a row must not depend on the rows beside it",
                fix="choose another model; this one reads its padding, or draws random numbers in evaluation",
            )
        return reason

    def problem(self, layout: Layout) -> str:
        """What is wrong with a layout now; empty if nothing is."""
        how = {"logits": self.subject.logits, "nll": self.subject.nll}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a model that packing does not suit may say so before it fails
                found = [
                    self._read(lambda m, texts: read_batch(m, texts, layout, **how), texts, narrow)
                    for texts, narrow in self._situations()
                ]
        except Exception as error:  # models fail in their own ways; why is part of the record
            return f"{layout} rows fail ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
        pairs = [difference(e, f) for e, f in zip(self._expected, found, strict=True)]
        logits, gradient = (max(values) for values in zip(*pairs, strict=True))
        limits = _TOLERANCE.get(self._expected[0].logits.dtype, _LOOSE)
        if logits <= limits[0] and gradient <= limits[1]:
            return ""
        return f"{layout} logits are off by {logits:.1e}, gradients by {gradient:.1e}"

    def decodes(self) -> bool:
        """Whether tokens that are read one by one, with a memory of those before, get the logits they should."""
        examples = self._texts[0]
        texts = [[*example.prompt, *example.completion[:-1]] for example in examples]
        ends = torch.tensor([len(example.completion) for example in examples]).cumsum(0)
        places = [int(end) - 1 - step for end in ends for step in range(_STEPS, -1, -1)]
        for (group, narrow), expected in zip(self._situations(), self._expected, strict=True):
            if group is not examples:
                continue
            try:
                with narrowed(self.subject.model) if narrow else nullcontext():
                    found = decoded_logits(self.subject.model, texts, steps=_STEPS).flatten(0, 1)
            except Exception:  # as above
                return False
            wanted = expected.logits[places]
            limit = _TOLERANCE.get(wanted.dtype, _LOOSE)[0] * expected.logits.abs().max()
            if not bool((found - wanted).abs().max() <= limit):
                return False
        return True

    def _attend(self, ours: bool) -> None:
        if self.subject.attention is not None:
            self.subject.attention(ours)

    def _situations(self) -> Iterator[tuple[Sequence[Example], bool]]:
        yield from ((texts, False) for texts in self._texts)
        with narrowed(self.subject.model) as windows:
            pass
        if windows:
            yield from ((texts, True) for texts in self._texts)

    def _read(self, read: Callable[[nn.Module, Any], Answers], texts: Sequence[Example], narrow: bool) -> Answers:
        if not narrow:
            return read(self.subject.model, texts)
        with narrowed(self.subject.model):
            return read(self.subject.model, texts)


def _forwards(model: nn.Module) -> dict[nn.Module, Any]:
    """The forward that each module has instead of its class's: what a kernel has put in place."""
    return {module: vars(module)["forward"] for module in model.modules() if "forward" in vars(module)}


def _restore(model: nn.Module, forwards: Mapping[nn.Module, Any]) -> None:
    for module in model.modules():
        vars(module).pop("forward", None)
        if module in forwards:
            vars(module)["forward"] = forwards[module]

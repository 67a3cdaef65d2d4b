"""One run on several ranks: the first one decides, reads and writes; the others carry out the steps that it names.

    rank 0     lock, store, record, views ──┬─ tells a step ─┬─ agrees on its end ──┬─ ... ── tells the end
    the others                              └────────────────┴──────────────────────┘

So no rank ever decides from what it sees on a disk, and only one writes. What a step needs of a stored state travels
with it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol

import torch.distributed as dist

from residency.core.errors import EXIT_SIGNAL, UserError
from residency.core.ranks import gather_facts, rank, ranks, together, tree_from_first
from residency.core.signals import Stopped

__all__ = ["RankSteps", "Steps"]

_END = "end"


class Steps(Protocol):
    """What can be carried out by name.

    Attributes:
        steps: Name -> function; its arguments are trees of tensors and JSON values.
    """

    steps: Mapping[str, Callable[..., Any]]

    def build(self) -> None:
        """Load the model, once."""


class RankSteps:
    """Carries steps out on all ranks; on the only one, where there are no others."""

    def __init__(self) -> None:
        self._between = True

    def run(self, steps: Steps, name: str, *, here: Mapping[str, Any] | None = None, **arguments: Any) -> Any:
        """Carry out a step on all ranks. Called by rank 0.

        Args:
            steps: Of rank 0.
            name: Which one.
            here: Arguments of rank 0 alone; the others go without.
            arguments: Of all.

        Returns:
            What it gave on rank 0.

        Raises:
            UserError: A rank refused.
            Stopped: Another rank has ended.
        """
        own = {**arguments, **(here or {})}
        if ranks() == 1:
            return steps.steps[name](**own)
        self._between = False
        with _stopped_with_the_others():
            tree_from_first({"step": name, "arguments": arguments})
            return self._agreed(lambda: steps.steps[name](**own))

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Around all that rank 0 does: the others end when it does."""
        try:
            yield
        finally:
            # In the middle of a step the others wait for something else; they end when this process does.
            if ranks() > 1 and self._between:
                with _stopped_with_the_others():
                    tree_from_first({"step": _END})

    def follow(self, make: Callable[[], Steps]) -> None:
        """What every other rank does: carry out what rank 0 tells, until it tells the end.

        Args:
            make: Checks and makes the steps. A refusal waits until there is something to do: rank 0 finds the same.

        Raises:
            SystemExit: Rank 0 has ended in the middle of a step, or a signal came. It has told the user why.
        """
        steps: Steps | None = None
        refusal: UserError | None = None
        try:
            steps = make()
        except UserError as error:
            refusal = error

        def carry_out(told: Mapping[str, Any]) -> None:
            if steps is None:
                assert refusal is not None
                raise refusal
            steps.build()
            steps.steps[told["step"]](**told["arguments"])

        try:
            with _stopped_with_the_others():
                while (told := tree_from_first(None))["step"] != _END:
                    with suppress(UserError):  # rank 0 raises it, too
                        self._agreed(partial(carry_out, told))
        except Stopped as stopped:
            raise SystemExit(EXIT_SIGNAL) from stopped

    def _agreed(self, step: Callable[[], Any]) -> Any:
        """Carry out a step; where one rank refuses, all do."""
        refusal, result = None, None
        with together():
            try:
                result = step()
            except UserError as error:
                refusal = error
        said = None if refusal is None else {"got": refusal.got, "why": refusal.why, "fix": refusal.fix}
        refused = [(i, what) for i, what in enumerate(gather_facts(said)) if what is not None]
        self._between = True
        if refusal is not None:
            raise refusal
        for i, what in refused:
            raise UserError(f"rank {i}: {what['got']}", why=what["why"], fix=what["fix"])
        return result


@contextmanager
def _stopped_with_the_others() -> Iterator[None]:
    """A connection that breaks means that another rank has ended: as if by a signal, the same command goes on."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, dist.DistError) or "gloo" in str(error):
            raise Stopped(f"the end of another rank (rank {rank()} lost it)") from error
        raise

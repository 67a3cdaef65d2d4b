"""A view that cannot fail the run it watches: a closed pipe, an encoding without a glyph, a tracker that is gone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback

from residency.core.errors import UserError
from residency.core.types import Stage
from residency.runs.views.base import RunInfo, View

__all__ = ["GuardedView"]


class GuardedView(View):
    """Passes everything on; after the first failure, which is told once, nothing more.

    Mistakes of the user are not failures of the view: a `UserError` goes through, before anything is trained.

    Args:
        view: What shows the run.
    """

    def __init__(self, view: View) -> None:
        self.view = view
        self.keeps = view.keeps
        self._failed = False

    @property
    def name(self) -> str:
        """That of the view."""
        return self.view.name

    def is_there(self) -> bool:
        """See `View`."""
        return bool(self._guard(self.view.is_there))

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        """See `View`."""
        self._guard(self.view.start, info, history, rows)

    def data(self, checked: Mapping[str, Any]) -> None:
        """See `View`."""
        self._guard(self.view.data, checked)

    def callbacks(self, info: RunInfo, stage: Stage) -> list[Callback]:
        """See `View`."""
        return self._guard(self.view.callbacks, info, stage) or []

    def step(self, line: Mapping[str, Any]) -> None:
        """See `View`."""
        self._guard(self.view.step, line)

    @contextmanager
    def evaluating(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """See `View`."""
        context = self.view.evaluating(title, total)
        advance = self._guard(context.__enter__)

        def guarded(column: str, rows: int) -> None:
            if advance is not None:
                self._guard(advance, column, rows)

        try:
            yield guarded
        finally:
            if advance is not None:
                self._guard(context.__exit__, None, None, None)

    def row(self, k: int, means: Mapping[str, Mapping[str, float]]) -> None:
        """See `View`."""
        self._guard(self.view.row, k, means)

    def finish(self, record: Mapping[str, Any]) -> None:
        """See `View`."""
        self._guard(self.view.finish, record)

    def fail(self, error: BaseException) -> None:
        """See `View`."""
        self._guard(self.view.fail, error)

    def _guard(self, call: Callable[..., Any], *arguments: Any) -> Any:
        if self._failed:
            return None
        try:
            return call(*arguments)
        except UserError:
            raise
        except Exception as error:  # whatever a terminal or a tracker raises: the record is the truth
            self._failed, self.keeps = True, False
            what = f"{self.name} failed and is left out from now on ({type(error).__name__}: {error})"
            with contextlib.suppress(Exception):
                print(f"residency: {what}; the run goes on, its record is complete", file=sys.stderr)
            return None

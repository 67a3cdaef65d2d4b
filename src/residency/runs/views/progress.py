"""What is going on right now: one live line on a terminal, a few plain lines in a log.

Everything goes to standard error. Nothing is measured per step but time and token counts that are known without the
device; the loss is read only when a line is drawn, so watching does not slow training down.
"""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

from residency.core.text import printable
from residency.core.types import untyped

__all__ = ["StageProgress", "clock_time", "evaluation_progress", "no_terminal"]

LIVE_SECONDS, PLAIN_SECONDS = 0.25, 10.0
# Speed is that of the last so many drawn lines: a slow first step does not spoil the estimate for long.
WINDOW = 60


class StageProgress(Callback):
    """Progress of one stage: cell, stage, domain, step, loss, tokens per second, time left.

    A plain callback, because a Trainer with `enable_progress_bar=False` refuses subclasses of Lightning's
    `ProgressBar`; with `enable_progress_bar=True` Lightning's own bar is silenced.

    Args:
        stage: Which stage, from 1.
        stages: How many there are.
        domain: Name of the domain being learned.
        cell: Name of the run.
        plain: Lines instead of a live line; `None` = where standard output or standard error is no terminal.
        console: Where to draw; standard error by default.
    """

    def __init__(
        self,
        *,
        stage: int,
        stages: int,
        domain: str,
        cell: str,
        plain: bool | None = None,
        console: Console | None = None,
    ) -> None:
        self.title = f"{printable(cell, 24)}  {stage}/{stages}  {printable(domain, 24)}"
        self._line = _Line(title=self.title, unit="steps", plain=plain, console=console)
        self._tokens = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Silence Lightning's own bar, and this one on all ranks but the first."""
        for callback in untyped(trainer).callbacks:
            if isinstance(callback, ProgressBar):
                callback.disable()
        self._line.silent = not trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The first line; a resumed stage starts where it was."""
        self._line.start(done=trainer.global_step, total=_steps(trainer))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count tokens; draw if it is time."""
        self._tokens += batch.tokens * trainer.world_size
        if self._line.due():
            self._line.draw(trainer.global_step, tokens=self._tokens, loss=_loss(trainer))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The last line stays."""
        self._line.draw(trainer.global_step, tokens=self._tokens, loss=_loss(trainer), last=True)
        self._line.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._line.close()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the terminal back."""
        self._line.close()


@contextmanager
def evaluation_progress(
    title: str, total: int, *, plain: bool | None = None, console: Console | None = None
) -> Iterator[Callable[[int], None]]:
    """Progress of an evaluation, outside of a fit.

    Args:
        title: What is evaluated, such as "after medical".
        total: How many rows.
        plain: As in `StageProgress`.
        console: As in `StageProgress`.

    Yields:
        `advance(n)`: n more rows are done.
    """
    line = _Line(title=f"scoring {printable(title, 40)}", unit="rows", plain=plain, console=console)
    done = 0

    def advance(n: int) -> None:
        nonlocal done
        done += n
        if line.due():
            line.draw(done)

    line.start(done=0, total=total)
    try:
        yield advance
        line.draw(done, last=True)
    finally:
        line.close()


class _Line:
    """Draws `done` of `total`, at most so often, live or plain.

    Args:
        title: What is going on, printable.
        unit: What is counted.
        plain: Lines instead of a live line; `None` = find out.
        console: Where to draw.
    """

    def __init__(self, *, title: str, unit: str, plain: bool | None, console: Console | None) -> None:
        self.title = title
        self.unit = unit
        self.plain = no_terminal() if plain is None else plain
        self.console = console or Console(stderr=True)
        self.silent = False
        self._live: Progress | None = None
        self._total: int | None = None
        self._drawn = 0.0
        self._first = (0.0, 0, 0)  # time, done, tokens
        self._window: deque[tuple[float, int, int]] = deque(maxlen=WINDOW)

    def start(self, *, done: int, total: int | None) -> None:
        """Begin at `done`; `total` is `None` where nobody knows."""
        self._total = total
        self._drawn = time.monotonic()
        self._first = (self._drawn, done, 0)
        self._window.append(self._first)
        with self._harmless():
            if self.plain:
                first = f", from {done}" if done else ""
                self._print(f"{self.title}: {_count(total)} {self.unit}{first}")
            elif not self.silent:
                self._live = _live_line(self.console)
                self._live.start()
                self._live.add_task(self.title, total=total, completed=done, facts="")
                self._live.refresh()

    def due(self) -> bool:
        """Whether enough time has passed since the last line."""
        return time.monotonic() - self._drawn >= (PLAIN_SECONDS if self.plain else LIVE_SECONDS)

    def draw(self, done: int, *, tokens: int = 0, loss: float | None = None, last: bool = False) -> None:
        """Show where things stand; `last` shows how long it took instead of how long it will take."""
        if self.silent:
            return
        self._drawn = time.monotonic()
        self._window.append((self._drawn, done, tokens))
        facts = self._facts(done, loss, last)
        with self._harmless():
            if self._live is not None:
                self._live.update(self._live.task_ids[0], completed=done, facts=facts, refresh=True)
            elif self.plain:
                share = f" ({done / self._total:.0%})" if self._total else ""
                self._print(f"{self.title}: {done:,}/{_count(self._total)} {self.unit}{share}  {facts}")

    def _facts(self, done: int, loss: float | None, last: bool) -> str:
        before, now = self._first if last else self._window[0], self._window[-1]
        seconds = max(now[0] - before[0], 1e-9)
        speed, tokens = (now[1] - before[1]) / seconds, (now[2] - before[2]) / seconds
        facts = [] if loss is None else [f"loss {loss:.3f}"]
        facts += [f"{tokens:,.0f} tokens/s"] if tokens else []
        if last:
            facts.append(f"in {clock_time(seconds)}")
        elif self._total is not None and speed > 0:
            facts.append(f"{clock_time((self._total - done) / speed)} left")
        return "  ".join(facts)

    def close(self) -> None:
        """Leave the terminal as it was; may be called again."""
        live, self._live = self._live, None
        with self._harmless():
            if live is not None:
                live.stop()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """A terminal that is gone, or cannot show a letter, ends the display and not the training."""
        try:
            yield
        except (OSError, ValueError):
            self.silent, self._live = True, None

    def _print(self, text: str) -> None:
        if not self.silent:
            self.console.print(Text(text), soft_wrap=True)


def _live_line(console: Console) -> Progress:
    def text(template: str) -> TextColumn:
        return TextColumn(template, markup=False, table_column=Column(no_wrap=True, overflow="ellipsis"))

    return Progress(
        text("{task.description}"),
        BarColumn(bar_width=None, complete_style="#0072B2", finished_style="#0072B2"),
        text("{task.completed}/{task.total}"),
        text("{task.fields[facts]}"),
        console=console,
        auto_refresh=False,
        expand=True,
    )


def no_terminal() -> bool:
    """Whether lines should be written instead of a live display."""
    # Asked directly: with FORCE_COLOR rich takes a file for a terminal, and a log would fill with cursor movements.
    return not (sys.stdout.isatty() and sys.stderr.isatty()) or Console(stderr=True).is_dumb_terminal


def _loss(trainer: Trainer) -> float | None:
    value = trainer.callback_metrics.get("loss")
    return None if value is None else float(value)


def _steps(trainer: Trainer) -> int | None:
    """Optimizer steps of a fit, `None` if it has no such end."""
    limits = [float(trainer.max_steps)] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0:
        per_epoch = math.inf
        if math.isfinite(trainer.num_training_batches):
            per_epoch = math.ceil(trainer.num_training_batches / trainer.accumulate_grad_batches)
        limits.append(per_epoch * trainer.max_epochs)
    known = [limit for limit in limits if math.isfinite(limit)]
    return int(min(known)) if known else None


def _count(total: int | None) -> str:
    return "?" if total is None else f"{total:,}"


def clock_time(seconds: float) -> str:
    """Seconds as m:ss, or h:mm:ss."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}" if minutes >= 60 else f"{minutes}:{rest:02}"

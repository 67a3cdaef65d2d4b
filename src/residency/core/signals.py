"""Ctrl-C, SIGTERM and a closed terminal end a command cleanly: what is complete stays, the same command goes on."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

__all__ = ["Stopped", "stop_on_signals"]


class Stopped(BaseException):
    """A signal asked the command to stop (not an `Exception`: nothing shall swallow it)."""


@contextmanager
def stop_on_signals() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Stopped` inside the block; a second one is left to Python.

    A signal that is ignored stays so: `nohup` asks for just that.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(number, previous[number])
        raise Stopped(signal.Signals(number).name)

    previous: dict[int, Any] = {}
    for watched in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(watched) is not signal.SIG_IGN:
            previous[watched] = signal.signal(watched, stop)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)

"""The one entry point of a worker: a task's spec in, an exit code out, everything else through the store."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from residency.core.errors import EXIT_DONE, EXIT_SIGNAL, EXIT_USER, UserError
from residency.core.signals import Stopped, stop_on_signals
from residency.core.tensor_files import explained, read_json
from residency.domains.base import Domain
from residency.domains.left_out import LeftOut
from residency.domains.stream_data import StreamData
from residency.engine.scoring.row_scores import means
from residency.inspection import Inspection
from residency.runs.stage_cache import StageCache
from residency.runs.store.store import Store
from residency.runs.views.base import View
from residency.runs.views.trackers import Tracker

__all__ = ["EXIT_BUG", "EXIT_MEMORY", "main", "read_status", "run_task"]

EXIT_BUG = 1
EXIT_MEMORY = 71
"""Out of memory: worth another try with the machine to itself."""
_SECONDS = 0.5  # between two writes of the status


def run_task(spec: Mapping[str, Any]) -> int:
    """Carry a task out in this process.

    Args:
        spec: `Task.spec`:
            words: Command line of `residency fit` without the verb; names run folder and store.
            until: Bring the state after this stage into the store (0 = none, only scores); `None` = put the run's
                folder together.
            evaluate: Whether that state is scored, too.
            status: File in which progress and errors are told.
            rows: {key of a domain's config: `rows_facts` of it}; what is not named is read anew.
            threads: Threads to compute with; `None` = as the process does.

    Returns:
        0 done · 2 the user can mend it · 71 out of memory · 75 stopped by a signal · 1 anything else. What is to be
        told to the user lies in the file `spec["status"]`: {"phase", "step", "steps", "message", "means"}.
    """
    status = _Status(Path(spec["status"]))
    try:
        with stop_on_signals():
            _carry_out(spec, status)
        return EXIT_DONE
    except Stopped:
        return EXIT_SIGNAL
    except UserError as error:
        return status.failed(EXIT_USER, str(error))
    except (MemoryError, torch.OutOfMemoryError) as error:
        return status.failed(EXIT_MEMORY, " ".join(str(error).split())[:300] or "out of memory")
    except OSError as error:
        told = explained(error, Path(error.filename or spec["status"]))
        if isinstance(told, UserError):
            return status.failed(EXIT_USER, str(told))
        return _bug(status, error)
    except Exception as error:
        return _bug(status, error)


def _bug(status: _Status, error: Exception) -> int:
    traceback.print_exc()
    return status.failed(EXIT_BUG, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _carry_out(spec: Mapping[str, Any], status: _Status) -> None:
    from residency.runs.cli import parse
    from residency.runs.stream import open_stage_cache, train_stream
    from residency.runs.views.lightning_loggers import LoggerView

    if spec.get("threads"):
        torch.set_num_threads(int(spec["threads"]))
    cli = parse(["fit", *spec["words"]])
    store = Store(cli.settings.store) if cli.settings.store else None
    if store is not None:
        take_rows(cli.datamodule, cli.resolved, spec.get("rows") or {}, store)
    until = spec.get("until")
    if until is None:
        train_stream(
            module=cli.model,
            data=cli.datamodule,
            trainers=cli.trainers,
            settings=cli.settings,
            config=cli.resolved,
            folder=cli.folder,
            views=[status, cli.tracker(), LoggerView()],
            inspection=Inspection(cli.option("inspection")),
        )
        return
    tracker = cli.tracker()
    stage_cache = open_stage_cache(
        module=cli.model,
        data=cli.datamodule,
        trainers=cli.trainers,
        settings=cli.settings,
        config=cli.resolved,
        views=[status, tracker],
        inspection=Inspection(cli.option("inspection")),
    )
    try:
        _make_stage(stage_cache, until, tracker, status, evaluate=spec.get("evaluate", True))
    except BaseException as error:
        tracker.fail(error)
        raise
    tracker.release()


def _make_stage(stage_cache: StageCache, until: int, tracker: Tracker, status: _Status, *, evaluate: bool) -> None:
    if until:
        stage_cache.finished(until)
        # Scoring takes a while, in which the next stage's process may begin to write.
        tracker.release()
    if evaluate:
        scores, _ = stage_cache.scores(until)
        found = means(scores)
        status.write(phase="scored", means=found)
        tracker.row(until, found)


def domain_key(config: Mapping[str, Any], domain: Mapping[str, Any]) -> str:
    """What the config says of a domain: two that are equal are read once.

    Args:
        config: Of the run, resolved.
        domain: The domain's part of it.
    """
    data = config["data"]
    shared: dict[str, Any] = {key: data.get(key) for key in ("root", "max_train", "max_validation", "max_test")}
    if _augments(domain):
        # Which rows are made depends on the model that writes them and on all rows that the stream scores.
        shared |= {key: data.get(key) for key in ("domains", "probes")} | {"backbone": config["model"]["backbone"]}
    return json.dumps([shared, domain], sort_keys=True)


def _augments(part: Any) -> bool:
    """Whether something that a config says of a domain, or of a part of it, asks for further training rows."""
    if not isinstance(part, Mapping):
        return False
    return bool(part.get("augment")) or any(map(_augments, part.values()))


def rows_of(data: StreamData, config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """(key of its config, domain) of every domain and probe; `config` is that of the run."""
    for part, domains in (("domains", data.domains), ("probes", data.probes)):
        for name, domain in domains.items():
            yield domain_key(config, config["data"][part][name]), domain


def rows_facts(domain: Domain) -> list[Any]:
    """What `take_rows` tells a worker of a domain: the key of its rows in the store, and how they came about."""
    return [domain.fingerprint(), domain.given, [one.plain() for one in domain.unread], domain.augmented]


def take_rows(data: StreamData, config: Mapping[str, Any], rows: Mapping[str, Any], store: Store) -> None:
    """Give domains the rows that were read when the study was planned: reading takes seconds, and files change.

    Args:
        data: Its domains.
        config: Of the run, resolved.
        rows: {key of a domain's config: `rows_facts` of it}.
        store: Where the rows lie.
    """
    for key, domain in rows_of(data, config):
        fingerprint, given, unread, *made = rows.get(key, (None, {}, []))
        entry = store.find("data", fingerprint) if fingerprint else None
        if entry is not None:
            domain.take_rows(read_json(entry.path / "rows.json"))
            domain.given = dict(given)
            domain.unread = [LeftOut(**one) for one in unread]
            domain.augmented = made[0] if made else []


class _Status(View):
    """Tells the scheduler, through a file, how far a task is."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._steps: int = 0
        self._last = 0.0

    def write(self, **told: Any) -> None:
        """Replace the file; losing it loses nothing."""
        temporary = self.path.with_name(f".{self.path.name}.{os.getpid()}.tmp")
        with suppress(OSError):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(told), encoding="utf-8")
            os.replace(temporary, self.path)

    def failed(self, code: int, message: str) -> int:
        """Keep why the task ended; the code again."""
        print(message, file=sys.stderr)
        self.write(phase="failed", message=message)
        return code

    def _due(self) -> bool:
        now = time.monotonic()
        if now - self._last < _SECONDS:
            return False
        self._last = now
        return True

    def callbacks(self, info: Any, stage: Any) -> list[Any]:
        """No callback; the number of steps is remembered."""
        self._steps = stage.steps
        return []

    def step(self, line: Mapping[str, Any]) -> None:
        """A line of the history."""
        if self._due():
            self.write(phase="training", step=line["step"], steps=self._steps)

    @contextmanager
    def evaluating(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """Rows that are scored."""
        done = 0

        def advance(column: str, rows: int) -> None:
            nonlocal done
            done += rows
            if self._due():
                self.write(phase="scoring", step=done, steps=total)

        yield advance


def read_status(path: Path) -> dict[str, Any]:
    """What a task tells; `{}` if nothing."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def main(words: list[str]) -> int:
    """`python -m residency.study.worker SPEC.json`: a task with a command line of its own, as DDP needs it."""
    return run_task(json.loads(Path(words[0]).read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What the user sees of a run: progress, the score matrix, where the files are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from residency.core.text import for_terminal
from residency.core.types import Stage
from residency.domains.left_out import told as left_out_lines
from residency.runs.augmentation import lines as augmented_lines
from residency.runs.data_check import told
from residency.runs.views.base import RunInfo, View
from residency.runs.views.progress import StageProgress, evaluation_progress
from residency.runs.views.tables import printable, score_table

__all__ = ["ConsoleView", "show_complete", "show_export", "show_predictions", "show_scores"]


class ConsoleView(View):
    """A run on the terminal.

    Args:
        folder: The run's folder, named at the end; the heat map is written there.
        console: Where to print; standard output by default.
    """

    keeps = True

    def __init__(self, *, folder: Path, console: Console | None = None) -> None:
        self.folder = folder
        self.console = console or Console()
        self._told: set[str] = set()

    def is_there(self) -> bool:
        """Whether the heat map is."""
        return all((self.folder / f"nll.{ending}").is_file() for ending in ("png", "svg"))

    def start(self, info: RunInfo, history: list[dict[str, Any]], rows: list[Mapping[str, Any]]) -> None:
        """One line on what runs."""
        share = info.trainable / info.total
        stream = " → ".join(escape(printable(name)) for name in info.domains)
        self.console.print(f"[bold]{escape(printable(info.cell))}[/bold]  {stream}  (seed {info.seed})")
        self.console.print(
            f"  {info.trainable:,} of {info.total:,} parameters move ({share:.2%}); batches {escape(info.layout)}"
        )
        for line in info.stages:
            self.console.print(f"  {escape(printable(line, 300))}", highlight=False)
        for name, size in info.growth.items():
            self.console.print(
                f"  [yellow]{escape(printable(name))}[/yellow] keeps {size / 1e6:,.2f} MB more after every stage, "
                f"{size * len(info.domains) / 1e6:,.2f} MB in the end; the file of every stage holds all of it so far"
            )
        for line in info.notices:
            self.console.print(f"  [yellow]Note:[/yellow] {escape(printable(line, 300))}", highlight=False)
        if info.resumed:
            self.console.print(f"  going on after stage {info.resumed} of {len(info.domains)}")

    def data(self, checked: Mapping[str, Any]) -> None:
        """Rows that were made, rows and tokens that are left out, and what is wrong."""
        for line in augmented_lines(checked.get("augmented", {})):
            self.console.print(f"  {escape(printable(line, 300))}", highlight=False, soft_wrap=True)
        self._tell(checked.get("left_out", ()))
        for line in told(checked):
            self.console.print(f"  {escape(printable(line, 300))}", style="yellow", soft_wrap=True)

    def _tell(self, left_out: Iterable[Mapping[str, Any]]) -> None:
        """What takes no part, each sentence once for all columns of which it is true."""
        for line in left_out_lines(left_out):
            if line not in self._told:
                self._told.add(line)
                self.console.print(f"  {escape(printable(line, 300))}", highlight=False, soft_wrap=True)

    def callbacks(self, info: RunInfo, stage: Stage) -> list[Callback]:
        """The progress line of a stage."""
        return [StageProgress(stage=stage.index + 1, stages=stage.stages, domain=stage.domain, cell=info.cell)]

    @contextmanager
    def evaluating(self, title: str, total: int) -> Iterator[Callable[[str, int], None]]:
        """The progress line of an evaluation."""
        with evaluation_progress(title, total) as advance:
            yield lambda column, rows: advance(rows)

    def finish(self, record: Mapping[str, Any]) -> None:
        """What was left out, matrix, heat map, pointer."""
        from residency.runs.views.heatmap import heat_map, save  # charts take a quarter of a second to import

        self._tell((record.get("data") or {}).get("left_out", ()))
        scorer = "nll" if "nll" in record["scores"] else next(iter(record["scores"]), None)
        if scorer is not None:
            self.console.print(score_table(record, scorer))
        for path in save(heat_map(record, scorer), self.folder / scorer) if scorer is not None else ():
            self.console.print(f"  heat map: {escape(for_terminal(path))}")
        cost = record["cost"]
        self.console.print(
            f"  {cost['seconds'] - cost['evaluation_seconds']:.0f} s training, its steps at "
            f"{cost['tokens_per_second'] or 0:.0f} tokens/s, "
            f"{cost['evaluation_seconds']:.0f} s scoring, peak memory {cost['peak_memory_bytes'] / 2**30:.2f} GiB"
        )
        self.console.print(f"  record: {escape(for_terminal(self.folder / 'results.json'))}")


def show_complete(folder: Path, console: Console | None = None) -> None:
    """Say that there was nothing to do."""
    record = escape(for_terminal(folder / "results.json"))
    (console or Console()).print(f"complete, nothing to train; record: {record}")


def show_scores(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print {"stage", "split", "means"} as a table."""
    table = Table(title=f"stage {found['stage']}, {found['split']} rows")
    columns = list(dict.fromkeys(name for means in found["means"].values() for name in means))
    table.add_column("score")
    for name in columns:
        table.add_column(escape(printable(name)), justify="right")
    for scorer, means in found["means"].items():
        table.add_row(scorer, *(f"{means[c]:.4f}" if c in means else "-" for c in columns))
    (console or Console()).print(table)


def show_predictions(rows: Sequence[Mapping[str, str]], console: Console | None = None) -> None:
    """Print prompts, references and what the model wrote."""
    table = Table(show_lines=True)
    for title in ("prompt", "reference", "written"):
        table.add_column(title, overflow="fold")
    for row in rows:
        table.add_row(*(escape(for_terminal(row[key])) for key in ("prompt", "completion", "written")))
    (console or Console()).print(table)


def show_export(found: Mapping[str, Any], console: Console | None = None) -> None:
    """Print where an export lies, and what merging has cost: row of the score matrix, merged, and the difference."""
    console = console or Console()
    if found["merged"]:
        table = Table(title="merge tax: merged minus unmerged")
        for title in ("score", "domain", "unmerged", "merged", "difference"):
            table.add_column(title, justify="left" if title in ("score", "domain") else "right")
        for scorer, tax in found["merge_tax"].items():
            for column, change in tax.items():
                old = found["scores"][scorer][column]
                shown = f"{change:+.1e}" if change else "0"
                table.add_row(scorer, escape(printable(column)), f"{old:.4f}", f"{old + change:.4f}", shown)
        console.print(table)
    console.print(
        f"stage {found['stage']} ({escape(printable(found['domain']))}): {escape(for_terminal(found['path']))}"
    )

"""A domain from your own files, whatever their format."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import asdict
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from residency.core.errors import UserError
from residency.core.types import Row, Split
from residency.domains.base import Domain, Kind, hash_order, split_by_group
from residency.domains.kept_rows import check_limits, keep_rows
from residency.domains.left_out import LeftOut
from residency.domains.readers.arrow_tables import is_saved_dataset, read_hub, read_saved_dataset
from residency.domains.readers.columns import LOOKED_AT, check_columns, infer_format, rename
from residency.domains.readers.containers import read_file, split_files
from residency.domains.readers.formats import LABELS, Format, RowMaker
from residency.domains.readers.published import olora_records, superni_records
from residency.domains.readers.records import FileOptions, Records
from residency.domains.readers.streams import stream_file
from residency.domains.readers.turns import split_into_turns
from residency.domains.readers.unread import UnreadColumns, of_blanks, of_files, of_task, of_twin
from residency.domains.streamed_rows import StreamedRows, stream_key, streamed_rows
from residency.domains.template import Template

__all__ = ["Table"]

_AT_ONCE = 100  # records of a stream that are held beside the rows that are kept


class Table(Domain):
    """Rows from JSON Lines, JSON, CSV, TSV, Parquet or Arrow files, a folder of them, or a data set of the hub.

    All rows and all their tokens are used unless you say otherwise, and what is left out is counted. The format of the
    rows is known by their columns: `prompt` and `completion`; `messages` (with `tools`); `text`; `instruction`, `input`
    and `output` (Alpaca); `conversations` (ShareGPT); `prompt`, `chosen` and `rejected`; the same with one completion
    and a `label` that is true or false; `text` and `label`; `prompt` alone. Folders may also be those of TRACE, O-LoRA
    and Natural Instructions. `id`, `group` (rows of one group stay in one split), `weight` and `references` (further
    right answers) are optional columns. The order of the rows does not matter.

    Args:
        train: File of the training rows.
        test: File of the test rows; null takes a tenth of the groups of `train`.
        validation: File of the validation rows; null takes a tenth of the groups of `train`.
        path: Instead of files: a folder with a file per split (`train*`, `validation*`, `test*`), one written by
            `save_to_disk`, or a hub id.
        format: What the rows are, where their columns allow more than one reading.
        kind: `label` if the completions are a closed set of classes, else `generative`; null = as the format says.
        columns: Our names of columns and what the file calls them, such as {prompt: question, completion: answer}.
        labels: Names of the classes where labels are numbers, in order.
        files: How files are read, where their names do not tell.
        strip: Whether blanks around completions are removed; code needs them.
        split_turns: Make a row of every answer of a conversation, with what came before it as its prompt.
        streaming: For training sets that are larger than memory: go through the file once and hold only the rows that
            `max_train` keeps. They are the rows that are kept without it, and all are counted. Splits that are drawn
            from the training file need their limits as well; what is no JSON document can be streamed.

    Raises:
        UserError: On reading: a file or a row is not as described; the message names file and line.
    """

    licence = "not stated"
    attribution = "data given by the user"
    default_template: ClassVar[Template] = Template(tokenise="apart")

    def __init__(
        self,
        *,
        train: str | None = None,
        test: str | None = None,
        validation: str | None = None,
        path: str | None = None,
        format: Format | None = None,
        kind: Kind | None = None,
        columns: dict[str, str] | None = None,
        labels: list[str] | None = None,
        files: FileOptions | None = None,
        strip: bool = True,
        split_turns: bool = False,
        streaming: bool = False,
        max_train: int | None = None,
        max_validation: int | None = None,
        max_test: int | None = None,
        **options: Any,
    ) -> None:
        if (train is None) == (path is None):
            raise UserError(
                f"a table with train: {train} and path: {path}",
                why="its rows come from files, one per split, or from one folder or hub id",
                fix="give train (and test, validation), or give path",
            )
        super().__init__(max_train=max_train, max_validation=max_validation, max_test=max_test, **options)
        self.source = str(train or path)
        self.train, self.test, self.validation, self.path = train, test, validation, path
        self.format = format
        self.columns = dict(columns or {})
        self.class_names = list(labels or [])
        self.files = files or FileOptions()
        self.strip = strip
        self.split_turns, self.streaming = split_turns, streaming
        self._counted: dict[Split, int] = {}
        if kind is not None:
            self.kind = kind

    @cached_property
    def kind(self) -> Kind:  # type: ignore[override]
        """`label` if the rows are labelled."""
        first = self.rows("train", checked=False)[:1]
        return "label" if any(row.kind == "labelled" for row in first) else "generative"

    def under(self, root: Path) -> Domain:
        """The same table with its relative paths taken from a folder.

        A copy may be flatter than its authors' (`agnews` instead of `TC/agnews`): where the whole path leads nowhere,
        its last part counts.
        """
        moved = copy(self)
        for name in ("train", "validation", "test", "path"):
            given = getattr(self, name)
            if given is not None:
                whole, last = root / given, root / Path(given).name
                setattr(moved, name, str(last if last.exists() and not whole.exists() else whole))
        moved.source = str(moved.train or moved.path)
        return moved

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """Rows of the files, in hash order; of a stream, those that the limits keep."""
        if self.streaming:
            found = streamed_rows(self._stream_key(), self._streamed)
            self.unread, self._counted = [*found.unread], {**found.given}
            return found.rows
        self.unread, columns = [], UnreadColumns()
        rows = {split: list(self._rows_of(split, part, columns)) for split, part in self._records().items()}
        self._leave([columns.left_out()])
        validation, test = (0.0 if split in rows else 0.1 for split in ("validation", "test"))
        carved = split_by_group(rows.pop("train"), validation=validation, test=test)
        return {**carved, **{split: hash_order(part) for split, part in rows.items()}}

    def _streamed(self) -> StreamedRows:
        self.unread, columns = [], UnreadColumns()
        found = self._records()
        check_limits(self.limits, found)
        kept = keep_rows({s: self._rows_of(s, part, columns) for s, part in found.items()}, self.limits)
        self._leave([columns.left_out()])
        rows, given = {s: one.rows() for s, one in kept.items()}, {s: one.added for s, one in kept.items()}
        return StreamedRows(rows=rows, given=given, unread=self.unread)

    def _stream_key(self) -> str | None:
        """Of the files and of how they are read; `None` of a hub id, whose copy on disk is not ours to look at."""
        names = {split: getattr(self, split) for split in ("train", "validation", "test")}
        paths = [Path(name).expanduser() for name in names.values() if name is not None]
        if self.path is not None:
            folder = Path(self.path).expanduser()
            if not folder.is_dir():
                return None
            paths = [path for path in folder.rglob("*") if path.is_file()]
        how = [self.format, self.columns, self.class_names, asdict(self.files), self.strip, self.split_turns]
        return stream_key(paths, [names, self.path, how, self.limits])

    def count_given(self, splits: Mapping[Split, Sequence[Row]]) -> dict[Split, int]:
        """Rows there are before the limits, also of a stream."""
        return super().count_given(splits) | (self._counted if self.streaming else {})

    def _records(self) -> dict[Split, Records]:
        if self.path is None:
            named: dict[Split, str | None] = {"train": self.train, "validation": self.validation, "test": self.test}
            return {split: self._file(split, name) for split, name in named.items() if name is not None}
        folder = Path(self.path).expanduser()
        if not folder.exists():
            return read_hub(self.path, self.files, streaming=self.streaming)
        if is_saved_dataset(folder):
            return read_saved_dataset(folder, streaming=self.streaming)
        if not folder.is_dir():
            raise UserError(
                f"path: {self.path!r} is a file",
                why="a path is a folder with a file per split, or a hub id",
                fix="give the file as train: (a tenth of it each becomes validation and test)",
            )
        names = split_files(folder)
        self._leave(of_files(folder, names.values()))
        found = {split: self._file(split, name) for split, name in names.items()}
        documents = [found[split].document for split in ("validation", "test") if split in found]
        if len(documents) == 2 and documents[0] is not None and documents[0] == documents[1]:
            # As SAPT publishes them: dev.json is test.json, and choosing on it would be choosing on the test.
            instances = (found.pop("validation").document or {}).get("Instances")
            self._leave([of_twin("validation", len(instances) if isinstance(instances, list) else 1)])
        if not (folder / "labels.json").is_file():
            return found
        if self.streaming:
            raise UserError(
                f"streaming: true, and {self.path!r} is a folder of O-LoRA (labels.json)",
                why="its files are read as a whole",
                fix="leave streaming out; if it is no such folder, remove labels.json",
            )
        if "validation" in found:
            self._leave([of_twin("validation", len(list(found["validation"].rows)))])
        return olora_records(folder, found)

    def _file(self, split: Split, name: str) -> Records:
        # Test and validation rows are few.
        return (stream_file if self.streaming and split == "train" else read_file)(name, split, self.files)

    def _leave(self, found: Iterable[LeftOut]) -> None:
        """Keep what is left out of the files."""
        self.unread += [one for one in found if one.count]

    def _rows_of(self, split: Split, records: Records, columns: UnreadColumns) -> Iterator[Row]:
        if records.document is not None:
            self._leave(of_task(split, records.document))
            records = superni_records(records.document, f"{split} of {self.source}")
        left = iter(records.rows)
        first = list(islice(left, LOOKED_AT))
        check_columns(first, self.columns)
        chosen = self.format or infer_format(rename(first, self.columns), f"{split} of {self.source}")
        ours = {theirs: our for our, theirs in self.columns.items()}
        named = {ours.get(column, column): list(names) for column, names in records.class_names.items()}
        names = self.class_names or next((named[column] for column in LABELS if column in named), [])
        maker = RowMaker(format=chosen, prefix=split, strip=self.strip, class_names=names)
        rows = stripped = 0
        while first:
            these, first = rename(first, self.columns), list(islice(left, _AT_ONCE))
            made = [maker.row(record) for record in these]
            columns.look(chosen, these)
            rows, stripped = rows + len(made), stripped + len(maker.stripped)
            maker.stripped.clear()
            yield from split_into_turns(made) if self.split_turns else made
        self._leave([of_blanks(split, stripped, rows)])

"""Scores of SQL: that it parses, and that it gives the rows that the reference query gives."""

from __future__ import annotations

import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, Scorer, references
from residency.scorers.structure import Fences, without_fences

__all__ = ["SqlExecution", "SqlValid", "run_query"]

_ROOTS = ("Select", "Union", "Intersect", "Except", "With", "Insert", "Update", "Delete", "Create")
_READING = (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE)
_TICK = 10_000  # instructions of SQLite's machine between two looks at the limit
_CELLS = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SqlValid(Scorer):
    """Whether every statement of the answer parses (sqlglot) and is a statement that a database would run.

    A parse alone is worth nothing: sqlglot takes "hello world" for an alias and "Paris" for a column.

    Args:
        dialect: Of sqlglot, such as `sqlite`, `postgres`, `mysql`; empty for its own mixture.
        roots: Kinds of statements that count.
        fences: `strip`: read what stands in a Markdown code block.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"sql_valid": {}}
    unit: ClassVar[str] = "share of answers that are SQL"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ("sqlglot",)

    dialect: str = "sqlite"
    roots: tuple[str, ...] = _ROOTS
    fences: Fences = "strip"

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        return [float(self._valid(answer.text or "")) for answer in answers]

    def check(self, rows: Sequence[Row]) -> None:
        """The references are SQL; else the dialect is wrong.

        Raises:
            UserError: Naming a completion that does not parse, or the missing package.
        """
        bad = [row for row in rows if not self._valid(row.completion)]
        if bad:
            raise UserError(
                f"{len(bad)} of {len(rows)} completions are no SQL of the dialect {self.dialect!r}, "
                f"e.g. row {bad[0].id!r}: {bad[0].completion[:60]!r}",
                why="a right answer would score 0",
                fix="set `dialect` (and `roots`) of SqlValid to those of the completions",
            )

    def _valid(self, text: str) -> bool:
        try:
            import sqlglot
            from sqlglot.errors import SqlglotError
        except ImportError as error:
            raise UserError(
                "the scorer sql_valid without the package sqlglot",
                why="it parses the answers",
                fix='pip install "residency[text]"',
            ) from error
        source = without_fences(text) if self.fences == "strip" else text
        try:
            statements = sqlglot.parse(source, dialect=self.dialect or None)
        except (SqlglotError, RecursionError):
            return False
        real = [one for one in statements if one is not None]
        return bool(real) and all(type(one).__name__ in self.roots and _has_parts(one) for one in real)


def _has_parts(statement: Any) -> bool:
    """Whether a SELECT selects something: sqlglot takes the bare word."""
    return type(statement).__name__ != "Select" or bool(statement.expressions)


@dataclass(frozen=True, kw_only=True)
class SqlExecution(Scorer):
    """Whether the answer's query gives the rows that the completion's query gives, on a database in memory.

    Rows are compared as multisets, in order where the completion orders them; numbers to 1e-6 relatively. The query
    may only read: no ATTACH, no PRAGMA, no write; it is stopped after a number of steps of SQLite's machine.

    Args:
        schema: SQL that makes and fills the tables, or a file with it; used for every row of the domain.
        steps: Largest number of machine steps, in ten thousands.
        fences: `strip`: read what stands in a Markdown code block.

    Raises:
        UserError: The schema does not run.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    unit: ClassVar[str] = "share of queries that give the right rows"
    needs: ClassVar[Literal["generation"]] = "generation"

    schema: str
    steps: int = 1000
    fences: Fences = "strip"

    def __post_init__(self) -> None:
        with closing(self._database()):
            pass

    @property
    def name(self) -> str:
        """One name, whatever the schema: every domain may have its own."""
        return "sql_execution"

    def options(self) -> dict[str, Any]:
        """The schema by its content, so that an edited file is another scorer; SQLite's version decides too."""
        return {"schema": self._script(), "steps": self.steps, "fences": self.fences, "sqlite": sqlite3.sqlite_version}

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        with closing(self._database()) as database:
            return [
                float(any(self._same(database, answer.text or "", text) for text in references(row)))
                for row, answer in zip(rows, answers, strict=True)
            ]

    def check(self, rows: Sequence[Row]) -> None:
        """Every reference runs.

        Raises:
            UserError: Naming a completion that does not.
        """
        with closing(self._database()) as database:
            for row in rows:
                if run_query(database, row.completion, steps=self.steps) is None:
                    raise UserError(
                        f"the completion of row {row.id!r} does not run on the schema: {row.completion[:60]!r}",
                        why="answers are compared with the rows that it gives",
                        fix="correct the schema or the row, or raise `steps`",
                    )

    def _same(self, database: sqlite3.Connection, answer: str, reference: str) -> bool:
        query = without_fences(answer) if self.fences == "strip" else answer
        written, wanted = (run_query(database, text, steps=self.steps) for text in (query, reference))
        if written is None or wanted is None:
            return False
        if "order by" in " ".join(reference.lower().split()):
            return written == wanted
        return Counter(written) == Counter(wanted)

    def _script(self) -> str:
        path = Path(self.schema).expanduser() if "\n" not in self.schema and len(self.schema) < 1024 else None
        return path.read_text(encoding="utf-8") if path is not None and path.is_file() else self.schema

    def _database(self) -> sqlite3.Connection:
        database = sqlite3.connect(":memory:")
        try:
            database.executescript(self._script())
        except (sqlite3.Error, ValueError) as error:
            database.close()
            raise UserError(
                f"schema {self.schema[:60]!r}: {error}",
                why="the scorer `SqlExecution` runs queries on the tables that it makes",
                fix="give SQL that SQLite runs, or the path of a file with it",
            ) from error
        database.commit()
        return database


def run_query(database: sqlite3.Connection, query: str, *, steps: int) -> list[tuple[Any, ...]] | None:
    """The rows of one reading query, values made comparable; `None` if it does not run, writes or takes too long.

    Args:
        database: With its tables; left as it was.
        query: One statement.
        steps: Largest number of SQLite's machine steps, in ten thousands.
    """
    left = [steps]

    def tick() -> int:
        left[0] -= 1
        return int(left[0] < 0)

    def allow(action: int, *about: Any) -> int:
        named = about[1] if action == sqlite3.SQLITE_FUNCTION else None
        ok = action in _READING and str(named).lower() != "load_extension"
        return sqlite3.SQLITE_OK if ok else sqlite3.SQLITE_DENY

    database.set_authorizer(allow)
    database.set_progress_handler(tick, _TICK)
    try:
        cursor = database.execute(query)
        rows = cursor.fetchmany(_CELLS)
        return None if cursor.description is None else [tuple(map(_comparable, row)) for row in rows]
    except (sqlite3.Error, sqlite3.Warning, ValueError, OverflowError, MemoryError):
        return None
    finally:
        database.set_authorizer(None)
        database.set_progress_handler(None, 0)


def _comparable(value: Any) -> Any:
    """Numbers to seven significant digits, whole ones as integers; everything else as it is."""
    if isinstance(value, float):
        rounded = float(f"{value:.7g}")
        return int(rounded) if rounded.is_integer() and abs(rounded) < 2**53 else rounded
    return value

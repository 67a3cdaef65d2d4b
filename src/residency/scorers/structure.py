"""Scores of form: JSON, JSON Schema, Python that compiles."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from residency.core.errors import UserError
from residency.core.types import Row
from residency.scorers.base import Answer, Scorer

__all__ = ["JsonSchema", "JsonValid", "PythonCompiles", "strict_json", "without_fences"]

_FENCE = re.compile(r"\s*```[\w+-]*[ \t]*\n(.*?)\n?```\s*", re.DOTALL)
_LARGEST = 64 * 1024  # bytes of source; the compiler's memory grows with it
Fences = Literal["keep", "strip"]


def without_fences(text: str) -> str:
    """What stands between the marks of a Markdown code block, if the text is one."""
    match = _FENCE.fullmatch(text)
    return match[1] if match else text


def strict_json(text: str) -> Any:
    """The value of a JSON text (RFC 8259): no NaN, no Infinity, no key twice.

    Raises:
        ValueError: It is none. (`RecursionError` of a text that is too deep is one too.)
    """
    try:
        return json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key twice in one object")
    return found


@dataclass(frozen=True, kw_only=True)
class JsonValid(Scorer):
    """Whether the answer is one JSON value, strictly: Python's own parser takes `NaN` and repeated keys.

    Args:
        fences: `strip`: read what stands in a Markdown code block.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"json_valid": {}}
    unit: ClassVar[str] = "share of answers that are JSON"
    needs: ClassVar[Literal["generation"]] = "generation"

    fences: Fences = "keep"

    @property
    def compares(self) -> bool:
        """No."""
        return False

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        return [float(_parsed(answer.text or "", self.fences)[0]) for answer in answers]


@dataclass(frozen=True, kw_only=True)
class JsonSchema(Scorer):
    """Whether the answer is JSON that a schema accepts (Draft 2020-12, formats checked).

    Args:
        schema: A file with the schema, or the schema itself.
        fences: `strip`: read what stands in a Markdown code block.

    Raises:
        UserError: There is no such file, or it holds no schema.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    unit: ClassVar[str] = "share of answers that fit the schema"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ("jsonschema",)

    schema: str | dict[str, Any]
    fences: Fences = "keep"

    def __post_init__(self) -> None:
        self._validator()

    @property
    def name(self) -> str:
        """One name, whatever the schema: every domain may have its own."""
        return "json_schema"

    def options(self) -> dict[str, Any]:
        """The schema by its content, so that an edited file is another scorer."""
        return {"schema": self._content(), "fences": self.fences}

    @property
    def compares(self) -> bool:
        """No."""
        return False

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1."""
        validator = self._validator()
        parsed = [_parsed(answer.text or "", self.fences) for answer in answers]
        return [float(valid and bool(validator.is_valid(value))) for valid, value in parsed]

    def _content(self) -> Any:
        if not isinstance(self.schema, str):
            return self.schema
        try:
            return strict_json(Path(self.schema).expanduser().read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"schema {self.schema!r}: {error}",
                why="the scorer `JsonSchema` checks answers against it",
                fix="give the path of a JSON file that holds a JSON Schema",
            ) from error

    def _validator(self) -> Any:
        try:
            import jsonschema
        except ImportError as error:
            raise UserError(
                "the scorer JsonSchema without the package jsonschema",
                why="it checks the answers",
                fix='pip install "residency[text]"',
            ) from error
        kind, content = jsonschema.Draft202012Validator, self._content()
        try:
            kind.check_schema(content)
        except jsonschema.SchemaError as error:
            raise UserError(
                f"the schema: {error.message}",
                why="it is no JSON Schema (Draft 2020-12)",
                fix="correct it",
            ) from error
        return kind(content, format_checker=kind.FORMAT_CHECKER)


def _parsed(text: str, fences: Fences) -> tuple[bool, Any]:
    """(whether the text is JSON, its value)."""
    try:
        return True, strict_json(without_fences(text) if fences == "strip" else text)
    except ValueError:
        return False, None


@dataclass(frozen=True, kw_only=True)
class PythonCompiles(Scorer):
    """Whether the answer compiles as a Python module (`compile`, which refuses a `return` outside of a function).

    Nothing is run. Sources above 64 kB are not looked at and score 0.

    Args:
        fences: `strip`: read what stands in a Markdown code block.
    """

    names: ClassVar[Mapping[str, Mapping[str, Any]]] = {"python_compiles": {}}
    unit: ClassVar[str] = "share of answers that compile as Python"
    needs: ClassVar[Literal["generation"]] = "generation"
    libraries: ClassVar[tuple[str, ...]] = ()

    fences: Fences = "strip"

    @property
    def compares(self) -> bool:
        """No."""
        return False

    def __call__(self, rows: Sequence[Row], answers: Sequence[Answer]) -> list[float]:
        """(rows,) 0 or 1; an empty answer is no program."""
        return [float(self._compiles(answer.text or "")) for answer in answers]

    def _compiles(self, text: str) -> bool:
        source = without_fences(text) if self.fences == "strip" else text
        if not source.strip() or len(source.encode("utf-8", "replace")) > _LARGEST:
            return False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                compile(source, "<answer>", "exec", dont_inherit=True)
            except (SyntaxError, ValueError, RecursionError, MemoryError, OverflowError):
                return False
        return True

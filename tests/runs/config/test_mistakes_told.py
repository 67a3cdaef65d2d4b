"""How much is told: the tables of a new user's mistakes hold at least forty, and a test runs every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from runs.config import test_cli_errors, test_model_mistakes

TABLES = {
    "in a config": (test_cli_errors.FILE, test_cli_errors.test_mistakes_in_a_config),
    "among the words": (test_cli_errors.WORDS, test_cli_errors.test_mistakes_on_the_command_line),
    "about a model": (test_model_mistakes.MODELS, test_model_mistakes.test_models_that_do_not_fit),
    "about numbers": (test_model_mistakes.WORDS, test_model_mistakes.test_numbers_and_names_that_make_no_sense),
}


def test_forty_mistakes_are_told_apart() -> None:
    """By what the message must say, so that one mistake written twice counts once."""
    told = {parts for table, _ in TABLES.values() for _, parts in table.values()}
    assert len(told) >= 40
    assert all(parts and all(parts) for parts in told), "a message that says nothing of the mistake would do"


@pytest.mark.parametrize("name", TABLES)
def test_every_line_of_a_table_is_run(name: str) -> None:
    """By a test that wants exit code 2, what was got, why, a remedy, and nothing left behind."""
    table: dict[str, Any]
    test: Callable[..., None]
    table, test = TABLES[name]
    cases = [mark.args[1] for mark in test.pytestmark if mark.name == "parametrize"]  # type: ignore[attr-defined]
    assert cases == [table]

"""What tests of several ranks share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.rank_runs import Group, group


@pytest.fixture(scope="module")
def two() -> Iterator[Group]:
    """Two ranks, started once per file."""
    with group(2) as found:
        yield found

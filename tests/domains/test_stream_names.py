"""What a stream cannot be is told before anything is trained: names that cannot be shown, batches without an end."""

from __future__ import annotations

from pathlib import Path

import pytest

from residency.core.errors import UserError
from residency.domains.stream_data import StreamData
from residency.testing.tiny_runs import domains


@pytest.mark.parametrize("name", ["a\x1b[2J", "a\0", "a\u2028b", "\u202eevil", " ", "\udc80"])
def test_a_name_that_cannot_be_shown_is_refused(name: str, tmp_path: Path) -> None:
    (reader,) = domains(tmp_path, {"a": "generative"}).values()
    with pytest.raises(UserError, match="is called") as refused:
        StreamData(domains={name: reader}, batch_size=4).check()
    assert refused.value.got.isprintable()
    StreamData(domains={"Größe (日本語) → 1": reader}, batch_size=4).check()


def test_a_batch_that_no_step_would_end_is_refused(tmp_path: Path) -> None:
    data = domains(tmp_path, {"a": "generative"})
    StreamData(domains=data, batch_size=1024).check()
    with pytest.raises(UserError, match="1,000,000,000"):
        StreamData(domains=data, batch_size=10**9).check()

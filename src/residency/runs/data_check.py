"""The doctor's fast form, before every run: counted, told, recorded; and refused where scores would mean nothing."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from residency.core.errors import UserError
from residency.domains.doctor.examine import Diagnosis, examine, open_columns
from residency.domains.doctor.finding import Finding
from residency.domains.doctor.tokens import Reader
from residency.domains.stream_data import StreamData

__all__ = ["backbone_reader", "check_data", "told"]

# Refused whatever their share; and refused where they concern most rows of a split.
_NEVER = frozenset({"beyond_vocabulary", "too_long_for_model"})
_NOT_MOST = frozenset({"leak", "leak_across", "unknown_tokens"})
_checked: dict[str, dict[str, Any]] = {}


def backbone_reader(backbone: Any) -> Reader:
    """Tokenizer and limits of a backbone, without loading weights."""
    config: dict[str, Any] = {}
    path = Path(getattr(backbone, "folder", "")) / "config.json"
    if path.is_file():
        config = json.loads(path.read_text(encoding="utf-8"))
    inner = config.get("text_config", config)
    positions = inner.get("max_position_embeddings") or inner.get("n_positions")
    return Reader(backbone.tokenizer, vocabulary=inner.get("vocab_size"), context=positions)


def check_data(data: StreamData, backbone: Any) -> dict[str, Any]:
    """Everything but near-duplicates and figures, of the rows that a run uses; once per data and tokenizer.

    Returns:
        `Diagnosis.plain()`: counts of every domain and split, and findings.

    Raises:
        UserError: Most of a split is trained on elsewhere or unknown to the tokenizer, or a row has tokens or a length
            that the model does not.
    """
    given = {name: domain.given for name, domain in data.columns.items()}
    key = json.dumps(
        [dict(data.fingerprints()), given, sorted(data.probes), dict(backbone.fingerprint())], sort_keys=True
    )
    if key not in _checked:
        columns, refused = open_columns(data.columns, probes=frozenset(data.probes))
        diagnosis: Diagnosis = examine(columns, backbone_reader(backbone), near=False, figures=False)
        diagnosis = diagnosis.narrowed(refused)
        for one in diagnosis.errors:
            _refuse(one)
        _checked[key] = diagnosis.plain()
    return _checked[key]


def _refuse(one: Finding) -> None:
    if one.check in _NEVER or (one.check in _NOT_MOST and one.share > 0.5):
        where = ".".join(part for part in ("data.domains", one.domain, one.split) if part)
        raise UserError(
            f"{where}: {one.got}{f', such as row {one.rows[0]!r}' if one.rows else ''}",
            why=one.why,
            fix=f"{one.fix}; `residency doctor` shows all that is wrong with the data",
        )


def told(checked: Mapping[str, Any]) -> list[str]:
    """One line per finding that is more than information, errors first."""
    return [
        f"{one['severity']}: {'/'.join(part for part in (one['domain'], one['split']) if part)}: {one['got']}"
        for one in checked["findings"]
        if one["severity"] != "info"
    ]

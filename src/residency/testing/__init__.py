"""The conformance suite: one row in your own test file runs every property of its kind (see `conformance`).

For plug-ins of any package. It needs pytest, which `residency` itself does not depend on; nothing imports this room.
"""

from __future__ import annotations

import pkgutil

from residency.core.errors import UserError

try:
    import pytest
except ModuleNotFoundError as error:
    raise UserError(
        "residency.testing without pytest",
        why="the suite is a parametrised test of pytest, which only those need who test a plug-in",
        fix="pip install pytest",
    ) from error

# Before they are imported: a failing assertion shows its values, as in a test file.
pytest.register_assert_rewrite(*(f"{__name__}.{module.name}" for module in pkgutil.iter_modules(__path__)))

from residency.testing.rows import (
    AdapterRow,
    AugmentationRow,
    DomainRow,
    MetricRow,
    MitigationRow,
    ObjectiveRow,
    ScorerRow,
)
from residency.testing.suite import conformance
from residency.testing.tiny_models import write_backbone, write_domain, write_tokenizer
from residency.testing.tiny_runs import make_module, train

__all__ = [
    "AdapterRow",
    "AugmentationRow",
    "DomainRow",
    "MetricRow",
    "MitigationRow",
    "ObjectiveRow",
    "ScorerRow",
    "conformance",
    "make_module",
    "train",
    "write_backbone",
    "write_domain",
    "write_tokenizer",
]

"""Refusing what cannot work, before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping

from residency.adapters.base import Adapter
from residency.errors import UserError
from residency.mitigations.base import Mitigation

__all__ = ["check_mitigations"]


def check_mitigations(adapter: Adapter, mitigations: Mapping[str, Mitigation]) -> None:
    """Every mitigation's requirements against what the adapter provides.

    Raises:
        UserError: Naming mitigation, missing capability, adapter, and what to use instead.
    """
    for name, mitigation in mitigations.items():
        missing = sorted(mitigation.requires - adapter.provides)
        if missing:
            kind = type(mitigation).__name__
            raise UserError(
                f"model.mitigations.{name} ({kind}) with model.adapter {type(adapter).__name__}",
                why=f"{kind} needs {', '.join(missing)}; this adapter provides "
                f"{', '.join(sorted(adapter.provides)) or 'none of the capabilities'}",
                fix=f"use {mitigation.instead}",
            )

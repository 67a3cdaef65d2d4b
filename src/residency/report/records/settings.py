"""What the resolved configs say: numeric settings that were varied, what all runs share, what tells them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from residency.core.text import printable
from residency.report.records.arms import Arm
from residency.runs.views.flat_config import flat_config

__all__ = ["differences", "flat_configs", "numeric_settings"]

_LEAST = 3  # values that make a curve


def flat_configs(arms: Sequence[Arm]) -> dict[str, dict[str, Any]]:
    """Method -> its resolved config under short names, of its first finished cell."""
    found = {}
    for arm in arms:
        entry = next((entry for entry in arm.entries if (entry.folder / "config.yaml").is_file()), None)
        config = flat_config(entry.config()) if entry is not None else {}
        found[arm.name] = {key: value for key, value in config.items() if not key.startswith("axes")}
    return found


def differences(arms: Sequence[Arm]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what all share, setting -> {method: value} of what differs); the seed is neither."""
    flat = flat_configs(arms)
    keys = [key for key in dict.fromkeys(k for own in flat.values() for k in own) if key != "seed"]
    common, differ = {}, {}
    for key in keys:
        values = {name: own.get(key) for name, own in flat.items()}
        if len({repr(value) for value in values.values()}) == 1:
            common[key] = next(iter(values.values()))
        else:
            differ[key] = values
    return common, differ


def numeric_settings(arms: Sequence[Arm]) -> dict[str, list[tuple[str, float, str]]]:
    """Settings that were varied alone: name -> (group, value, method) of at least three values.

    A group holds methods whose configs differ in this setting only.
    """
    trained = [arm for arm in arms if arm.done]
    flat = flat_configs(trained)
    found: dict[str, list[tuple[str, float, str]]] = {}
    keys = dict.fromkeys(k for own in flat.values() for k, v in own.items() if type(v) in (int, float) and k != "seed")
    for key in keys:
        groups: dict[str, list[tuple[float, str]]] = {}
        for name, own in flat.items():
            if type(own.get(key)) in (int, float):
                rest = repr(sorted((k, str(v)) for k, v in own.items() if k not in (key, "seed")))
                groups.setdefault(rest, []).append((float(own[key]), name))
        curves = [group for group in groups.values() if len({x for x, _ in group}) >= _LEAST]
        if curves:
            found[key] = [(_label(curve, number), x, name) for number, curve in enumerate(curves) for x, name in curve]
    return found


def _label(curve: Sequence[tuple[float, str]], number: int) -> str:
    """What the names of a curve's methods have in common, else a number."""
    parts = [set(name.split(" · ")) for _, name in curve]
    shared = [part for part in curve[0][1].split(" · ") if all(part in own for own in parts)]
    return printable(" · ".join(shared)) if shared else f"group {number + 1}"

"""Components of tests: pairs of classes that share the name of an argument, and one that lacks every capability."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from residency.adapters import Adapter
from residency.core.types import Row, Split
from residency.domains import Domain
from residency.mitigations import Mitigation

__all__ = [
    "Bare",
    "FirstAdapter",
    "FirstDomain",
    "FirstMitigation",
    "SecondAdapter",
    "SecondDomain",
    "SecondMitigation",
]


class Bare(Adapter):
    """Trains everything and promises nothing."""

    def attach(self, model: nn.Module) -> nn.Module:
        """All parameters."""
        return model.requires_grad_(True)

    def export(self, model: nn.Module, path: Path) -> None:
        """Nothing to write."""


class FirstAdapter(Bare):
    """An adapter with an argument.

    Args:
        strength: Shared with the other class.
        own: Only here.
    """

    def __init__(self, *, strength: float = 1.0, own: int = 1) -> None:
        self.strength, self.own = strength, own


class SecondAdapter(Bare):
    """Another adapter with an argument of the same name.

    Args:
        strength: Shared with the other class.
    """

    def __init__(self, *, strength: float = 2.0) -> None:
        self.strength = strength


class FirstMitigation(Mitigation):
    """A mitigation with an argument.

    Args:
        strength: Shared with the other class.
        own: Only here.
    """

    def __init__(self, *, strength: float = 1.0, own: int = 1) -> None:
        super().__init__()
        self.strength, self.own = strength, own


class SecondMitigation(Mitigation):
    """Another mitigation with an argument of the same name.

    Args:
        strength: Shared with the other class.
    """

    def __init__(self, *, strength: float = 2.0) -> None:
        super().__init__()
        self.strength = strength


class FirstDomain(Domain):
    """A domain with an argument.

    Args:
        strength: Shared with the other class.
        own: Only here.
    """

    kind = "generative"
    source = licence = attribution = "made up"

    def __init__(self, *, strength: float = 1.0, own: int = 1) -> None:
        super().__init__()
        self.strength, self.own = strength, own

    def read(self) -> Mapping[Split, Sequence[Row]]:
        """No rows."""
        return {}


class SecondDomain(FirstDomain):
    """Another domain with an argument of the same name.

    Args:
        strength: Shared with the other class.
    """

    def __init__(self, *, strength: float = 2.0) -> None:
        super().__init__()
        self.strength = strength

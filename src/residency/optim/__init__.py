"""Optimizers that torch does not have."""

from residency.optim.galore import GaLoreOptimizer
from residency.optim.layerwise import LayerwiseOptimizer

__all__ = ["GaLoreOptimizer", "LayerwiseOptimizer"]

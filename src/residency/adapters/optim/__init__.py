"""Optimizers that torch does not have."""

from residency.adapters.optim.galore import GaLoreOptimizer
from residency.adapters.optim.layerwise import LayerwiseOptimizer

__all__ = ["GaLoreOptimizer", "LayerwiseOptimizer"]

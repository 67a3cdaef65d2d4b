"""Constrain gradients and updates."""

"""Adaptive search."""

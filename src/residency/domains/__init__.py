"""Readers of data sets: a domain gives rows of text in splits that do not leak."""

from residency.domains.base import Domain, Template
from residency.domains.jsonl import Jsonl

__all__ = ["Domain", "Jsonl", "Template"]

"""Domains: named data sets that a model learns one after another."""

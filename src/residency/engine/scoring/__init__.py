"""Scores of every row under one state."""

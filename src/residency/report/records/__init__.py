"""Runs and studies as they were recorded."""

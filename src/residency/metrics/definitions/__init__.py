"""Metrics of one score matrix, one file each: `residency.metrics.discovery` finds them."""

"""Pinned data packages and the packaged model."""

"""A saved stage for other programs."""

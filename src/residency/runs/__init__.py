"""One run: from its command line to its record on disk."""

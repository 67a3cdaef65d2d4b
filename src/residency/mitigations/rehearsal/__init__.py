"""Show earlier examples again."""

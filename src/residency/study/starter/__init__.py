"""`residency init`: from a user's files to a config and a study that run."""

"""Stay close to what a teacher says."""

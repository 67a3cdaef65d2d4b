"""Pull towards earlier weights."""

"""How one answer is judged."""

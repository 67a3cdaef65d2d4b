"""What to take and why, in words."""

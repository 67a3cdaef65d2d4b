"""What shows a running study."""

"""Mix weights after a stage."""

"""A study file -> what has to be made."""

"""Small clean-ups that several readers share."""

import re

__all__ = ["name_words", "without_links"]


def name_words(name: str) -> str:
    """`exerciseNotice`, `ExerciseNotice` and `EXERCISE_NOTICE` all read `exercise notice`."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name.replace("_", " "))
    return " ".join(parted.lower().split())


def without_links(text: str) -> str:
    """Markdown links as their text."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", text)

"""What the user can mend, as opposed to a bug."""

__all__ = ["EXIT_CROSSED", "EXIT_DONE", "EXIT_SIGNAL", "EXIT_SOME_FAILED", "EXIT_USER", "UserError"]

# Exit codes of every command; anything else is a bug.
EXIT_DONE = 0
EXIT_USER = 2
EXIT_SOME_FAILED = 3
EXIT_CROSSED = 4
EXIT_SIGNAL = 75


class UserError(Exception):
    """A mistake in a config, in data or in the environment: shown without a traceback, exit code 2.

    Args:
        got: What was found, with names and values.
        why: Why it cannot work.
        fix: What to type, or to change, instead.
    """

    def __init__(self, got: str, *, why: str, fix: str) -> None:
        super().__init__(got, why, fix)
        self.got = got
        self.why = why
        self.fix = fix

    def __str__(self) -> str:
        return f"{self.got}\n  why: {self.why}\n  fix: {self.fix}"

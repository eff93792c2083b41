"""Every refusal a person can see: where, what was expected, what was found, what to do; and its exit code."""


class MillraceError(Exception):
    """An error that says what to do about it. Exit code 1."""

    exit_code = 1
    word = "error"  # how a line about it begins


class Busy(MillraceError):
    """Another process is at it."""


class UsageError(MillraceError):
    """The command or the spec is wrong. Exit code 2; never retried."""

    exit_code = 2


class Refused(MillraceError):
    """A contract or a gate said no. Exit code 3; never retried.

    `report` is the home-relative path of the page that shows why, or empty.
    """

    exit_code = 3
    word = "refused"

    def __init__(self, message: str, *, report: str = "") -> None:
        super().__init__(message)
        self.report = report


def nearest(name: str, known: list[str]) -> str:
    """`; nearest: 'x'` for the closest of the known names, or an empty string."""
    import difflib

    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"; nearest: {close[0]!r}" if close else ""

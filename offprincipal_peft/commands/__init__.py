"""What the command line's subcommands share, and those that have a file of their own."""

DONE, SOME_FAILED, MISTAKE, INTERRUPTED = 0, 1, 2, 130  # exit codes


class Refused(ValueError):
    """A command line that cannot be carried out."""


def words(text: str) -> list[str]:
    """``a, b`` -> ["a", "b"]."""
    return [part.strip() for part in text.split(",") if part.strip()]

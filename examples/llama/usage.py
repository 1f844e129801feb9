"""What a user did wrong, or should know, said in one line."""

import difflib
import sys
from collections.abc import Callable, Iterable

from tqdm import tqdm


class UsageError(Exception):
    """A bad input, or a run that cannot go on: one line that names the value and the remedy."""


class RunInterrupted(Exception):  # noqa: N818 (it is no error)
    """A run that was asked to stop, and did; the message says where it can be continued from."""


def unknown_name(flag: str, value: str, known: Iterable[str]) -> UsageError:
    """Returns the error for a name that is not in `known`, listing those, the nearest first."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, value.lower(), name).ratio()

    names = ", ".join(sorted(known, key=likeness, reverse=True))
    return UsageError(f"{flag} {value!r} is unknown; choose one of: {names}")


def first_line(error: BaseException) -> str:
    """Returns what an error of a library says, short enough for a line."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return line if len(line) <= 200 else line[:197] + "..."


def notice(text: str) -> None:
    """Writes a line to stderr, above the progress bar if there is one."""
    tqdm.write(text, file=sys.stderr)


def exit_on_usage_error(command: Callable[[], object]) -> None:
    """Runs `command`; a `UsageError` becomes one line on stderr and exit status 2.

    A run that was interrupted and saved ends with status 0, as a command that did what it was asked.
    """
    try:
        command()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except RunInterrupted as interruption:
        print(interruption)
    except KeyboardInterrupt:
        print("interrupted before there was anything to save", file=sys.stderr)
        sys.exit(130)

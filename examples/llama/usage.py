"""What a user did wrong, said in one line."""

import difflib
import sys
from collections.abc import Callable, Iterable


class UsageError(Exception):
    """A bad input. The message is one line that names the value and the remedy."""


def unknown_name(flag: str, value: str, known: Iterable[str]) -> UsageError:
    """Returns the error for a name that is not in `known`, listing those, the nearest first."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, value.lower(), name).ratio()

    names = ", ".join(sorted(known, key=likeness, reverse=True))
    return UsageError(f"{flag} {value!r} is unknown; choose one of: {names}")


def exit_on_usage_error(command: Callable[[], object]) -> None:
    """Runs `command`; a `UsageError` becomes one line on stderr and exit status 2."""
    try:
        command()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)

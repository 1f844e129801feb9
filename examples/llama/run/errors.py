"""Errors and notices for the user, in one line each.

Messages name an option by its field, as in "`eval_every` 0 is out of range". So code
that raises them knows no command line. Where a command prints a message, the field
becomes the flag: --eval-every.
"""

import difflib
import errno
import re
import sys
from collections.abc import Callable, Iterable, Sequence

import jax
from tqdm import tqdm


class UsageError(Exception):
    """A bad input or a failed run: one line that names the value and the remedy."""


class OtherProcessError(Exception):
    """An error of another process of the run, which also reports it."""


class RunInterrupted(BaseException):
    """A run that stopped on request; the message says where it can be continued.

    Like `KeyboardInterrupt`, it is no `Exception`. A signal may come at any time, and
    code that handles the errors of a library must not take it for one of them.
    """

    def __init__(self, message: str, *, status: int = 0) -> None:
        super().__init__(message)
        # The exit status of the process, which is 0 if all is saved.
        self.status = status


def with_flags(message: str) -> str:
    """Returns the message with flags, such as --out, in place of fields like `out`."""
    return re.sub(
        "`([a-z][a-z0-9_]*)`", lambda field: f"--{field[1].replace('_', '-')}", message
    )


def print_error(message: str) -> None:
    print(f"error: {with_flags(message)}", file=sys.stderr)


def check_names(flag: str, names: Sequence[str], known: Iterable[str]) -> None:
    """Raises `UsageError` if there are no names, or one that is not known."""
    if not names:
        raise UsageError(f"{flag} is empty; give one or more")
    for name in names:
        if name not in known:
            raise unknown_name(flag, name, known)


def unknown_name(option: str, value: str, known: Iterable[str]) -> UsageError:
    """Returns the error for an unknown name, which lists the known ones by likeness."""

    def likeness(name: str) -> float:
        return difflib.SequenceMatcher(None, value.lower(), name).ratio()

    names = ", ".join(sorted(known, key=likeness, reverse=True))
    return UsageError(f"{option} {value!r} is unknown; choose one of: {names}")


def first_line(error: BaseException) -> str:
    """Returns the message of a library's error, short enough for one line."""
    line = next(iter(str(error).splitlines()), "") or type(error).__name__
    line = line.replace("`", "'")  # What a library names is no option.
    return line if len(line) <= 200 else line[:197] + "..."


def is_first() -> bool:
    """Whether this is process 0 of a run, or its only process.

    The call does not make JAX look for devices.
    """
    return not jax.distributed.is_initialized() or jax.process_index() == 0


def notice(text: str, quoted: str = "") -> None:
    """Writes a line to stderr above the progress bar, if any; only process 0 writes.

    Args:
        text: the line, in which fields are printed as flags.
        quoted: the end of the line, which is printed as it is.
    """
    if is_first():
        tqdm.write(with_flags(text) + quoted, file=sys.stderr)


# Commands that can continue a run in its folder say this after Ctrl-C.
RESUME = "`resume` auto goes on with what is on disk"


def disk_is_full(error: BaseException) -> bool:
    """Whether an error of the system or of a library says that the disk is full."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return True
    return "No space left on device" in str(error) or "Disk quota exceeded" in str(
        error
    )


def device_memory_is_full(error: BaseException) -> bool:
    """Whether an error says that the devices, which may be the CPU, lack memory."""
    return isinstance(
        error, jax.errors.JaxRuntimeError
    ) and "RESOURCE_EXHAUSTED" in str(error)


def explained(error: Exception) -> str | None:
    """Returns the message for an error, or None if the user can't correct it."""
    if isinstance(error, UsageError | OtherProcessError):
        return str(error)
    if isinstance(error, OSError):
        if disk_is_full(error):
            return (
                f"{error}; make room there, and give `resume` auto to a run that had "
                "begun"
            )
        return f"{error}; make it readable and writable, or give another path"
    if device_memory_is_full(error):
        return (
            f"the device's memory is too small ({first_line(error)}); raise "
            "`accumulate` if `layerwise` is off, lower `batch` or `seq`, or give "
            "`remat` full or `weights` bfloat16"
        )
    return None


def exit_on_usage_error(
    command: Callable[[], object], *, after_interrupt: str = ""
) -> None:
    """Runs `command`. A user's error becomes one line on stderr and exit status 2.

    A run that was interrupted and saved ends with status 0, because it did what it was
    asked.

    Args:
        command: what to run.
        after_interrupt: what the user can do after Ctrl-C has ended the command.
    """
    try:
        command()
    except RunInterrupted as interruption:
        if interruption.status or is_first():
            print(with_flags(str(interruption)))
        if interruption.status:
            sys.exit(interruption.status)
    except KeyboardInterrupt:
        remedy = f"; {after_interrupt}" if after_interrupt else ""
        print(with_flags(f"interrupted{remedy}"), file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if (line := explained(error)) is None:
            raise
        print_error(line)
        sys.exit(2)

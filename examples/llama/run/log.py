"""The files of a run: config.json, tokenizer.json, metrics.jsonl and tensorboard/.

metrics.jsonl has an object per line.
"""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from examples.llama.options import differing_fields
from examples.llama.run.errors import UsageError, notice
from examples.llama.run.tensorboard import TensorBoard
from examples.llama.text.cache import write_whole
from examples.llama.text.decoding import decode

CONFIG, METRICS, CURVES, LOCK = "config.json", "metrics.jsonl", "curves.png", ".lock"
TENSORBOARD, TOKENIZER, CHECKPOINTS = "tensorboard", "tokenizer.json", "checkpoints"
BEST = "best"  # The weights with the lowest validation loss, where a run keeps them.
PRETRAINED = "pretrained"  # The files that an export copies, besides the weights.
OF_A_RUN = (
    CONFIG,
    METRICS,
    CURVES,
    TENSORBOARD,
    TOKENIZER,
    CHECKPOINTS,
    BEST,
    PRETRAINED,
)

Row = dict[str, Any]  # One step: numbers by name, and at evaluations the sampled text.


def check_free(folder: Path, *, resume: bool = False) -> None:
    """Raises `UsageError` if a run in `folder` would overwrite or mix with files there.

    Args:
        folder: the run's folder.
        resume: whether an existing run may be continued.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"`out` {folder} is a file; choose a folder")
    if resume and (folder / CONFIG).exists():
        return
    for name in OF_A_RUN:
        if (folder / name).exists():
            remedy = (
                f"its {CONFIG} is missing, so put that back,"
                if resume
                else "continue it with `resume` auto,"
            )
            raise UsageError(
                f"`out` {folder} already holds a run ({name}); "
                f"{remedy} choose another folder or remove it"
            )


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Creates `folder`, and raises `UsageError` if another process runs in it.

    The system releases the lock when the process ends, for whatever reason.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"`out` {folder} is in use by another run; wait for its end, "
                "or choose another folder"
            ) from error
        yield


def check_same_run(folder: Path, config: dict[str, Any]) -> None:
    """Raises `UsageError` if `folder` has a run of another configuration."""
    if not (folder / CONFIG).exists():
        return
    if differing := differing_fields(config, read_config(folder)):
        raise UsageError(
            f"`out` {folder} holds another run ({'; '.join(differing)}); give the same "
            "options, or another `out`"
        )


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the configuration of the run in `folder`.

    Raises `UsageError` if there is none.
    """
    path = folder / CONFIG
    try:
        config = json.loads(decode(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{path} cannot be read ({error}); put it back, or give another folder"
        ) from error
    if not isinstance(config, dict) or "optimizer" not in config:
        raise UsageError(f"{path} is no run's configuration; give another folder")
    return config


def config_of(folder: Path) -> dict[str, Any] | None:
    """Returns the configuration of the run in `folder`; None without a run."""
    return read_config(folder) if (folder / CONFIG).exists() else None


def write_config(folder: Path, config: dict[str, Any], tokenizer: str) -> None:
    """Writes a run's configuration and its tokenizer, which an export needs.

    They are the first files of a run.
    """
    write_whole(folder / CONFIG, json.dumps(config, indent=2) + "\n")
    write_whole(folder / TOKENIZER, tokenizer)


class RunLog:
    """Writes a run's metrics line by line, and to TensorBoard; use it in a `with`.

    Args:
        folder: the run's folder.
        step: the step to continue from. Metrics of later steps are dropped, because
            these steps will be repeated.
    """

    def __init__(self, folder: Path, *, step: int = 0) -> None:
        rows = read_metrics(folder)
        if len(rows) < step:
            raise UsageError(
                f"{folder / METRICS} has {len(rows)} of the {step} steps that the "
                "checkpoint goes on from; put it back, or choose another `out`"
            )
        if rows and not step:
            kept = set_aside(folder / METRICS)
            notice(
                f"{folder} has no checkpoint: starting again at step 1; "
                f"the metrics so far are in {kept}"
            )
        self.rows_before = rows[:step]
        write_whole(
            folder / METRICS,
            "".join(json.dumps(row) + "\n" for row in self.rows_before),
        )
        with contextlib.ExitStack() as stack:
            self._file = stack.enter_context((folder / METRICS).open("a"))
            self._tensorboard = stack.enter_context(
                TensorBoard(folder / TENSORBOARD, step)
            )
            self._open = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: Any) -> None:
        self._open.__exit__(*error)

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        # The flush lets users watch a run, and lets a run that dies leave its curve.
        self._file.flush()
        self._tensorboard.write(row)

    def sync(self) -> None:
        """Waits until the metrics are on disk; no checkpoint may be ahead of them."""
        os.fsync(self._file.fileno())


class NoLog:
    """The log of all processes but the first, which writes nothing."""

    rows_before: Sequence[Row] = ()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self, row: Row) -> None:
        pass

    def sync(self) -> None:
        pass


def set_aside(path: Path) -> Path:
    """Renames `path` to a name that is free, and returns it."""
    names = (path.with_name(f"{path.name}.{number}") for number in range(1, 10_000))
    return path.rename(next(name for name in names if not name.exists()))


def read_metrics(folder: Path) -> list[Row]:
    """Returns the rows of a run, one per step from the first; none without a file.

    An incomplete last line, which a run leaves if it is killed while it writes, is left
    out.

    Raises:
        UsageError: if a line does not have the metrics of its step.
    """
    path = folder / METRICS
    text = path.read_text(errors="replace") if path.exists() else ""
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            if not line.endswith("\n"):
                break
            row = None
        if not isinstance(row, dict) or row.get("step") != number:
            raise UsageError(
                f"line {number} of {path} is not the metrics of step {number}; mend "
                "it, or choose another `out`"
            )
        rows.append(row)
    return rows

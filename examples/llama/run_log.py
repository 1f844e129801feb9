"""The files of a run: config.json, tokenizer.json, metrics.jsonl (an object a line), tensorboard/."""

import contextlib
import fcntl
import json
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tensorboardX import SummaryWriter

from examples.llama.options import differing_fields
from examples.llama.usage import UsageError

CONFIG, METRICS, CURVES = "config.json", "metrics.jsonl", "curves.png"
TENSORBOARD, TOKENIZER, LOCK = "tensorboard", "tokenizer.json", ".lock"

Row = dict[str, Any]  # One step: numbers by name, and at evaluations the sampled text.


def check_free(folder: Path, *, resume: bool = False) -> None:
    """Raises `UsageError` where writing a run to `folder` would overwrite or mix with something."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; choose a folder")
    for name in (CONFIG, METRICS, CURVES):
        if not resume and (folder / name).exists():
            raise UsageError(
                f"--out {folder} already holds a run ({name}); continue it with --resume auto, "
                "choose another folder or remove it"
            )


@contextlib.contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Makes `folder` if need be, and raises `UsageError` while another process runs in it.

    The system drops the lock with the process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(
                f"--out {folder} is in use by another run; wait for its end, or choose another folder"
            ) from error
        yield


def check_same_run(folder: Path, config: dict[str, Any]) -> None:
    """Raises `UsageError` where `folder` holds a run of another configuration."""
    path = folder / CONFIG
    if not path.exists():
        return
    try:
        before = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UsageError(f"{path} is not JSON ({error}); restore it, or choose another --out") from error
    if differing := differing_fields(config, before):
        raise UsageError(
            f"--out {folder} holds another run ({'; '.join(differing)}); give the same options, or another "
            "--out"
        )


class RunLog:
    """Writes a run's configuration at once and its metrics line by line; use it in a `with`.

    Args:
        folder: the run's folder.
        config: what the run is, as JSON.
        tokenizer: the run's, as JSON, so that the folder is all that an export needs.
        step: the step to continue from; metrics of later steps, which will be run again, are dropped.
    """

    def __init__(self, folder: Path, config: dict[str, Any], tokenizer: str, *, step: int = 0) -> None:
        self.rows_before = [row for row in read_metrics(folder) if row["step"] <= step]
        if len(self.rows_before) != step:
            raise UsageError(
                f"{folder / METRICS} has {len(self.rows_before)} of the {step} steps that the checkpoint "
                "goes on from; put it back, or choose another --out"
            )
        replace_text(folder / METRICS, "".join(json.dumps(row) + "\n" for row in self.rows_before))
        replace_text(folder / CONFIG, json.dumps(config, indent=2) + "\n")
        replace_text(folder / TOKENIZER, tokenizer)
        self._file = (folder / METRICS).open("a")
        self._tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()
        self._tensorboard.close()

    def write(self, row: Row) -> None:
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()  # So that a run can be watched, and one that dies leaves its curve.
        for name, value in row.items():
            if isinstance(value, str):
                self._tensorboard.add_text(name, value, row["step"])
            elif value is not None and name != "step":
                self._tensorboard.add_scalar(name, value, row["step"])

    def sync(self) -> None:
        """Returns when the metrics are on disk, so that no checkpoint is ahead of them."""
        os.fsync(self._file.fileno())


def replace_text(path: Path, text: str) -> None:
    """Writes `path` whole or not at all."""
    new = path.with_name(path.name + ".new")
    with new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)


def read_metrics(folder: Path) -> list[Row]:
    """Returns the rows of a run, none where there is no file yet.

    The last line is left out where it is cut off, as a run leaves it that is killed while it writes.
    """
    path = folder / METRICS
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    if lines and not lines[-1].endswith("\n"):
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UsageError(
                f"line {number} of {path} is not JSON ({error}); mend it or choose another --out"
            ) from error
    return rows

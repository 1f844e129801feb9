"""The files of a run: config.json, metrics.jsonl with one object a line, curves.png."""

import dataclasses
import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from examples.llama.usage import UsageError

CONFIG, METRICS, CURVES = "config.json", "metrics.jsonl", "curves.png"


def check_free(folder: Path) -> None:
    """Raises `UsageError` where writing a run to `folder` would overwrite or mix with something."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--out {folder} is a file; choose a folder")
    for name in (CONFIG, METRICS, CURVES):
        if (folder / name).exists():
            raise UsageError(
                f"--out {folder} already holds a run ({name}); choose another folder or remove it"
            )


class RunLog:
    """Writes a run's options at once and its metrics line by line; use it in a `with`."""

    def __init__(self, folder: Path, options: Any) -> None:
        check_free(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = json.dumps(dataclasses.asdict(options), indent=2, default=str)
        (folder / CONFIG).write_text(config + "\n")
        self._file: TextIO = (folder / METRICS).open("x")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()

    def write(self, metrics: dict[str, float]) -> None:
        self._file.write(json.dumps(metrics) + "\n")
        self._file.flush()  # So that a run can be watched, and one that dies leaves its curve.


def read_metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]

"""Metrics in the format that TensorBoard reads."""

import time
from pathlib import Path
from typing import Any, Self

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter

# Protocol buffers make these at run time.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class TensorBoard:
    """Writes event files to `folder`; use it in a `with`.

    tensorboardX's SummaryWriter is not used, because it writes in a thread. If the disk
    is full, that thread ends, and the run waits for it forever.

    Args:
        folder: the folder, which is created if necessary.
        step: the step to continue from. TensorBoard then drops the metrics of later
            steps.
    """

    def __init__(self, folder: Path, step: int) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._writer = EventsWriter(str(folder / "events"), f".after-{step}")
        if step:
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(
                Event(wall_time=time.time(), step=step + 1, session_log=start)
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._writer.close()

    def write(self, row: dict[str, Any]) -> None:
        """Writes the numbers and texts of a metrics row."""
        for name, value in row.items():
            if isinstance(value, str):
                content = summary.text(name, value)
            elif value is not None and name != "step":
                content = summary.scalar(name, value)
            else:
                continue
            self._writer.write_event(
                Event(wall_time=time.time(), step=row["step"], summary=content)
            )
        self._writer.flush()

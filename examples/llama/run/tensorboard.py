"""Metrics as TensorBoard reads them."""

import time
from pathlib import Path
from typing import Any, Self

from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter

# Protocol buffers make these at run time.
from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]


class TensorBoard:
    """Writes event files to `folder`; use it in a `with`.

    Not tensorboardX's SummaryWriter: that one writes in a thread, and where the disk is
    full, the thread ends and the run waits for it for ever.

    Args:
        folder: made if need be.
        step: the step to continue from; what TensorBoard has of later ones, it then
            forgets.
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

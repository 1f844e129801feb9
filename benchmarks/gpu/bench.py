"""The device, the time budget and the measuring of rows, which all parts share."""

import contextlib
import dataclasses
import itertools
import re
import shutil
import time
import zipfile
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax

from benchmarks.gpu.report import Report
from benchmarks.gpu.worker import Failed, Row, Worker
from benchmarks.report import made_with
from examples.llama.run.errors import notice
from examples.llama.run.machine import cores

PACKAGES = ("jax", "jaxlib", "flax", "optax")
NO_TIME = Failed("no time left")


class Device(NamedTuple):
    """The device that the rows run on."""

    platform: str
    kind: str
    memory_bytes: int | None  # The device's memory; None if unknown.
    made_with: str


def device_row() -> Generator[Device]:
    """Yields the device, in a process of its own, since JAX allocates memory on it."""
    fraction = 0.5
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    yield Device(
        jax.default_backend(),
        jax.devices()[0].device_kind,
        limit and int(limit / fraction),
        made_with(PACKAGES),
    )


def this_device() -> Device:
    """Returns the device that JAX finds in a new process.

    Raises:
        RuntimeError: if JAX cannot start on it.
    """
    with Worker(device_row, variables={"XLA_CLIENT_MEM_FRACTION": "0.5"}) as worker:
        found = worker.prepared(time.monotonic() + 120)
    if isinstance(found, Failed):
        raise RuntimeError(f"JAX cannot use the device: {found.reason}")
    return found


class Job(NamedTuple):
    """A row to be measured."""

    name: str
    row: Row
    args: tuple[Any, ...]
    variables: Mapping[str, str] = MappingProxyType({})


@dataclasses.dataclass(frozen=True)
class Bench:
    """A part that is being measured."""

    report: Report
    device: Device
    deadline: float  # `time.monotonic` at which the part must end.
    rehearse: bool
    dump: bool  # Whether to keep the optimised HLO of each step.
    only: str = ""  # A regular expression that the names of rows must match.

    @property
    def on_gpu(self) -> bool:
        return self.device.platform == "gpu"

    def left(self) -> float:
        """Returns the seconds until the deadline."""
        return self.deadline - time.monotonic()

    def wants(self, name: str) -> bool:
        """Returns whether --only leaves a row in."""
        return bool(re.search(self.only, name))

    def measure(
        self, jobs: Iterable[Job], put: Callable[[Job, Any, Any], None]
    ) -> None:
        """Measures each job; `put` gets the job, what it prepared and what it measured.

        A wave has as many jobs as the host has cores, which prepare at the same time.
        They measure when all have prepared, because compiling tries kernels on the GPU.
        """
        wanted = [job for job in jobs if self.wants(job.name)]
        for wave in batched(wanted, rows_per_wave()):
            with contextlib.ExitStack() as stack:
                started = self._start(stack, wave)
                # A row that hangs takes at most half of the time that is left.
                half = self.deadline - self.left() / 2
                prepared = [worker.prepared(half) for worker in started]
                rows = zip(wave[: len(started)], started, prepared, strict=True)
                for job, worker, known in rows:
                    share = 1 if job is wanted[-1] else 1 / 2
                    self.measure_one(job, worker, known, share * self.left(), put)
            for job in wave[len(started) :]:
                put(job, NO_TIME, NO_TIME)

    def measure_alone(self, job: Job) -> Any:
        """Returns the result of one job, or `Failed`."""
        found: list[Any] = []
        self.measure([job], lambda job, known, result: found.append(result))
        return found[0]

    def _start(self, stack: contextlib.ExitStack, wave: Iterable[Job]) -> list[Worker]:
        started: list[Worker] = []
        for job in wave:
            if self.left() <= 0:
                break
            notice(f"{self.report.part}: preparing {job.name}")
            worker = Worker(
                job.row, *job.args, variables={**self.quick(), **job.variables}
            )
            started.append(stack.enter_context(worker))
        return started

    def quick(self) -> dict[str, str]:
        """Returns environment variables that make a rehearsal compile faster."""
        return {"JAX_DISABLE_MOST_OPTIMIZATIONS": "true"} if self.rehearse else {}

    def measure_one(
        self,
        job: Job,
        worker: Worker,
        known: Any,
        seconds: float,
        put: Callable[[Job, Any, Any], None],
    ) -> None:
        if isinstance(known, Failed):
            put(job, known, known)
            return
        notice(f"{self.report.part}: measuring {job.name} ({self.left():.0f} s left)")
        with worker:  # The end of the worker frees its memory for the next row.
            found = worker.ask(time.monotonic() + seconds)
        put(job, known, found)

    def hlo(self, name: str) -> Path | None:
        """Returns the file for a row's program; None without --dump."""
        if not self.dump:
            return None
        return self._hlo_folder() / f"{re.sub(r'[^a-z0-9]+', '-', name.lower())}.txt"

    def pack_hlo(self) -> None:
        """Puts the programs of all rows into one file, OUT/PART-hlo.zip."""
        folder = self._hlo_folder()
        if not folder.exists():
            return
        packed = self.report.folder / f"{self.report.part}-hlo.zip"
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted(folder.iterdir()):
                file.write(path, path.name)
        shutil.rmtree(folder)

    def _hlo_folder(self) -> Path:
        return self.report.folder / f"{self.report.part}-hlo"


def rows_per_wave() -> int:
    """Returns how many rows prepare at a time: one per core."""
    return max(2, cores())


def keep_hlo(path: Path | None, compiled: jax.stages.Compiled) -> None:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(compiled.as_text() or "")


def batched(jobs: Iterable[Job], size: int) -> Iterable[list[Job]]:
    remaining = iter(jobs)
    while batch := list(itertools.islice(remaining, size)):
        yield batch

"""What counts as a finished run, as a damaged checkpoint and as the best weights."""

import dataclasses
import json
import math
import os
import signal
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from tqdm import tqdm

from examples.llama import export
from examples.llama.options import RunOptions
from examples.llama.run.checkpoint import (
    BestWeights,
    Checkpoints,
    restore_params,
    steps_on_disk,
)
from examples.llama.run.errors import RunInterrupted, UsageError
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import BEST, CHECKPOINTS, CONFIG, METRICS, NoLog, Row
from examples.llama.run.plots import plot_curves
from examples.llama.run.recorder import DivergedError, Recorder
from examples.llama.run.result import read_result
from examples.llama.step import StepMetrics
from tests.examples.conftest import SMALL

PARAMS: Any = {"w": np.zeros(2)}
DEVICE_IS_FULL = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: no room for 13 GiB")


def raises(error: Exception) -> Any:
    def function(*_: Any) -> None:
        raise error

    return function


def test_a_run_is_finished_when_its_curves_are_drawn(tmp_path: Path) -> None:
    options = RunOptions(out=tmp_path, steps=1)
    row = {"step": 1, "loss": 3.0, "val_loss": 2.0, "tokens_per_s": 5.0}
    (tmp_path / METRICS).write_text(json.dumps(row) + "\n")
    (tmp_path / CONFIG).write_text(json.dumps(options.as_run() | {"corpus": "key"}))
    assert read_result(options) is None
    plot_curves({"adamw": tmp_path}, tmp_path)
    assert read_result(options) == (options, 2.0, 5.0)
    assert {path.name for path in tmp_path.iterdir()} == {
        METRICS,
        CONFIG,
        "curves.png",
    }
    other = dataclasses.replace(options, b2=0.9)
    with pytest.raises(UsageError, match=r"holds another run \(b2: None -> 0.9\)"):
        read_result(other)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [(BEST, "leave out `best`"), (CHECKPOINTS, "give another `step`")],
)
def test_only_a_damaged_checkpoint_is_called_so(
    name: str, remedy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path, keep=1, config={}, name=name) as checkpoints:
        checkpoints.save(5, {"params": PARAMS}, {})
    for error in (MemoryError("no room"), PermissionError("closed"), DEVICE_IS_FULL):
        monkeypatch.setattr(ocp.Checkpointer, "restore", raises(error))
        with pytest.raises(type(error)):
            restore_params(tmp_path, PARAMS, None, name)
    monkeypatch.setattr(ocp.Checkpointer, "restore", raises(ValueError("torn")))
    with pytest.raises(
        UsageError, match=rf"{name}/5 cannot be read \(torn\); {remedy}"
    ):
        restore_params(tmp_path, PARAMS, None, name)


def test_a_signal_during_a_restore_is_not_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpoints(tmp_path, keep=2, config={}) as checkpoints:
        for step in (5, 10):
            checkpoints.save(step, {"params": PARAMS}, {})

    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(1)  # The signal comes before this ends.

    monkeypatch.setattr(ocp.CheckpointManager, "restore", interrupted)
    state: Any = {"params": PARAMS}
    with (
        pytest.raises(RunInterrupted, match="stopped by SIGTERM"),
        StopRequest(),
        Checkpoints(tmp_path, keep=2, config={}) as checkpoints,
    ):
        checkpoints.restore_newest(state)
    assert steps_on_disk(tmp_path, CHECKPOINTS) == [5, 10]


@pytest.mark.parametrize(
    ("error", "backend", "remedy"),
    [
        (DEVICE_IS_FULL, "gpu", "export in the host's memory, with JAX_PLATFORMS=cpu"),
        (DEVICE_IS_FULL, "cpu", "use a machine with more memory"),
        (MemoryError("no room for 13 GiB"), "gpu", "use a machine with more memory"),
    ],
)
def test_an_export_that_does_not_fit_in_memory(
    error: Exception,
    backend: str,
    remedy: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(export, "config_of_run", raises(error))
    options = export.ExportOptions(run=tmp_path, to=tmp_path / "to")
    with pytest.raises(UsageError, match=rf"in memory \(.*13 GiB\); {remedy}"):
        export.export(options)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e6])
def test_weights_whose_loss_diverged_are_not_kept(loss: float, tmp_path: Path) -> None:
    unused: Any = None
    options = RunOptions(out=tmp_path)
    recorder = Recorder(options, SMALL, unused, unused, NoLog(), unused)
    losses = {1: 3.0, 2: loss}
    with BestWeights(tmp_path, step=0, config={}) as best:
        evaluate = best.kept_by(
            recorder.checked(lambda _, step: {"val_loss": losses[step]})
        )
        with pytest.raises(DivergedError, match="validation loss is .* at step 2"):
            evaluate(PARAMS, 2)
        assert steps_on_disk(tmp_path, BEST) == []
        evaluate(PARAMS, 1)
        # A checkpoint of this step, which comes next, must not be ahead of the weights.
        assert steps_on_disk(tmp_path, BEST) == [1]


# The throughput of a run.


class Rows(NoLog):
    """Collects rows, and takes a while for each."""

    def __init__(self, clock: "Clock") -> None:
        self.rows: list[Row] = []
        self._clock = clock

    def write(self, row: Row) -> None:
        self.rows.append(row)
        self._clock.now += 0.4


class Clock:
    """A host and a device that takes a second per step, one after the other."""

    def __init__(self) -> None:
        self.now = 0.0
        self.steps = 0

    def dispatch(self) -> float:
        """Returns the time at which the device has made the next step."""
        self.steps += 1
        return float(self.steps)

    def wait(self, metrics: StepMetrics) -> StepMetrics:
        self.now = max(self.now, float(metrics.grad_norm))
        return metrics


def test_throughput_is_that_of_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    log: Any = Rows(clock)
    monkeypatch.setattr(time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(jax, "device_get", clock.wait)
    options = RunOptions(out=tmp_path, batch=10, seq=10, compute_dtype="float32")
    mesh: Any = jax.make_mesh((1,), ("data",))
    bar: Any = tqdm(disable=True)
    recorder = Recorder(options, SMALL, mesh, lambda step: 0.1 + 0 * step, log, bar)
    for step in range(1, 7):
        # The fake device puts the end of the step where the gradient's norm would be.
        metrics: Any = StepMetrics(loss=1.0, grad_norm=clock.dispatch())
        recorder.add(step, metrics)
    recorder.sync()
    throughputs = [row["tokens_per_s"] for row in log.rows]
    assert throughputs == pytest.approx([100.0] * 6)

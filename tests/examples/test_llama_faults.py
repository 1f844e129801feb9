"""Runs survive kills, damaged files, a full disk and gradients that are not finite.

Each run is a process. Steps are so short that a kill "at step k" comes one or two steps
later, at a point that differs from run to run.
"""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

STEPS = 60
REPOSITORY = Path(__file__).parents[2]
# Trains with batches that have a token outside the vocabulary at some steps, so that
# the gradients of these steps are not finite.
POISONED = """
import sys
from examples.llama.text import loader
from examples.llama import pretrain
steps, train_loader = {steps}, loader.train_loader

class Poisoned:
    def __init__(self, batches):
        self.batches, self.step = batches, 0
        self.get_state = batches.get_state
    def set_state(self, state):
        self.batches.set_state(state)
        self.step = {resumed}
    def __next__(self):
        self.step += 1
        return next(self.batches) + (10**6 if self.step in steps else 0)

loader.train_loader = lambda *args, **kwargs: Poisoned(train_loader(*args, **kwargs))
pretrain.main(sys.argv[1:])
"""
# Fails in place of the last save.
UNSAVED = """
import errno, os, signal, sys
from examples.llama.run import checkpoint
from examples.llama import pretrain
save = checkpoint.Checkpoints.save

def save_or_fail(self, step, *args):
    if step == {last}:
        {fail}
    save(self, step, *args)

checkpoint.Checkpoints.save = save_or_fail
pretrain.main(sys.argv[1:])
"""


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text to train on, and caches of programs and tokens beside it."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "text").mkdir()
    words = random.Random(0).choices(
        ["apple", "pear", "plum", "fig", "and", "or", "the", "a"], k=40_000
    )
    for number in range(50):
        (folder / "text" / f"{number}.txt").write_text(
            " ".join(words[number * 800 : (number + 1) * 800])
        )
    return folder


class Pretraining:
    """Starts runs with the same options, so that they should have the same losses."""

    def __init__(self, workshop: Path, out: Path) -> None:
        self.workshop, self.out = workshop, out
        self.environment = os.environ | {
            "XDG_CACHE_HOME": str(workshop / "cache"),
            "JAX_COMPILATION_CACHE_DIR": str(workshop / "programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(self, *changes: str, script: str = "") -> "subprocess.Popen[str]":
        program = ["-c", script] if script else ["-m", "examples.llama.pretrain"]
        options = [
            "--out",
            self.out,
            "--data",
            self.workshop / "text",
            "--vocab",
            "300",
            "--steps",
            STEPS,
        ]
        options += [
            "--batch",
            2,
            "--seq",
            16,
            "--eval-every",
            25,
            "--checkpoint-every",
            7,
        ]
        return subprocess.Popen(
            [
                sys.executable,
                *program,
                *map(str, options),
                "--resume",
                "auto",
                *changes,
            ],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *changes: str, script: str = "") -> tuple[int, str, str]:
        process = self.start(*changes, script=script)
        output, errors = process.communicate()
        return process.returncode, output, errors

    def rows(self) -> list[dict[str, float]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[tuple[float, float]]:
        return [(row["step"], row["loss"]) for row in self.rows()]

    def checkpoints(self) -> list[int]:
        folder = self.out / "checkpoints"
        return sorted(
            int(path.name) for path in folder.iterdir() if path.name.isdigit()
        )

    def when(
        self, process: "subprocess.Popen[str]", happens: Callable[[], bool]
    ) -> None:
        """Waits until `happens` is true, and fails if the process ends before."""
        while not happens():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)


@pytest.fixture
def pretraining(workshop: Path, tmp_path: Path) -> Pretraining:
    return Pretraining(workshop, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(
    workshop: Path, quick_examples: None, tmp_path_factory: pytest.TempPathFactory
) -> list[tuple[float, float]]:
    """The losses of an undisturbed run, compiled like the others."""
    run = Pretraining(workshop, tmp_path_factory.mktemp("straight") / "run")
    status, _, errors = run.run()
    assert status == 0, errors
    losses = run.losses()
    assert [step for step, _ in losses] == list(range(1, STEPS + 1))
    assert (
        losses[-1][1] < losses[0][1] - 0.5
    )  # The loss falls, so that other states would have other losses.
    return losses


@pytest.mark.parametrize("seed", range(20))
def test_killed_at_a_random_step(
    seed: int, pretraining: Pretraining, straight: list[tuple[float, float]]
) -> None:
    step = random.Random(seed).randrange(1, STEPS - 5)
    process = pretraining.start()
    pretraining.when(process, lambda: len(pretraining.rows()) >= step)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    process.communicate()
    assert len(pretraining.rows()) < STEPS
    status, _, errors = pretraining.run()
    assert status == 0, errors
    assert pretraining.losses() == straight


def test_killed_in_the_middle_of_a_save(
    workshop: Path, tmp_path: Path, straight: list[tuple[float, float]]
) -> None:
    landed = 0
    for attempt in range(12):
        pretraining = Pretraining(workshop, tmp_path / str(attempt))
        checkpoints = pretraining.out / "checkpoints"

        def saving(checkpoints: Path = checkpoints) -> bool:
            names = (
                [path.name for path in checkpoints.iterdir()]
                if checkpoints.exists()
                else []
            )
            return any("tmp" in name for name in names) and any(
                name.isdigit() for name in names
            )

        process = pretraining.start()
        pretraining.when(process, saving)
        process.kill()
        process.communicate()
        if not any("tmp" in path.name for path in checkpoints.iterdir()):
            continue  # The save had ended before the kill.
        landed += 1
        last = max(pretraining.checkpoints())
        status, _, errors = pretraining.run()
        assert status == 0, errors
        assert f"continuing after step {last} " in errors
        assert pretraining.losses() == straight
        assert not any("tmp" in path.name for path in checkpoints.iterdir())
        if landed == 3:
            return
    assert landed, "no kill came in the middle of a save"


@pytest.mark.parametrize(
    ("fail", "status"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))", 2),
    ],
)
def test_a_run_whose_last_save_fails_is_not_finished(
    fail: str,
    status: int,
    pretraining: Pretraining,
    straight: list[tuple[float, float]],
) -> None:
    script = UNSAVED.format(last=STEPS, fail=fail)
    for _ in range(2):  # A second failure is not the end either.
        assert pretraining.run(script=script)[0] == status
        assert pretraining.losses() == straight
        assert STEPS not in pretraining.checkpoints()
    last = pretraining.checkpoints()[-1]
    status, _, errors = pretraining.run()
    assert status == 0, errors
    assert f"continuing after step {last} " in errors
    assert pretraining.losses() == straight
    assert pretraining.checkpoints()[-1] == STEPS


def stopped(pretraining: Pretraining) -> int:
    """Starts a run and stops it halfway; returns the step of its last checkpoint."""
    process = pretraining.start()
    pretraining.when(process, lambda: len(pretraining.rows()) >= 30)
    process.terminate()
    process.communicate()
    assert len(pretraining.checkpoints()) == 2
    return pretraining.checkpoints()[-1]


# Either all files are truncated, or only those of the arrays, which are read last.
@pytest.mark.parametrize("part", ["", "state/ocdbt.process_0"])
def test_newest_checkpoint_truncated(
    part: str, pretraining: Pretraining, straight: list[tuple[float, float]]
) -> None:
    newest = stopped(pretraining)
    before = pretraining.checkpoints()[0]
    for path in (pretraining.out / "checkpoints" / str(newest) / part).rglob("*"):
        if path.is_file():
            os.truncate(path, path.stat().st_size // 2)
    status, _, errors = pretraining.run()
    assert status == 0, errors
    assert f"checkpoint {newest} cannot be read" in errors
    assert f"continuing after step {before} " in errors
    assert pretraining.losses() == straight
    assert (pretraining.out / "checkpoints" / f"{newest}.1").is_dir()


def test_every_checkpoint_truncated(pretraining: Pretraining) -> None:
    stopped(pretraining)
    for path in (pretraining.out / "checkpoints").rglob("*"):
        if path.is_file():
            os.truncate(path, 0)
    metrics = (pretraining.out / "metrics.jsonl").read_bytes()
    for _ in range(2):  # A supervisor may restart the run.
        status, _, errors = pretraining.run()
        assert status == 2
        assert "error: none of the checkpoints in " in errors.splitlines()[-1]
        assert (pretraining.out / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal(
    number: signal.Signals,
    pretraining: Pretraining,
    straight: list[tuple[float, float]],
) -> None:
    process = pretraining.start()
    pretraining.when(process, lambda: len(pretraining.rows()) >= 10)
    process.send_signal(number)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert "Traceback" not in errors
    step = pretraining.rows()[-1]["step"]
    assert f"stopped by {number.name} after step {step} of 60" in output
    assert str(pretraining.out / "checkpoints" / str(step)) in output
    assert pretraining.checkpoints()[-1] == step
    assert pretraining.run()[0] == 0
    assert pretraining.losses() == straight


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[None]:
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a tmpfs is not allowed here")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_disk_full_while_saving(
    workshop: Path, tmp_path: Path, straight: list[tuple[float, float]]
) -> None:
    def tokens() -> dict[str, bytes]:
        cache = workshop / "cache"
        return {
            path.name: path.read_bytes() for path in cache.rglob("*") if path.is_file()
        }

    before = tokens()
    assert before
    disk = tmp_path / "disk"
    with small_disk(disk, "15m"):
        run = Pretraining(workshop, disk / "run")
        status, _, errors = run.run()
        assert status == 2, errors
        line = errors.splitlines()[-1]
        assert line.startswith("error: ")
        assert "a checkpoint could not be written to " in line
        assert "make room there" in line
        kept = run.checkpoints()
        assert kept
        assert "make room there" in line
        assert (
            f"the last good checkpoint is {disk / 'run' / 'checkpoints' / str(kept[-1])}"
            in line
        )
        subprocess.run(["mount", "-o", "remount,size=400m", str(disk)], check=True)
        status, _, errors = run.run()
        assert status == 0, errors
        assert f"continuing after step {kept[-1]} " in errors
        assert run.losses() == straight
    assert tokens() == before


def test_disk_full_at_any_other_time(workshop: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with small_disk(disk, "64m"):
        run = Pretraining(workshop, disk / "run")
        process = run.start(
            "--steps",
            "100000",
            "--eval-every",
            "100000",
            "--checkpoint-every",
            "100000",
        )
        run.when(process, lambda: len(run.rows()) >= 10)
        filler = disk / "filler"
        with contextlib.suppress(OSError), filler.open("wb") as file:
            while True:
                file.write(b"x" * 2**16)
                file.flush()
        _, errors = process.communicate(
            timeout=60
        )  # It neither waits forever nor trains without a record.
        assert process.returncode == 2, errors
        assert "No space left on device" in errors.splitlines()[-1]
        assert "make room there" in errors.splitlines()[-1]
        before = {
            path: path.read_bytes()
            for path in run.out.rglob("*.json*")
            if path.is_file()
        }
        status, _, errors = Pretraining(workshop, disk / "other").run()
        assert status == 2
        assert "No space left on device" in errors.splitlines()[-1]
        assert all(path.read_bytes() == content for path, content in before.items())


def test_a_gradient_that_is_not_finite_stops_the_run(pretraining: Pretraining) -> None:
    script = POISONED.format(steps={12}, resumed=7)
    status, _, errors = pretraining.run(script=script)
    assert status == 2
    last = errors.splitlines()[-1]
    assert last.startswith(
        "error: the loss is nan and the gradient's norm nan at step 12; "
    )
    assert (
        f"the last good checkpoint is {pretraining.out / 'checkpoints' / '7'}" in last
    )
    assert [row["step"] for row in pretraining.rows()] == list(range(1, 12))
    # A resumed run can skip the step.
    status, _, errors = pretraining.run("--on-nonfinite", "skip", script=script)
    assert status == 0, errors
    assert "continuing after step 7 " in errors
    assert [row["loss"] is None for row in pretraining.rows()].index(True) == 11


def test_gradients_that_are_not_finite_are_skipped(
    pretraining: Pretraining, straight: list[tuple[float, float]]
) -> None:
    script = POISONED.format(steps={12, 13, 40}, resumed=0)
    status, _, errors = pretraining.run("--on-nonfinite", "skip", script=script)
    assert status == 0, errors
    rows = pretraining.rows()
    assert [row["step"] for row in rows if row["loss"] is None] == [12, 13, 40]
    assert [rows[step - 1]["skipped_steps"] for step in (11, 12, 13, 39, 40, 60)] == [
        0,
        1,
        2,
        2,
        3,
        3,
    ]
    assert (
        rows[11]["lr"] == rows[12]["lr"] == rows[13]["lr"]
    )  # Skipped steps do not advance it.
    # The step that may skip is another program, and rounds otherwise.
    losses = [loss for _, loss in straight[:11]]
    assert [row["loss"] for row in rows[:11]] == pytest.approx(losses, rel=1e-6)
    assert "val_loss" in rows[-1]

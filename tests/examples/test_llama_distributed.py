"""Runs of two processes with four devices each: what they compute and how they end."""

import dataclasses
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from examples.llama import pretrain
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.options import RunOptions
from examples.llama.run import distributed
from examples.llama.run import log as run_log
from examples.llama.run.errors import UsageError

REPOSITORY = Path(__file__).parents[2]
# The model has eight heads, and eight devices divide its sizes.
WIDE = LlamaConfig(384, 64, 48, 8, 2, max_seq_len=128)
SCRIPT = f"""
import sys
import jax
from examples.llama import config, pretrain
jax.config.update("jax_disable_most_optimizations", True)
config.PRESETS["tiny"] = config.LlamaConfig(**{dataclasses.asdict(WIDE)})
pretrain.main()
"""
# The steps are slowed, so that a test can act between two of them.
SLOWED = f"""
import time
from examples.llama.text import loader
train_loader = loader.train_loader

class Slow:
    def __init__(self, batches):
        self.batches = batches
        self.get_state, self.set_state = batches.get_state, batches.set_state
    def __next__(self):
        time.sleep(0.5)
        return next(self.batches)

loader.train_loader = lambda *args, **kwargs: Slow(train_loader(*args, **kwargs))
{SCRIPT}"""
MESH = ["--mesh", "data=2,fsdp=2,tensor=2"]


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with text to train on, and caches of programs and tokens beside it."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "text").mkdir()
    words = random.Random(0).choices(
        ["apple", "pear", "plum", "fig", "and", "or", "the", "a"], k=20_000
    )
    for number in range(25):
        (folder / "text" / f"{number}.txt").write_text(
            " ".join(words[number * 800 : (number + 1) * 800])
        )
    return folder


class Processes:
    """Starts the two processes of a run, each with options of its own if need be."""

    def __init__(self, workshop: Path, out: Path) -> None:
        self.out = out
        self.options = [
            "--out",
            out,
            "--data",
            workshop / "text",
            "--vocab",
            "300",
            "--steps",
            "8",
        ]
        self.options += [
            "--batch",
            "8",
            "--seq",
            "16",
            "--optimizer",
            "apollo",
            "--resume",
            "auto",
        ]
        self.environment = os.environ | {
            "XDG_CACHE_HOME": str(workshop / "cache"),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "4",
            "PYTHONPATH": str(REPOSITORY),
        }

    def start(
        self,
        *both: str,
        apart: tuple[list[str], list[str]] = ([], []),
        script: str = SCRIPT,
    ) -> list["subprocess.Popen[str]"]:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            where = f"localhost:{free.getsockname()[1]}"
        return [
            subprocess.Popen(
                [
                    sys.executable,
                    "-c",
                    script,
                    *map(str, self.options),
                    *both,
                    *alone,
                    "--coordinator",
                    where,
                    "--processes",
                    "2",
                    "--process-id",
                    str(process),
                ],
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for process, alone in enumerate(apart)
        ]

    def run(
        self, *both: str, apart: tuple[list[str], list[str]] = ([], [])
    ) -> list[tuple[int, str, str]]:
        """Returns the exit status, the output and the errors of each process."""
        return ended(self.start(*both, apart=apart))

    def rows(self) -> list[dict[str, float]]:
        path = self.out / "metrics.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self) -> list[float]:
        return [row["loss"] for row in self.rows()]


def ended(processes: list["subprocess.Popen[str]"]) -> list[tuple[int, str, str]]:
    said = [process.communicate() for process in processes]
    return [
        (process.returncode, *words)
        for process, words in zip(processes, said, strict=True)
    ]


def errors_of(ends: list[tuple[int, str, str]]) -> list[str]:
    """Returns the one line of error of each process."""
    assert [status for status, _, _ in ends] == [2] * len(ends), ends
    lines = [
        [line for line in errors.splitlines() if line.startswith("error: ")]
        for _, _, errors in ends
    ]
    assert [len(each) for each in lines] == [1] * len(ends), ends
    return [line for (line,) in lines]


@pytest.fixture
def processes(workshop: Path, tmp_path: Path) -> Processes:
    return Processes(workshop, tmp_path / "run")


@pytest.fixture(scope="module")
def straight(
    workshop: Path, quick_examples: None, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    """The losses of one process with one device, compiled as the others are."""
    alone = Processes(workshop, tmp_path_factory.mktemp("straight") / "run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", WIDE)
        patch.setenv("XDG_CACHE_HOME", alone.environment["XDG_CACHE_HOME"])
        pretrain.main(list(map(str, alone.options)))
    losses = alone.losses()
    assert (
        losses[-1] < losses[0] - 0.5
    )  # The loss falls, so that other states would have other losses.
    return losses


def test_two_processes_train_as_one(
    processes: Processes, straight: list[float]
) -> None:
    first, second = processes.run(*MESH)
    assert first[0] == second[0] == 0, (first, second)
    np.testing.assert_allclose(processes.losses(), straight, rtol=1e-5)
    # The second process prints nothing.
    assert "best validation perplexity" in first[1]
    assert "parameters in float32" in first[2]
    assert "8/8" in first[2]
    assert "validation" not in second[1] + second[2]
    assert "8/8" not in second[2]
    assert sorted(path.name for path in processes.out.iterdir()) == sorted(
        {*run_log.OF_A_RUN, run_log.LOCK} - {run_log.PRETRAINED, run_log.BEST}
    )


def test_processes_with_different_options(processes: Processes) -> None:
    lines = errors_of(
        processes.run(*MESH, apart=(["--lr", "0.01"], ["--lr", "0.02", "--seed", "1"]))
    )
    assert lines[0] == lines[1]
    assert "the processes have different options: " in lines[0]
    assert "lr is 0.01 on process 0 and 0.02 on process 1" in lines[0]
    assert "seed is 0 on process 0 and 1 on process 1" in lines[0]
    assert not processes.out.exists()


def test_bad_input_ends_every_process(processes: Processes) -> None:
    """Each prints a line, also if only the first process sees the error."""
    lines = errors_of(processes.run("--mesh", "data=4"))
    assert lines[0] == lines[1]
    assert lines[0].startswith(
        "error: --mesh data=4 needs 4 devices, and the devices here are 8 (cpu); "
    )
    assert not processes.out.exists()
    processes.out.mkdir()
    (processes.out / "metrics.jsonl").write_text("earlier")
    first, second = errors_of(processes.run(*MESH))
    assert f"--out {processes.out} already holds a run (metrics.jsonl)" in first
    assert second.startswith(
        f"error: process 0 failed: --out {processes.out} already holds a run"
    )


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_process_is_killed(
    victim: int, processes: Processes, straight: list[float]
) -> None:
    """The other ends within a minute. Both continue from a checkpoint on a new mesh."""
    long = ["--checkpoint-every", "2", "--keep-checkpoints", "9"]
    both = processes.start(*MESH, *long, script=SLOWED)
    when(both, lambda: len(processes.rows()) >= 5)
    both[victim].kill()
    other = both[1 - victim]
    _, errors = other.communicate(
        timeout=60
    )  # It neither waits forever nor trains alone.
    assert other.returncode not in (0, None)
    assert re.search("another has ended|another task died", errors), errors
    both[victim].communicate()
    for status, _, errors in (ends := processes.run("--mesh", "tensor=8", *long)):
        assert status == 0, errors
    assert re.search("continuing after step [24] of 8", ends[0][2])
    np.testing.assert_allclose(processes.losses(), straight, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_one_process_is_asked_to_stop(
    asked: int, processes: Processes, straight: list[float]
) -> None:
    both = processes.start(*MESH, script=SLOWED)
    when(both, lambda: len(processes.rows()) >= 2)
    both[asked].send_signal(signal.SIGTERM)
    first, second = ended(both)
    assert first[0] == second[0] == 0, (first, second)
    step = len(processes.rows())
    assert 3 <= step < 8
    assert f"stopped by SIGTERM after step {step} of 8" in first[1]
    assert "stopped" not in second[1]
    assert (processes.out / "checkpoints" / str(step)).is_dir()
    for status, _, errors in processes.run(*MESH):
        assert status == 0, errors
    np.testing.assert_allclose(processes.losses(), straight, rtol=1e-5)


def when(processes: list["subprocess.Popen[str]"], happens: Callable[[], bool]) -> None:
    """Waits until `happens` is true, and fails if a process ends before."""
    while not happens():
        assert all(process.poll() is None for process in processes), ended(processes)
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"processes": 2},
            "--coordinator, --processes and --process-id go together; add --coordinator HOST:PORT and ",
        ),
        (
            {"coordinator": "here", "processes": 2, "process_id": 0},
            "--coordinator here is malformed; give",
        ),
        (
            {"coordinator": "h:1", "processes": 2, "process_id": 2},
            "--process-id 2 is out of range; give 0 to",
        ),
        ({"processes": 0}, "--processes 0 is out of range; give a number above 0"),
    ],
)
def test_rejects_process_options(given: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as error:
        RunOptions(out=Path("nowhere"), **given)
    assert str(error.value).startswith(message)


def test_a_process_that_waits_for_the_others_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def initialize(*args: Any, **settings: Any) -> None:
        assert settings["initialization_timeout"] == 300
        time.sleep(0.5)
        raise RuntimeError("DEADLINE_EXCEEDED: too late")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    monkeypatch.setattr(distributed, "SILENT_SECONDS", 0.1)
    options = RunOptions(
        out=Path("nowhere"), coordinator="host0:9876", processes=2, process_id=1
    )
    with pytest.raises(
        UsageError,
        match="not met at host0:9876 .DEADLINE_EXCEEDED: too late.; see whether one",
    ):
        distributed.start(options)
    waits = "this process waits for the others at host0:9876, 300 seconds at the most\n"
    assert capsys.readouterr().err == waits


def test_without_a_cluster_a_command_runs_alone(processes: Processes) -> None:
    alone = subprocess.run(
        [
            sys.executable,
            "-c",
            SCRIPT,
            *map(str, processes.options),
            "--mesh",
            "data=3",
            "--batch",
            "6",
        ],
        env=processes.environment,
        capture_output=True,
        text=True,
    )
    (line,) = errors_of([(alone.returncode, alone.stdout, alone.stderr)])
    assert "--mesh data=3 needs 3 devices, and the devices here are 4 (cpu)" in line

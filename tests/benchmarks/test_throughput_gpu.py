import os
import time
from typing import Any

import pytest

from benchmarks import throughput_gpu
from benchmarks.throughput_gpu import Device, Options, Trained, in_process
from examples.llama import config
from examples.llama.options import RunOptions
from examples.llama.usage import UsageError

SMALL = config.LlamaConfig(
    vocab_size=384, hidden_size=16, intermediate_size=24, num_heads=2, num_layers=2, max_seq_len=128
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def here(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Runs all in this process and at once; returns the environments that processes would have had."""
    environments = []

    def call(variables: dict[str, str], function: Any, *args: Any) -> Any:
        environments.append(variables)
        return function(*args)

    monkeypatch.setattr(throughput_gpu, "in_process", call)
    monkeypatch.setattr(throughput_gpu, "TIMED_SECONDS", 0.0)
    monkeypatch.setitem(config.PRESETS, "tiny", SMALL)
    return environments


def test_the_table_has_a_row_for_each_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def train(run: RunOptions) -> Trained:
        return Trained(run.batch, 1000.0 * (1 + run.layerwise), 0.5, 2 * 10**9)

    def line(run: RunOptions, platform: str) -> tuple[float, float]:
        assert platform == "cpu"
        return (10e9, 1e9) if run.optimizer == "adamw" else (40e9, 1e9)

    monkeypatch.setattr(throughput_gpu, "train", train)
    monkeypatch.setattr(throughput_gpu, "line", line)
    throughput_gpu.main(["--model", "tiny", "--caps", "40GB", "100GB"])
    rows = [
        [cell.strip() for cell in text.split("|")[1:-1]]
        for text in capsys.readouterr().out.splitlines()
        if "| " in text
    ]
    adamw, mini, int8 = "adamw, bfloat16 moments", "apollo-mini", "apollo-mini, layer-wise, int8 weights"
    shown = ["50.0%", "2.00"]
    assert rows[2:] == [
        ["40GB", adamw, "28", "1,000", "1.00", *shown],
        ["100GB", adamw, "87", "1,000", "1.00", *shown],
        ["40GB", "apollo-mini, layer-wise", "does not fit", "", "", "", ""],
        ["100GB", "apollo-mini, layer-wise", "57", "2,000", "2.00", *shown],
        ["all", int8, "1", "2,000", "", *shown],
        ["40GB", mini, "does not fit", "", "", "", ""],
        ["100GB", mini, "57", "1,000", "1.00", *shown],
    ]


def test_it_trains() -> None:
    run = throughput_gpu.cases(Options(model="tiny", seq=16))[0].run
    trained = throughput_gpu.train(run)
    assert trained is not None
    assert trained.batch == 1
    assert trained.tokens_per_s > 0


def test_the_line_gives_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    run = throughput_gpu.cases(Options(model="tiny"))[0].run
    monkeypatch.setattr(throughput_gpu, "peak_bytes", lambda run, platform: 100 + 7 * run.batch)
    line = throughput_gpu.line(run, "cpu")
    assert line == (100.0, 7.0)
    assert throughput_gpu.largest_batch(line, 170.0) == 10
    assert throughput_gpu.largest_batch(line, 169.9) == 9
    assert throughput_gpu.largest_batch(line, 99.0) < 1


def test_a_run_that_does_not_fit_is_tried_smaller(
    monkeypatch: pytest.MonkeyPatch, here: list[dict[str, str]]
) -> None:
    def train(run: RunOptions) -> Trained | None:
        return Trained(run.batch, 1.0, None, None) if run.batch <= 80 else None

    monkeypatch.setattr(throughput_gpu, "train", train)
    monkeypatch.setattr(throughput_gpu, "line", lambda run, platform: (0.0, 9.7e8))
    case = throughput_gpu.cases(Options(caps=("100GB",)))[0]
    there = Device("gpu", int(200e9), "")
    bench = throughput_gpu.Bench(there, time.monotonic())
    assert bench.measured(case) == Trained(72, 1.0, None, None)  # 100, 90 and 81 did not fit.
    assert {"XLA_CLIENT_MEM_FRACTION": "0.5000"} in here
    too_large = case._replace(cap="500MB")
    assert bench.measured(too_large) == "does not fit"
    late = throughput_gpu.Bench(there, time.monotonic() - 600)
    assert late.measured(case) == "no time left"


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        throughput_gpu.main([])
    assert "--model 7b takes a GPU, and JAX finds none (cpu)" in capsys.readouterr().err


def test_a_cap_above_the_memory_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--caps 64GB is more than the GPU has, 40\.0 GB"):
        throughput_gpu.check_device(Options(caps=("16GB", "64GB")), Device("gpu", int(40e9), ""))


def test_a_process_has_more_variables_and_leaves_none() -> None:
    before = dict(os.environ)
    assert in_process({"APOLLO_TEST": "1"}, os.getenv, "APOLLO_TEST") == "1"
    assert dict(os.environ) == before

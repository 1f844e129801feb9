import contextlib
import json
import math
import os
import subprocess
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from benchmarks import hlo
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import bench as benches
from benchmarks.gpu import check, launches, memory, needs, step, throughput, train
from benchmarks.gpu.bench import Bench, Device, Job
from benchmarks.gpu.report import Report
from benchmarks.gpu.worker import Failed, Worker, reason_of
from benchmarks.step_contenders import Setting, methods
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError
from tests.benchmarks.rows import counting, failing, variable

ROOT = Path(__file__).parents[2]
SOON = 60.0  # Seconds. A process starts in a few.


def deadline(seconds: float = SOON) -> float:
    return time.monotonic() + seconds


def test_a_worker_answers_as_often_as_it_is_asked() -> None:
    with Worker(counting, "a") as worker:
        assert worker.prepared(deadline()) == "a 0"
        assert worker.ask(deadline()) == "a 1"
        assert worker.ask(deadline()) == "a 2"


def test_variables_of_a_worker_do_not_stay_in_the_environment() -> None:
    before = dict(os.environ)
    with Worker(variable, "APOLLO_TEST", variables={"APOLLO_TEST": "1"}) as worker:
        assert worker.prepared(deadline()) == "1"
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("kind", "prepared", "reason"),
    [
        ("usage", False, "--batch 0 is out of range"),
        ("memory", False, "out of memory"),
        ("crash", True, "ended with SIGSEGV"),
        ("hang", True, "ran out of time"),
    ],
)
def test_a_failed_row_has_a_reason(kind: str, prepared: bool, reason: str) -> None:
    started = time.monotonic()
    with Worker(failing, kind) as worker:
        assert worker.prepared(deadline()) == (None if prepared else Failed(reason))
        assert worker.ask(deadline(1 if kind == "hang" else SOON)) == Failed(reason)
        assert worker.ask(deadline()) == Failed(reason)  # The answer stays the same.
    assert time.monotonic() - started < 100  # A row that hangs is ended.


def test_a_reason_fits_a_cell() -> None:
    assert (
        reason_of(jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 TB"))
        == "out of memory"
    )
    reason = reason_of(ValueError("a | b\nsecond line"))
    assert reason == "ValueError: a / b"


def make_bench(folder: Path, **changed: Any) -> Bench:
    report = Report(folder, "part", "a card")
    device = Device("cpu", "cpu", None, "a card")
    fields = {
        "deadline": deadline(),
        "rehearse": True,
        "dump": False,
        "only": "",
    } | changed
    return Bench(report, device, **fields)


def test_each_job_is_put_and_a_failure_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benches, "rows_per_wave", lambda: 2)
    jobs = [
        Job("fine", counting, ("a",)),
        Job("crash", failing, ("crash",)),
        Job("left out", counting, ("b",)),
        Job("last", counting, ("c",)),
    ]
    found = {}
    make_bench(tmp_path, only="fine|crash|last").measure(
        jobs, lambda job, known, result: found.update({job.name: result})
    )
    assert found == {
        "fine": "a 1",
        "crash": Failed("ended with SIGSEGV"),
        "last": "c 1",
    }


def test_a_row_that_hangs_leaves_time_to_the_others(tmp_path: Path) -> None:
    jobs = [Job("hang", failing, ("hang",)), Job("fine", counting, ("a",))]
    found = {}
    make_bench(tmp_path, deadline=deadline(14)).measure(
        jobs, lambda job, known, result: found.update({job.name: result})
    )
    assert found == {"hang": Failed("ran out of time"), "fine": "a 1"}


def test_no_row_starts_without_time(tmp_path: Path) -> None:
    found = []
    make_bench(tmp_path, deadline=deadline(-1)).measure(
        [Job("late", counting, ("a",))],
        lambda job, known, result: found.append((job.name, result)),
    )
    assert found == [("late", Failed("no time left"))]


def test_a_report_is_on_disk_after_each_row(tmp_path: Path) -> None:
    report = Report(tmp_path, "part", "a card; 2026-11-27")
    table = report.table("A title", ("name", "number"), numbers_from=1)
    table.put("a", ["a", "1"], {"number": 1})
    assert "| a | 1 |" in (tmp_path / "part.md").read_text()
    table.put("b", ["b"])
    table.put("a", ["a", "2"], {"number": 2})
    report.note("A note.")
    text = (tmp_path / "part.md").read_text()
    assert text.startswith(
        "`python -m benchmarks.gpu part` (a card; 2026-11-27)\n\nA title\n"
    )
    assert text.endswith("| a | 2 |\n| b |  |\n\nA note.\n")
    kept = json.loads((tmp_path / "part.json").read_text())
    (row, _) = kept["tables"][0]["rows"]
    assert row == {
        "name": "a",
        "cells": {"name": "a", "number": "2"},
        "values": {"number": 2},
    }


def test_programs_are_packed_into_one_file(tmp_path: Path) -> None:
    bench = make_bench(tmp_path, dump=True)
    compiled = jax.jit(lambda x: x + 1).lower(1.0).compile()
    benches.keep_hlo(bench.hlo("adamw, float32 moments"), compiled)
    bench.pack_hlo()
    assert [path.name for path in tmp_path.iterdir()] == ["part-hlo.zip"]
    assert make_bench(tmp_path).hlo("a row") is None


def test_every_row_of_the_step_is_known() -> None:
    setting = Setting("7b", "bfloat16", "unstacked", step.LAYERS)
    known = {method.name for group in methods(setting).values() for method in group}
    assert known.issuperset(step.ROWS)
    # AdamW with float32 moments, and the temporaries of a step, fit 78 GiB.
    adamw = next(
        m for m in methods(setting)["adamw"] if m.name == step.ADAMW["float32"]
    )
    kernels = setting.kernels()
    assert len(kernels) == 7 * step.LAYERS
    state = step.tree_bytes(jax.eval_shape(adamw.make().init, kernels))
    assert 2 * step.tree_bytes(kernels) + state < 0.6 * 78 * 2**30


def test_checks_fail_where_the_numbers_differ(tmp_path: Path) -> None:
    table = Report(tmp_path, "check", "").table("", check.HEAD, 1)
    check.put_outcome(table, "0", check.Outcome("too far", 2e-5, 1e-5))
    check.put_outcome(table, "1", check.Outcome("near", 1e-5, 1e-5))
    check.put_outcome(table, "2", check.Outcome("not a number", float("nan"), 1e-5))
    rows = table.as_json()["rows"]
    assert [row["cells"][""] for row in rows] == ["FAILED", "passed", "FAILED"]
    assert (
        check.largest_difference({"a": np.ones(3)}, {"a": np.array([1, 1, 2])}) == 0.5
    )


@pytest.mark.parametrize("measured", [1e-5, 2e-5])
def test_a_failed_check_is_a_failed_command(
    measured: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: Bench, jobs: list[Job], put: Any) -> None:
        put(jobs[0], None, [check.Outcome("golden", measured, 1e-5)])
        put(jobs[1], None, Failed("it needs a GPU"))

    monkeypatch.setattr(Bench, "measure", measure)
    device = Device("cpu", "cpu", None, "a card")
    monkeypatch.setattr(benches, "this_device", lambda: device)
    monkeypatch.setattr(needs, "missing", list)
    args = ["check", "--rehearse", "--out", str(tmp_path)]
    if measured <= 1e-5:
        gpu.main(args)
        return
    with pytest.raises(SystemExit) as exit_:
        gpu.main(args)
    assert exit_.value.code == 1


def test_important_memory_rows_come_first() -> None:
    names = [memory.name_of(run) for run in memory.planned_runs("7b", 256)]
    assert names[:3] == [
        "int8, embeddings under adam, batch 1",
        "bfloat16 in host memory, embeddings under apollo, batch 1",
        "bfloat16 in host memory, embeddings under apollo, batch 8",
    ]
    assert len(set(names)) == len(names)


def test_the_line_gives_the_largest_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    def memory_of(run: RunOptions, platform: str) -> Any:
        assert platform == "cpu"
        return type("Memory", (), {"peak_bytes": 100 + 7 * run.batch})

    monkeypatch.setattr(throughput, "memory_of", memory_of)
    run = throughput.cases("tiny", 16, [10])[0].run
    (line,) = throughput.line(run, "cpu")
    assert line == (100.0, 7.0)
    assert throughput.largest_batch(line, 170.0) == 10
    assert throughput.largest_batch(line, 169.9) == 9
    assert throughput.largest_batch(line, 99.0) < 1


def test_tries_a_smaller_batch_if_one_does_not_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench, tried = make_bench(tmp_path), []
    bench = Bench(
        bench.report, Device("gpu", "", 200 * 10**9, ""), deadline(), True, False
    )

    def measure(self: Bench, jobs: list[Job], put: Any) -> None:
        run = jobs[0].args[0]
        tried.append((run.batch, jobs[0].variables["XLA_CLIENT_MEM_FRACTION"]))
        put(jobs[0], None, "trained" if run.batch <= 80 else Failed("out of memory"))

    monkeypatch.setattr(Bench, "measure", measure)
    case = throughput.cases("tiny", 16, [100 * 10**9])[0]
    assert throughput.measured(bench, case, (0.0, 9.7e8)) == (72, "trained")
    assert tried == [(batch, "0.5000") for batch in (100, 90, 81, 72)]
    too_small = throughput.measured(bench, case, (2e11, 9.7e8))
    assert too_small[1] == Failed("does not fit")
    assert throughput.measured(bench, case, Failed("crashed"))[1] == Failed("crashed")


def test_steps_fill_the_time_up_to_one_epoch(tmp_path: Path) -> None:
    run = train.sizes(True).quality
    tokens = run.batch * run.seq
    text = train.Text(10**9, "key")
    bench = make_bench(tmp_path, deadline=deadline(train.PREPARE_SECONDS + 200))
    steps = train.steps_that_fit(bench, run, text, rate=1e6, count=2)
    expected = (train.SHARE_OF_TIME * 100 - train.RUN_SECONDS) * 1e6 / tokens
    assert steps == pytest.approx(expected, rel=0.01)
    short = text._replace(train_tokens=10 * tokens + 1)
    assert train.steps_that_fit(bench, run, short, rate=1e6, count=2) == 10
    late = make_bench(tmp_path, deadline=deadline(1))
    assert train.steps_that_fit(late, run, text, rate=1e6, count=2) < 1


def test_losses_are_thinned_to_means() -> None:
    losses = np.arange(250.0)
    curve = train.thinned(losses)
    assert len(curve) == train.CURVE_POINTS
    assert curve[0] == (3, 1.0)
    assert curve[-1] == (250, 248.5)
    assert train.thinned(np.array([2.0])) == [(1, 2.0)]


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["steps"], "'steps'"),
        (["--dump", "all"], "'all'"),
        (["--seconds", "60"], "'60'"),
        (["--seconds", "check=-1"], "'check=-1'"),
        (["--total-seconds", "0"], "0.0"),
        (["--steps", "0"], "--steps 0"),
        (["--only", "("], "'('"),
        (["--optimizers", "adam"], "'adam'"),
    ],
)
def test_rejects_bad_options(
    args: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main(args)
    assert named in capsys.readouterr().err


def test_rejects_a_machine_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        benches, "this_device", lambda: Device("cpu", "a CPU", None, "")
    )
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["--out", str(tmp_path / "out")])
    assert "finds no GPU, only a CPU" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_lists_its_needs_without_jax() -> None:
    code = "import sys; sys.modules['jax'] = None; from benchmarks.gpu import __main__ as m; m.main(['--needs'])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    )
    lines = dict(line.split(", ", 1) for line in done.stdout.splitlines())
    assert lines.keys() >= {*needs.REQUIRED, *needs.OPTIONAL}
    assert all("MISSING" not in lines[name] for name in needs.REQUIRED)


IMPORTS = """
import ast, importlib, sys
from pathlib import Path
for name in ("bench", "check", "launches", "memory", "step", "throughput", "train"):
    importlib.import_module(f"benchmarks.gpu.{name}")
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("examples", "benchmarks") and module.__file__:
        for node in ast.parse(Path(module.__file__).read_text()).body:
            if isinstance(node, ast.Import):
                print(*(alias.name for alias in node.names), sep="\\n")
            elif isinstance(node, ast.ImportFrom):
                print(node.module)
"""


def test_the_needs_are_what_the_parts_import() -> None:
    printed = subprocess.check_output(
        [sys.executable, "-c", IMPORTS], cwd=ROOT, text=True
    )
    imported = {name.partition(".")[0] for name in printed.split()}
    ours = {"apollo_optax", "benchmarks", "examples"}
    packages = metadata.packages_distributions()
    distributions = {
        packages[name][0].lower()
        for name in imported - ours - set(sys.stdlib_module_names)
    }
    assert distributions <= {name.lower() for name in needs.REQUIRED}


def test_names_a_missing_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(needs.REQUIRED, "no-such-package", "nothing")
    with pytest.raises(SystemExit, match="2"):
        gpu.main(["check"])
    assert "no-such-package must be installed" in capsys.readouterr().err


def rehearse(parts: list[str], only: str, tmp_path: Path) -> None:
    """Runs parts at tiny sizes, and checks that each has results."""
    text, out = tmp_path / "text", tmp_path / "out"
    text.mkdir()
    for number in range(12):
        (text / f"{number}.txt").write_text(
            f"Document {number}: " + "some words of text, " * 400
        )
    environment = os.environ | {
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "JAX_PLATFORMS": "cpu",
    }
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu",
        *parts,
        "--rehearse",
        "--only",
        only,
    ]
    command += ["--out", str(out), "--data", str(text), "--dump", "step"]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for part in parts:
        found = json.loads((out / f"{part}.json").read_text())
        assert found["part"] == part
        assert (out / f"{part}.md").read_text() in done.stdout
        rows = [row for table in found["tables"] for row in table["rows"]]
        assert any(row["values"] for row in rows), part
    if "step" in parts:
        assert (out / "step-hlo.zip").exists()
    if "check" in parts:
        assert "needs cuDNN's flash attention" in done.stdout


def test_rehearsal_of_one_part(tmp_path: Path) -> None:
    """One row of the part that trains no model."""
    rehearse(["step"], "^adamw, .*, unstacked", tmp_path)


@pytest.mark.slow
def test_rehearsal_of_short_parts(tmp_path: Path) -> None:
    """One row of each part that trains no model for long."""
    only = "stochastic|cuDNN.*64|^adamw, .*, unstacked|^int8"
    rehearse(["check", "step", "memory"], only, tmp_path)


@pytest.mark.slow
def test_rehearsal_of_all_parts(tmp_path: Path) -> None:
    rehearse(list(gpu.PARTS), "stochastic|cuDNN.*64|adamw|^int8", tmp_path)
    assert (tmp_path / "out" / "train.png").exists()
    (name,) = train.kept_runs(tmp_path / "out" / "train.json")
    assert name == "adamw, lr 0.002, lr emb 0.03, seed 0, 4 steps of 4 sequences"


def test_a_second_call_adds_to_the_runs_of_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []

    def measure(self: Bench, jobs: list[Job], put: Any) -> None:
        measured.extend(job.name for job in jobs)
        for job in jobs:
            put(job, None, train.Curve([(4, 7.0)], [(0, 8.0), (4, 7.5)], 1e6))

    monkeypatch.setattr(Bench, "measure", measure)

    def call(*seeds: int, batch: int | None = None, key: str = "key") -> list[str]:
        bench, sizes = make_bench(tmp_path), train.sizes(True, batch)
        options = train.QualityOptions(optimizers=("adamw", "muon"), seeds=seeds)
        kept, text = train.kept_runs(train.json_of(bench)), train.Text(10**6, key)
        table = train.quality_table(bench, kept)
        train.quality(bench, sizes, options, text, 1e6, kept, table)
        return list(train.kept_runs(train.json_of(bench)))

    first = [
        f"{rate}, lr emb 0.03, seed 0, 4 steps of 4 sequences"
        for rate in ("adamw, lr 0.002", "muon, lr 0.007")
    ]
    second = [name.replace("seed 0", "seed 1") for name in first]
    larger = [name.replace("of 4", "of 8") for name in first]
    assert call(0) == first
    assert call(0, 1) == [*first, *second]
    assert len(measured) == 4  # The runs of the first call are not repeated.
    assert call(0, batch=8) == [*first, *second, *larger]
    with pytest.raises(UsageError, match="'text': 'key'.* has .*'text': 'other'"):
        call(0, key="other")
    assert (tmp_path / "train.png").exists()


class Tokenised:
    """Stands for the worker that tokenises the text of a call."""

    found: train.Text | Failed = train.Text(10**6, "other")

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> "Tokenised":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepared(self, deadline: float) -> train.Text | Failed:
        del deadline
        return self.found


@pytest.mark.parametrize("end", ["another text", "no text", "no steps", "stopped"])
def test_a_call_that_ends_early_keeps_the_runs_of_the_first(
    end: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def utilisation(bench: Bench, runs: Any, table: Any) -> dict[str, float]:
        del runs
        table.put("adamw", ["60m", "adamw"])
        if end == "stopped":
            raise KeyboardInterrupt
        return {}

    texts = {"no text": Failed("no text"), "no steps": train.Text(10**6, "key")}
    monkeypatch.setattr(Tokenised, "found", texts.get(end, Tokenised.found))
    monkeypatch.setattr(train, "utilisation", utilisation)
    monkeypatch.setattr(train, "Worker", Tokenised)
    values = {"validation": [[1, 7.0]], "device": "cpu", "text": "key", "batch": 1}
    cells = dict.fromkeys(train.QUALITY_HEAD, "1")
    row = {"name": "adamw", "cells": cells, "values": values | {"steps": 1}}
    bench = make_bench(tmp_path, rehearse=False)
    path = train.json_of(bench)
    path.write_text(json.dumps({"tables": [{"rows": [row]}]}))
    steps = None if end == "no steps" else 4
    expected = {
        "another text": pytest.raises(UsageError, match="can't be in one table"),
        "stopped": pytest.raises(KeyboardInterrupt),
    }
    with expected.get(end, contextlib.nullcontext()):
        train.run(bench, train.QualityOptions(steps=steps))
    assert list(train.kept_runs(path)) == ["adamw"]
    assert "| adamw |" in path.with_suffix(".md").read_text()  # This call measured it.


PROGRAM = """\
HloModule jit_step, is_scheduled=true

%fused (p: f32[4]) -> f32[4] {
  %p = f32[4]{0} parameter(0)
  ROOT %neg = f32[4]{0} negate(%p)
}

%body (carry: (s32[], f32[4])) -> (s32[], f32[4]) {
  %carry = (s32[], f32[4]{0}) parameter(0)
  %x = f32[4]{0} get-tuple-element(%carry), index=1
  %a = f32[4]{0} fusion(%x), kind=kLoop, calls=%fused
  %b = f32[4]{0} custom-call(%a), custom_call_target="gemm"
  ROOT %next = (s32[], f32[4]{0}) tuple(%x, %b)
}

%cond (carry: (s32[], f32[4])) -> pred[] {
  %carry.1 = (s32[], f32[4]{0}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%one (p.1: f32[4]) -> f32[4] {
  ROOT %p.1 = f32[4]{0} parameter(0)
}

ENTRY %main (x.1: f32[4]) -> f32[4] {
  %x.1 = f32[4]{0} parameter(0)
  %start = (s32[], f32[4]{0}) tuple(%x.1)
  %loop = (s32[], f32[4]{0}) while(%start), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %which = s32[] copy(%start)
  %chosen = f32[4]{0} conditional(%which, %x.1, %x.1), branch_computations={%one, %fused}
  ROOT %last = f32[4]{0} fusion(%chosen), kind=kLoop, calls=%fused
}
"""


def test_launches_count_loops_and_the_largest_branch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The loop launches two kernels in each of five iterations. Then come a copy, the
    # larger branch and the last fusion. A fusion is one kernel.
    assert hlo.launches(PROGRAM) == 5 * 2 + 1 + 1 + 1
    unknown = PROGRAM.replace('{"known_trip_count":{"n":"5"}}', "{}")
    assert hlo.launches(unknown) == math.inf
    with zipfile.ZipFile(tmp_path / "step-hlo.zip", "w") as file:
        file.writestr("adamw.txt", PROGRAM)
    launches.main([str(tmp_path / "step-hlo.zip")])
    assert "| adamw | 13 |" in capsys.readouterr().out


def test_rejects_a_file_that_is_no_dump(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step.md").write_text("no zip")
    for name in ("step.md", "missing.zip"):
        with pytest.raises(SystemExit, match="2"):
            launches.main([str(tmp_path / name)])
        assert f"{name} is no file of --dump" in capsys.readouterr().err

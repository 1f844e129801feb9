import contextlib
import dataclasses
import importlib.util
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from apollo_optax import state_bytes
from benchmarks import memory as benchmark
from examples.llama import plan
from examples.llama.config import PRESETS, LlamaConfig, param_count
from examples.llama.hf.config import hf_config, write_json
from examples.llama.memory import report, search, target
from examples.llama.memory.options import (
    PlannedTuning,
    PlanOptions,
    smallest_batch,
)
from examples.llama.memory.target import Compiler, CompilerError, Memory
from examples.llama.mesh import make_mesh, over_data
from examples.llama.model import Batch
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import RECIPES, with_defaults
from examples.llama.options import RunOptions
from examples.llama.run import setup
from examples.llama.run.errors import UsageError
from examples.llama.text.packing import Example, Packed

SHORT = ["--batch", "2", "--seq", "16"]
HBM = "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory "
OF_TEMPORARIES = HBM + (
    "on HBM, the total memory required for HLO temporaries (40.00G) exceeds available HBM (15.75G). HLO "
    "module: jit_f."
)
OF_USE = (
    HBM
    + "in memory space hbm. Used 16.6G of 15.75G hbm. Exceeded hbm capacity by 871.2M."
)

# docs/memory.md has the reason.
MISSED = ("qwen3-8b bfloat16, weights on the host",)

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed",
)


@pytest.fixture
def here(tiny_is_small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiles in this process, which knows the small model and has it compiled before."""

    @contextlib.contextmanager
    def compiler(name: str, devices: int) -> Iterator[search.MemoryOf]:
        del devices

        def memory_of(options: RunOptions, *, exact: bool = True) -> Memory:
            return target.memory_of(options, name, exact=exact)

        yield memory_of

    monkeypatch.setattr(plan, "Compiler", compiler)


@pytest.fixture
def uncompiled(here: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiler that takes 10 kB a sequence beside the state, at once."""

    def memory(
        options: RunOptions, config: LlamaConfig, mesh: Any, name: str
    ) -> Memory:
        shapes = target.shapes_memory(options, config, mesh, peak_bytes=0)
        arguments, temporaries = (
            shapes.weights_bytes + shapes.optimizer_bytes,
            10_000 * options.batch,
        )
        return dataclasses.replace(
            shapes,
            peak_bytes=arguments + temporaries,
            arguments_bytes=arguments,
            temporaries_bytes=temporaries,
            compiled_for=name,
        )

    monkeypatch.setattr(target, "compiled_memory", memory)


def run_of(
    config: LlamaConfig, kind: type[RunOptions] = RunOptions, **changes: Any
) -> RunOptions:
    return with_defaults(
        kind(out=Path("unused"), **{"batch": 2, "seq": 16, **changes}), config
    )


def rows_of(
    args: list[str], capsys: pytest.CaptureFixture[str]
) -> list[dict[str, Any]]:
    plan.main([*SHORT, *args, "--json"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        (
            {
                "optimizer": "apollo",
                "weights": "bfloat16",
                "mesh": "data=2",
                "accumulate": 2,
                "batch": 8,
            },
            RunOptions,
        ),
        ({"optimizer": "apollo-mini", "layerwise": True}, PlannedTuning),
        pytest.param(
            {"optimizer": "apollo-mini", "layerwise": True, "weights": "int8"},
            RunOptions,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["ordinary", "fine-tuning", "layer-wise"],
)
def test_the_memory_is_that_of_the_step_that_is_run(
    changes: dict[str, Any],
    kind: type[RunOptions],
    small: LlamaConfig,
    tiny_is_small: None,
) -> None:
    run = run_of(small, kind, **changes)
    mesh = target.mesh_on(run, small, "cpu")
    compiled = target.compiled_step(run, small, mesh)
    planned = target.memory_of_step(compiled, run, small, mesh, "cpu")
    tx, _ = make_optimizer(run, small)
    state = setup.initial_state(run, small, tx, mesh)
    tokens = np.zeros((run.batch, run.seq + 1), np.int32)
    batch = Batch(tokens)
    if kind is PlannedTuning:
        example = Example(np.ones(9, np.int32), np.ones(9, np.float32))
        packed = Packed([example] * 4, run.seq + 1, seed=0)
        batch = jax.tree.map(lambda *rows: np.stack(rows), *[packed[0]] * run.batch)
    step: Any = setup.training_step(run, small, tx, mesh)
    placed = jax.device_put(batch, over_data(mesh))
    number = jax.device_put(np.int32(1), setup.on_every_device(mesh))
    sizes = step.lower(state, placed, number).compile().memory_analysis()
    assert planned.arguments_bytes == sizes.argument_size_in_bytes
    assert planned.temporaries_bytes == sizes.temp_size_in_bytes
    assert planned.output_bytes == sizes.output_size_in_bytes
    assert planned.alias_bytes == sizes.alias_size_in_bytes
    assert planned.weights_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state.params)
    )
    assert planned.optimizer_bytes == sum(
        leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)
    )
    assert planned.host_weights_bytes == planned.host_bytes == 0
    assert planned.compiled_for == planned.device_kind == "cpu"
    assert not planned.refused
    assert planned.capacity_bytes is None
    # Benchmarks run what the planner compiled. It consumes the state.
    _, metrics = compiled(state, placed, number)
    assert np.isfinite(metrics.loss)


def test_bytes_follow_from_the_parameter_count(
    small: LlamaConfig, here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows_of(["--optimizer", "adamw"], capsys)
    assert row["parameters"] == param_count(small)
    assert row["weights_bytes"] == 4 * param_count(small)
    run = run_of(small, optimizer="adamw")
    params = setup.abstract_params(
        small, setup.execution_of(run, small), make_mesh("data=1")
    )
    assert row["optimizer_bytes"] == sum(
        state_bytes(make_optimizer(run, small)[0], params)
    )
    tokens = 2 * 17 * 4
    assert (
        row["arguments_bytes"] == row["weights_bytes"] + row["optimizer_bytes"] + tokens
    )
    kept = row["output_bytes"] - row["alias_bytes"]
    assert row["peak_bytes"] == row["arguments_bytes"] + row["temporaries_bytes"] + kept
    assert row["peak_bytes"] == sum(row[name] for name in report.SHARES)
    assert (
        row["alias_bytes"] >= row["weights_bytes"] + row["optimizer_bytes"]
    )  # It is donated.


def test_rows_say_what_they_are_of(
    uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    names = ["adamw", "apollo", "apollo-mini"]
    args = [
        "--compare",
        "adamw,apollo",
        "apollo-mini",
        "--embeddings",
        "apollo",
        "--accumulate",
        "2",
    ]
    rows = rows_of(args, capsys)
    assert [row["optimizer"] for row in rows] == names
    assert [row["embeddings"] for row in rows] == [
        "adam",
        "apollo",
        "apollo",
    ]  # The option means nothing to adamw, which gets the default.
    assert [row["rank"] for row in rows] == [None, 4, 1]
    for row in rows:
        assert (row["target"], row["model"], row["batch"], row["seq"]) == (
            "cpu",
            "tiny",
            2,
            16,
        )
        assert row["versions"]["jax"] == jax.__version__
        assert "flax" in row["versions"]
        assert "libtpu" not in row["versions"]
        assert row["fits"] is row["limit_bytes"] is None
        assert row["notes"] == []
    assert (
        rows[0]["optimizer_bytes"]
        > rows[1]["optimizer_bytes"]
        > rows[2]["optimizer_bytes"]
    )


def test_a_command_line_of_finetune_is_planned_as_it_is(
    uncompiled: None,
    small: LlamaConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_json(tmp_path / "config.json", hf_config(small, "float32", None))
    line = ["--init-from", str(tmp_path), "--data", "chat.jsonl", "--out", "tuned"]
    line += ["--epochs", "2", "--loss-on", "all", "--warmup", "0.1", "--seq", "32"]
    plan.main(["finetune", *line, "--json"])
    row = json.loads(capsys.readouterr().out)
    assert (row["command"], row["model"]) == ("finetune", str(tmp_path))
    assert (row["batch"], row["seq"]) == (8, 32)
    plan.main(["finetune", "--model", "tiny", "--seq", "32", "--fit", "1MB"])
    output = " ".join(capsys.readouterr().out.split())
    assert "in float32, fine-tuning in packed rows of 32, on cpu" in output
    # Another default length, which the small model does not take.
    error = fails(["finetune", "--model", "tiny"], capsys)
    assert error == "error: --seq 1024 is too long; --model tiny takes 128\n"
    assert "unrecognized" in fails(["finetune", "--bos", "never"], capsys).lower()
    pretrain = rows_of([], capsys)
    plan.main(["pretrain", *SHORT, "--json"])
    assert [json.loads(capsys.readouterr().out)] == pretrain
    assert pretrain[0]["command"] == "pretrain"


def test_the_table_and_the_figure(
    uncompiled: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    figure = tmp_path / "memory.png"
    plan.main(
        [
            *SHORT,
            "--compare",
            "adamw,apollo-mini",
            "--fit",
            "1MB",
            "--plot",
            str(figure),
        ]
    )
    output = " ".join(capsys.readouterr().out.split())
    assert (
        f"tiny: {param_count(PRESETS['tiny']):,} parameters in float32, sequences of 16, on cpu"
        in output
    )
    assert "the largest batch in 1MB" in output
    assert "adamw" in output
    assert "apollo-mini" in output
    assert "kB on a device; peak = " in output
    assert "fits" in output
    assert "activations: the part that grows with the batch" in output
    assert figure.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    "args", [["--weights", "bfloat16"], ["--compute-dtype", "bfloat16"]]
)
def test_bfloat16_on_a_cpu_is_marked(
    args: list[str], uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows_of(args, capsys)
    assert "turns bfloat16 into float32" in row["notes"][0]
    assert "such as v5e:1x1" in row["notes"][0]
    plan.main([*SHORT, *args])
    output = " ".join(capsys.readouterr().out.split())
    assert "* " in output
    assert "*: the CPU's compiler turns bfloat16 into float32" in output


def test_activations_are_what_grows_with_the_batch(
    uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    for batch in ("1", "2", "3", "4"):
        (row,) = rows_of(["--batch", batch], capsys)
        assert (
            row["activations_bytes"] == row["temporaries_bytes"] == 10_000 * int(batch)
        )
        assert row["gradients_bytes"] == 0


def fake_memory(
    peak_of: Callable[[int], int], refused_above: int = 10**9
) -> Callable[..., Memory]:
    def memory(batch: int) -> Memory:
        return Memory(
            1,
            1,
            0,
            "TPU",
            peak_of(batch),
            capacity_bytes=10**9,
            refused=batch > refused_above,
        )

    return memory


@pytest.mark.parametrize(
    "peak_of",
    [
        lambda b: 100 + 7 * b,
        lambda b: 9 + b * b,
        lambda b: 90 + math.isqrt(100 * b),
        lambda b: 100 + max(0, b - 50),
    ],
)
@pytest.mark.parametrize(
    ("refused_above", "args"), [(10**9, {}), (20, {}), (10**9, {"mesh": "data=4"})]
)
def test_the_largest_batch_that_fits(
    peak_of: Callable[[int], int], refused_above: int, args: dict[str, str]
) -> None:
    for limit in (100, 107, 110, 113, 128, 160, 250):
        options = PlanOptions(fit=f"{limit / 1000}kB", **args)
        unit = smallest_batch(options)
        asked = []

        def measured(batch: int, asked: list[int] = asked) -> Memory:
            asked.append(batch)
            return fake_memory(peak_of, refused_above)(batch)

        found = search.fitting_batch(options, limit, measured)
        fitting = [
            b
            for b in range(unit, 30_000, unit)
            if peak_of(b) <= limit and b <= refused_above
        ]
        assert found == max(fitting, default=0)
        assert all(batch % unit == 0 for batch in asked)
        assert len(set(asked)) <= 20


def test_where_memory_grows_evenly_few_compilations_find_the_batch() -> None:
    asked = []

    def measured(batch: int) -> Memory:
        asked.append(batch)
        return fake_memory(lambda b: 1000 + 7 * b)(batch)

    assert search.fitting_batch(PlanOptions(fit="5kB"), 5000, measured) == 571
    assert len(set(asked)) <= 6  # 1, 8, 64, 512, 571 and 572.


def test_no_batch_is_compiled_twice(tiny_is_small: None) -> None:
    asked: list[tuple[int, bool]] = []

    def memory_of(run: RunOptions, *, exact: bool = True) -> Memory:
        asked.append((run.batch, exact))
        memory = fake_memory(lambda batch: 10**7 + 7 * batch, refused_above=571)(
            run.batch
        )
        return dataclasses.replace(
            memory, compiled_for=None if memory.refused else "TPU", temporaries_bytes=1
        )

    (row,) = search.plan(PlanOptions(fit="20MB"), memory_of)
    assert row.options.batch == 571
    assert len({batch for batch, _ in asked}) == len(asked)
    asked.clear()
    list(search.plan(PlanOptions(batch=600), memory_of))
    assert asked == [(600, True), (300, True)]


def test_activations_of_two_targets_are_not_compared(tiny_is_small: None) -> None:
    def memory_of(run: RunOptions, *, exact: bool = True) -> Memory:
        assert exact
        memory = fake_memory(lambda batch: 10**7 * batch, refused_above=1)(run.batch)
        compiled_for = "v5p:1x1x1" if memory.refused else "v5e:1x1"
        return dataclasses.replace(
            memory, compiled_for=compiled_for, temporaries_bytes=1
        )

    (row,) = search.plan(PlanOptions(batch=1), memory_of)
    assert row.activations_bytes is None


def test_fit_agrees_with_the_memory_of_each_batch(
    uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    two, four = (
        rows_of(["--batch", batch], capsys)[0]["peak_bytes"] for batch in ("2", "4")
    )
    limit = (two + four) // 2
    (row,) = rows_of(["--fit", f"{limit / 1000}kB"], capsys)
    assert 2 <= row["batch"] < 4
    assert two <= row["peak_bytes"] <= limit == row["limit_bytes"]
    assert row["fits"] is True
    (larger,) = rows_of(["--batch", str(row["batch"] + 1)], capsys)
    assert larger["peak_bytes"] > limit


def test_of_several_optimizers_those_that_do_not_fit_have_a_row(
    uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    mini, adamw = rows_of(["--compare", "apollo-mini,adamw", "--batch", "1"], capsys)
    assert mini["peak_bytes"] < adamw["peak_bytes"]
    limit = f"{(adamw['peak_bytes'] - 1) / 1000}kB"
    rows = rows_of(["--compare", "apollo-mini,adamw", "--fit", limit], capsys)
    assert [row["fits"] for row in rows] == [True, False]
    assert rows[1]["batch"] == 1
    plan.main([*SHORT, "--compare", "apollo-mini,adamw", "--fit", limit])
    assert "does not fit" in capsys.readouterr().out


@pytest.mark.parametrize("message", [OF_TEMPORARIES, OF_USE])
@pytest.mark.parametrize("larger_too", [False, True])
def test_a_program_that_is_refused_has_its_row(
    message: str,
    larger_too: bool,
    uncompiled: None,
    small: LlamaConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    compiled = target.compiled_memory

    def refusing(
        options: RunOptions, config: LlamaConfig, mesh: Any, name: str
    ) -> Memory:
        if larger_too or name == "v5e:1x1":
            raise jax.errors.JaxRuntimeError(message)
        return compiled(options, config, mesh, name)

    monkeypatch.setattr(target, "compiled_memory", refusing)
    monkeypatch.setattr(
        target, "mesh_on", lambda options, config, name: make_mesh(options.mesh)
    )
    monkeypatch.setattr(plan, "check_target", lambda name: None)
    monkeypatch.setattr(report, "versions", lambda name: {})
    args = ["--target", "v5e:1x1"]
    (row,) = rows_of(args, capsys)
    assert row["fits"] is False
    assert row["capacity_bytes"] == row["limit_bytes"] == 15.75 * 2**30
    assert row["weights_bytes"] == 4 * param_count(small)
    source = "from its compiler's message" if larger_too else "measured on v5p:1x1x1"
    assert row["notes"] == [f"v5e:1x1 refuses apollo-mini: the numbers are {source}"]
    if larger_too:
        assert row["peak_bytes"] == pytest.approx(
            (40 if message == OF_TEMPORARIES else 16.6) * 2**30
        )
        assert (
            row["arguments_bytes"]
            is row["activations_bytes"]
            is row["gradients_bytes"]
            is None
        )
    else:
        assert (
            row["peak_bytes"]
            == compiled(
                target.for_target(run_of(small), "cpu"),
                small,
                make_mesh("data=1"),
                "cpu",
            ).peak_bytes
        )
    plan.main([*SHORT, *args, "--plot", str(tmp_path / "memory.png")])
    assert "does not fit" in capsys.readouterr().out
    assert (tmp_path / "memory.png").is_file()


def test_another_error_of_the_compiler_is_no_refusal() -> None:
    error = jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: something else")
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        target.refused_bytes(error)


def fails(args: list[str], capsys: pytest.CaptureFixture[str], status: int = 2) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        plan.main(args)
    assert exit_.value.code == status
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (
            ["--target", "tpu"],
            "--target 'tpu' is unknown; give cpu, gpu or a TPU topology: v5e:1x1, ",
        ),
        (["--target", "v5e:0x0"], "--target 'v5e:0x0' is unknown; give cpu"),
        (["--target", "gpu"], "--target gpu is not there ("),
        (
            ["--fit", "16"],
            "--fit '16' is no size; give one as 16GB (1e9 bytes each) or 15.75GiB (2**30)",
        ),
        (["--fit", "0GB"], "--fit '0GB' is no size"),
        (["--fit", "much"], "--fit 'much' is no size"),
        (
            ["--fit", "1kB"],
            "--fit 1kB is too small: apollo-mini does not fit at batch 1, which needs ",
        ),
        (
            ["--compare", "adamw,adam"],
            "--compare 'adam' is unknown; choose one of: adamw, ",
        ),
        (
            ["--compare", ","],
            "--compare names no optimizer; give some as adamw,apollo, or leave it out",
        ),
        (
            ["--compare", "adamw", "adamw"],
            "--compare adamw is given twice; give each optimizer once",
        ),
        (
            ["--compare", "adamw,galore", "--layerwise"],
            "--layerwise can't be done with --optimizer galore",
        ),
        (
            ["--plot", "memory.txt"],
            "--plot memory.txt is no .png in a folder that is there",
        ),
        (
            ["--plot", "nowhere/memory.png"],
            "--plot nowhere/memory.png is no .png in a folder that is",
        ),
        (
            ["--batch", "3", "--mesh", "data=2"],
            "--batch 3 in --accumulate 1 micro-batches is 3 sequences",
        ),
        (
            ["--mesh", "data=9", "--batch", "9"],
            "--mesh data=9 needs 9 devices, and the devices here are 8",
        ),
        (
            ["--attention", "cudnn"],
            "--attention cudnn takes a GPU, and --target is cpu; leave it out",
        ),
        (
            ["--layerwise", "--offload", "weights"],
            "--offload weights moves what a GPU or TPU has no room",
        ),
        (["--weights", "int8"], "--weights int8 takes --layerwise"),
        (["--model", "8b"], "--model '8b' is unknown"),
        (["--optimizer", "adam"], "--optimizer 'adam' is unknown"),
        (["--seq", "129"], "--seq 129 is too long"),
    ],
)
def test_bad_input_is_one_line(
    args: list[str], message: str, uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails([*SHORT, *args], capsys)
    assert error.startswith("error: " + message)
    assert error.count("\n") == 1


def test_fit_takes_the_batch_that_the_mesh_takes(
    uncompiled: None, capsys: pytest.CaptureFixture[str]
) -> None:
    (row,) = rows_of(["--mesh", "data=4", "--fit", "1MB", "--batch", "3"], capsys)
    assert row["batch"] % 4 == 0
    assert row["fits"] is True


def test_more_than_the_target_has_cannot_be_fitted() -> None:
    options = PlanOptions(fit="80GB", target="v5e:1x1")
    with pytest.raises(
        UsageError,
        match=r"`fit` 80GB is more than .* v5e:1x1 gives a program, 1.00 GB; ",
    ):
        search.fitting_batch(options, 80 * 10**9, fake_memory(lambda b: b))


def test_without_libtpu_the_install_line_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    error = fails(["--target", "v5e:1x1"], capsys)
    assert error.startswith(
        "error: --target v5e:1x1 needs libtpu, which compiles for TPUs; "
    )
    assert "pip install '.[tpu-aot]'" in error
    assert error.count("\n") == 1


def test_a_compiler_that_crashes_leaves_its_last_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    crash = "import os, sys; sys.stderr.write('first\\nthe reason\\n'); sys.stderr.flush(); os.abort()"
    (tmp_path / "sitecustomize.py").write_text(crash)
    environment = target.environment("cpu", 1) | {"PYTHONPATH": str(tmp_path)}
    monkeypatch.setattr(target, "environment", lambda *_: environment)
    error = fails(SHORT, capsys, status=1)
    assert error.startswith(
        "error: the compiler for cpu ended with signal SIGABRT; its last lines:\n"
    )
    assert "\nthe reason\n" in error


@pytest.mark.parametrize(
    ("compile_for", "flags"),
    [
        ("v5e:1x1", "--xla_dump_to=/a --xla_tpu_b=true"),
        ("cpu", "--xla_cpu_a=1 --xla_dump_to=/a  --xla_gpu_b --xla_tpu_b=true"),
    ],
)
def test_the_compiler_for_tpus_gets_no_flags_of_other_platforms(
    compile_for: str, flags: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """libtpu ends the process at a flag that it does not know."""
    given = "--xla_cpu_a=1 --xla_dump_to=/a  --xla_gpu_b --xla_tpu_b=true"
    monkeypatch.setenv("XLA_FLAGS", given)
    assert target.environment(compile_for, 1)["XLA_FLAGS"] == flags


def test_ctrl_c_ends_the_command(
    here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(target, "compiled_memory", interrupted)
    assert fails(SHORT, capsys, status=130) == "interrupted\n"


@pytest.mark.slow
def test_a_process_of_its_own_gives_the_same_memory(small: LlamaConfig) -> None:
    run = run_of(PRESETS["tiny"], mesh="data=2")
    with Compiler("cpu", devices=2) as compiler:
        memory = compiler(run)
        with pytest.raises(
            UsageError,
            match="`mesh` data=4 needs 4 devices, and the devices here are 2",
        ):
            compiler(dataclasses.replace(run, batch=4, mesh="data=4"))
        with pytest.raises(CompilerError, match="(?s)Traceback.*KeyError: 'unknown'"):
            compiler(dataclasses.replace(run, optimizer="unknown"))
        process = compiler._process
        assert process.poll() is None
    assert process.poll() is not None
    assert memory.weights_bytes == 4 * param_count(PRESETS["tiny"])
    assert memory.temporaries_bytes


def test_help_names_everything_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        plan.main(["--help"])
    assert exit_.value.code == 0
    help_ = capsys.readouterr().out
    assert all(
        name in help_
        for name in (*PRESETS, *RECIPES, "cpu", "gpu", "v5e:4x4", "15.75GiB")
    )


def test_the_benchmark_goes_on_where_it_was_cut_off(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []

    @contextlib.contextmanager
    def compiler(name: str) -> Iterator[Callable[..., Memory]]:
        asked.append(name)
        yield lambda run: fake_memory(lambda batch: 10**9 * batch, refused_above=0)(
            run.batch
        )

    monkeypatch.setattr(benchmark, "Compiler", compiler)
    monkeypatch.setattr(benchmark, "check_target", lambda name: None)
    monkeypatch.setattr(benchmark, "versions", lambda name: {"jax": jax.__version__})
    file = tmp_path / "runs" / "memory.jsonl"
    args = [
        "--tables",
        "models",
        "--models",
        "60m",
        "1b",
        "--jobs",
        "1",
        "--out",
        str(file),
    ]
    benchmark.main(args)
    table = capsys.readouterr().out
    assert "| adamw | float32 | ordinary | bfloat16 | 1.00* | 1.00* |" in table
    assert "| optimizer | moments | step | weights | 60M | 1B |" in table
    assert len(asked) == 2 * len(benchmark.VARIANTS)
    file.write_bytes(file.read_bytes()[:-2])  # As a kill would leave it.
    for _ in range(2):
        benchmark.main(args)
        assert capsys.readouterr().out == table
        assert len(asked) == 2 * len(benchmark.VARIANTS) + 1
    for line, message in (
        ("{}\n", "is not a file of this version of the command ('key'); give another"),
        ("no JSON\n", "is no file of this command's"),
        ("no JSON and no line feed", "is no file of this command's"),
    ):
        file.write_text(line)
        with pytest.raises(SystemExit):
            benchmark.main(args)
        assert message in capsys.readouterr().err
        assert file.read_text() == line


@needs_libtpu
def test_for_a_tpu_that_is_not_there() -> None:
    config = PRESETS["tiny"]
    with Compiler("v5e:1x1") as compiler:
        memory = compiler(
            run_of(config, optimizer="apollo-mini", layerwise=True, weights="int8")
        )
    assert memory.capacity_bytes == 15.75 * 2**30
    assert memory.compiled_for == "v5e:1x1"
    assert memory.device_kind == "TPU v5 lite"
    assert param_count(config) < memory.weights_bytes < 2 * param_count(config)
    assert memory.arguments_bytes is not None
    state = memory.weights_bytes + memory.optimizer_bytes
    assert state <= memory.arguments_bytes <= memory.peak_bytes < 4 * state


@needs_libtpu
@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--target", "v9x:1x1"], "--target v9x:1x1 is not there ("),
        (["--target", "v5e:3x7"], "--target v5e:3x7 is not there ("),
        (
            ["--target", "v5e:2x2"],
            "--mesh data=1 is 1 of the 4 devices of --target v5e:2x2; use all, or",
        ),
        (
            ["--target", "v5e:1x1", "--attention", "cudnn"],
            "--attention cudnn takes a GPU, and --target is",
        ),
    ],
)
def test_a_topology_that_makes_no_run_is_one_line(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    error = fails([*SHORT, *args], capsys)
    assert error.startswith("error: " + message)
    assert error.count("\n") == 1


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(
    "goal",
    [
        *benchmark.goals(),
        *(goal for goal in benchmark.tuning_goals() if goal.what not in MISSED),
    ],
    ids=lambda goal: goal.what,
)
def test_the_goals_are_met(goal: benchmark.Goal, tmp_path: Path) -> None:
    measured, met = goal.outcome(benchmark.Compiled(tmp_path / "memory.jsonl"))
    assert met, measured

import math
import re
import sys
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from benchmarks import import_time, optimizer_step, step_contenders, step_torch
from benchmarks.gpu.step import goals as gpu_goals
from benchmarks.optimizer_step import COPY, Options
from benchmarks.step_contenders import Measured, Method, Setting, methods
from examples.llama import config

SMALL = config.LlamaConfig(
    vocab_size=384,
    hidden_size=16,
    intermediate_size=24,
    num_heads=2,
    num_layers=2,
    max_seq_len=128,
)
MATRICES = (
    [(16, 16)] * 4 + [(16, 24)] * 2 + [(24, 16)]
)  # The shapes of a layer, (in, out).
RANK = 4  # A quarter of the hidden size.

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Makes the model `tiny` and the copy small, and removes the pause."""
    monkeypatch.setitem(config.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(
        optimizer_step, "COPY_BYTES", dict.fromkeys(("cpu", "gpu"), 4096)
    )
    monkeypatch.setattr(optimizer_step, "PAUSE", 0.0)
    monkeypatch.setattr(step_contenders, "SECONDS_TOGETHER", 0.0)
    before = jax.config.values["jax_enable_compilation_cache"]
    yield
    jax.config.update("jax_enable_compilation_cache", before)


def options(**given: Any) -> Options:
    quick = {"models": ("tiny",), "rounds": 2, "seconds": 1e-9, "compilations": 1}
    return Options(**{**quick, **given})


def setting(layout: str = "unstacked", dtype: str = "float32") -> Setting:
    return Setting("tiny", dtype, layout)


def method(name: str, of: Setting) -> Method:
    return next(m for group in methods(of).values() for m in group if m.name == name)


@pytest.mark.parametrize(("model", "leaves"), [("60m", 56), ("7b", 224)])
def test_kernels_have_the_shapes_of_the_model(model: str, leaves: int) -> None:
    shape = config.PRESETS[model]
    expected = config.matmul_param_count(shape) - shape.vocab_size * shape.hidden_size
    for layout, count in (("unstacked", leaves), ("stacked", 7)):
        kernels = Setting(model, "bfloat16", layout).kernels()
        assert len(kernels) == count
        assert sum(math.prod(leaf.shape) for leaf in kernels.values()) == expected
        assert {leaf.dtype.name for leaf in kernels.values()} == {"bfloat16"}


@pytest.mark.parametrize("layout", ["unstacked", "stacked"])
def test_floor_bytes(layout: str) -> None:
    numbers = SMALL.num_layers * sum(m * n for m, n in MATRICES)
    channels = SMALL.num_layers * sum(max(m, n) for m, n in MATRICES)
    contracted = SMALL.num_layers * sum(min(m, n) for m, n in MATRICES)
    matrices = SMALL.num_layers * len(MATRICES)

    def floor(name: str, dtype: str = "bfloat16") -> int:
        of = setting(layout, dtype)
        return method(name, of).floor_bytes(of.kernels())

    count, key = 4, 8
    assert floor("sgd") == 6 * numbers
    assert floor("adamw, bfloat16 moments") == 14 * numbers + 2 * count
    assert floor("adamw, float32 moments") == 22 * numbers + 2 * count
    assert floor("adamw, float32 moments", "float32") == 28 * numbers + 2 * count
    assert floor("lion") == 10 * numbers + 2 * count
    for name, rank in (
        ("apollo-mini", 1),
        (f"apollo, rank {RANK}", RANK),
        ("apollo, rank 256", 16),
    ):
        state = 4 * 2 * rank * channels + 4 * matrices + count + key
        assert floor(name) == 8 * numbers + 2 * state
    # Optax's GaLore contracts the larger side, and its bfloat16 moments have the other.
    moments, projections = 2 * 2 * RANK * contracted, 2 * RANK * channels
    counts = 2 * count  # One count is GaLore's, the other that of its Adam.
    assert (
        floor(f"galore, rank {RANK}")
        == 6 * numbers + 2 * (moments + counts) + projections
    )


def test_a_time_is_the_mean_of_steps_launched_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(step_contenders, "SECONDS_TOGETHER", 3.5)
    clock, queued = 0.0, 0

    def step() -> None:
        nonlocal queued
        queued += 1

    def wait() -> None:
        nonlocal clock, queued
        clock += 1.0 * queued + 0.4  # The launch of the first step takes 0.4 s.
        queued = 0

    monkeypatch.setattr(step_contenders.time, "perf_counter", lambda: clock)
    assert step_contenders.timed(step, wait, 13.0) == pytest.approx([1 + 0.4 / 3] * 4)
    assert step_contenders.timed(step, wait, 1e-9) == pytest.approx([1 + 0.4 / 3] * 3)


def test_refreshes_are_amortised() -> None:
    measured = Measured(
        floor_bytes=1, refresh_every=4, blocks=[[1.0, 9.0, 1.0], [3.0]], refreshes=[5.0]
    )
    assert measured.by_round() == [2.0, 3.5]
    plain = Measured(floor_bytes=1, blocks=[[1.0], [1.0]])
    assert optimizer_step.ratio(measured, plain) == 2.75
    copy = Measured(
        floor_bytes=10, blocks=[[2.0], [2.0]]
    )  # This is 5 bytes per second.
    assert optimizer_step.over_floor(plain) is None
    plain.copy = copy
    assert optimizer_step.over_floor(plain) == 5.0


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        ("unstacked", "float32"),
        pytest.param("stacked", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_each_step_runs_in_place(layout: str, dtype: str) -> None:
    given = options(
        layouts=(layout,), dtype=dtype, rounds=1, optimizers=("galore", "apollo-mini")
    )
    of = setting(layout, dtype)
    results = optimizer_step.measure(of, given)
    kernels = of.kernels()
    assert results.keys() >= {
        COPY,
        f"galore, rank {RANK}",
        "apollo-mini",
        "adamw, float32 moments",
    }
    for name, measured in results.items():
        assert len(measured.blocks) == 1
        assert len(measured.blocks[0]) == step_contenders.FEWEST_TIMES
        if name != COPY:
            state = jax.eval_shape(method(name, of).make().init, kernels)
            assert measured.state_bytes == step_contenders.tree_bytes(state)
            assert len(measured.compilations) == 1
    assert results[f"galore, rank {RANK}"].refresh_every == 200
    table = optimizer_step.table(of, results)
    assert f"{dtype}, {layout}" in table
    assert re.search(rf"galore, rank {RANK}: one step in 200 takes \d", table)


def test_the_command_prints_a_row_per_optimizer(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        import_time, "measure", lambda: import_time.ImportTimes(1.2, 1.0, 1.2)
    )
    arguments = [
        "--models",
        "tiny",
        "--layouts",
        "stacked",
        "--optimizers",
        "adafactor",
        "lion",
        "muon",
    ]
    optimizer_step.main(
        [*arguments, "--rounds", "1", "--seconds", "1e-9", "--compilations", "1"]
    )
    rows = [
        line.split(" | ")[0].removeprefix("| ")
        for line in capsys.readouterr().out.splitlines()
    ]
    assert [name for name in rows if name in ("sgd", "adafactor", "lion", "muon")] == [
        "adafactor",
        "lion",
        "muon",
    ]
    assert rows.count("CPU, 60m, float32") == 8


def test_an_optimizer_that_does_not_fit_has_a_row() -> None:
    class TooLarge:
        measured = Measured(floor_bytes=8)

        def compile(self) -> None: ...

        def run_block(self, seconds: float) -> None:
            raise MemoryError("allocating 1 TB")

    too_large = TooLarge()
    optimizer_step.run_block("too large", too_large, 1.0)
    fine = Measured(floor_bytes=8, blocks=[[1.0]], compilations=[1.0])
    results = {COPY: fine, "too large": too_large.measured} | dict.fromkeys(
        optimizer_step.ADAMW.values(), fine
    )
    assert optimizer_step.cells("too large", results)[:2] == [
        "too large",
        "out of memory",
    ]
    assert optimizer_step.ratio(too_large.measured, fine) is None


def test_goals_have_verdicts() -> None:
    goal = optimizer_step.Goal(
        "a ratio",
        0.6,
        place="CPU",
        setting=Setting("60m", "float32", "unstacked"),
        outcome=lambda results: results["a"].blocks[0][0],
    )

    def outcome(**seconds: float) -> list[str]:
        results = {
            Setting("60m", "float32", layout): {"a": Measured(1, blocks=[[time]])}
            for layout, time in seconds.items()
        }
        where, what, limit, *found = goal.cells(results)
        assert (where, what, limit) == ("CPU, 60m, float32", "a ratio", "<= 0.6")
        return found

    assert outcome() == ["not in this run", ""]
    assert outcome(stacked=0.6) == ["0.60 stacked", "met"]
    assert outcome(stacked=0.5, unstacked=0.7) == [
        "0.70 unstacked, 0.50 stacked",
        "missed",
    ]


def test_every_goal_names_measured_optimizers() -> None:
    for goal in [*optimizer_step.goals(), *gpu_goals()]:
        of = goal.setting
        names = [COPY, *(m.name for group in methods(of).values() for m in group)]
        names += [
            "apollo-torch, mini",
            *(f"apollo-torch, rank {r}" for r in (of.quarter_rank(), 256)),
        ]
        fine = Measured(floor_bytes=8, blocks=[[1.0]], compilations=[1.0])
        fine.copy = Measured(floor_bytes=8, blocks=[[1.0]])
        assert goal.outcome(dict.fromkeys(names, fine)) == 1.0
        assert goal.outcome({}) is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--models", "8b"], "'8b'"),
        (["--layouts", "flat"], "'flat'"),
        (["--dtype", "float16"], "'float16'"),
        (["--optimizers", "adam"], "'adam'"),
        (["--rounds", "0"], "--rounds 0"),
    ],
)
def test_rejects_bad_options(
    arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        optimizer_step.main(arguments)
    assert named in capsys.readouterr().err


def test_names_the_command_that_installs_the_release(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "apollo_torch", None)
    with pytest.raises(SystemExit, match="2"):
        optimizer_step.main(["--models", "tiny", "--against-torch"])
    assert "pip install '.[bench-torch]'" in capsys.readouterr().err


def test_torch_steps_on_the_transposed_shapes() -> None:
    torch = pytest.importorskip("torch")
    kernels = setting().kernels()
    made = []

    def make(params: list[Any], gap: int) -> Any:
        made.append(
            (
                gap,
                [tuple(param.shape) for param in params],
                [param.grad is None for param in params],
            )
        )
        return torch.optim.SGD(params)

    contender = step_torch.OnTorch(8, kernels, make, refresh_every=200)
    contender.run_block(1e-9)
    assert [gap for gap, _, _ in made] == [1, 200]
    for _, shapes, without_gradient in made:
        assert shapes == [leaf.shape[::-1] for leaf in kernels.values()]
        assert not any(without_gradient)
    assert len(contender.measured.refreshes) == len(contender.measured.blocks[0]) == 3


def test_the_release_steps() -> None:
    pytest.importorskip("apollo_torch")
    of = setting()
    for contender in step_torch.contenders(of, of.kernels()).values():
        contender.run_block(1e-9)
        assert len(contender.measured.blocks) == 1

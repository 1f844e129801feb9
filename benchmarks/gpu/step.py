"""`step`: one step per optimizer over 7B's kernels in bfloat16, and its byte floor."""

import functools
import importlib.util
import statistics
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import step_torch
from benchmarks.gpu.bench import Bench, Job, keep_hlo
from benchmarks.gpu.report import Table
from benchmarks.gpu.worker import Failed
from benchmarks.optimizer_step import (
    ADAMW,
    COPY_BYTES,
    GOALS_HEAD,
    Goal,
    Results,
    cells,
    megabytes,
    milliseconds,
    over,
    over_floor,
)
from benchmarks.optimizer_step import HEAD as STEP_HEAD
from benchmarks.step_contenders import (
    Contender,
    Copy,
    Draw,
    Measured,
    OnJax,
    Setting,
    methods,
    tree_bytes,
)

# Half of 7B's 32 layers are stepped, so that AdamW with float32 moments fits 78 GiB.
LAYERS = 16
ROUNDS = 3  # Rounds in which the copy and the step take turns.
BLOCK_SECONDS = 0.2  # The least seconds of a turn.
MINI, RANK_256 = "apollo-mini", "apollo, rank 256"
ROWS = (
    ADAMW["float32"],
    ADAMW["bfloat16"],
    "sgd",
    "lion",
    MINI,
    RANK_256,
    f"{RANK_256}, normal",
    "racs",
    "apollo-zero",
    "apollo-zero, relative",
    "apollo-zero, int8 momentum, relative",
    "apollo-zero, whitening",
    "muon",
)
# The last two rows are slow, and one layout is enough for them.
STACKED_ROWS = ROWS[:-2]
TORCH_ROWS = ("torch adamw, fused", "apollo-torch, mini", "apollo-torch, rank 256")
REHEARSED = (ADAMW["float32"], MINI, TORCH_ROWS[0])
COMPILE, COPY = ("compile, s", "compile, over adamw"), "copy, GB/s"
# Compile times are not compared on a GPU, and each row has a copy of its own.
HEAD = tuple(
    COPY if name == COMPILE[0] else name for name in STEP_HEAD if name != COMPILE[1]
)


class Sizes(NamedTuple):
    """The kernels to update, and the size of the copy."""

    model: str
    layers: int | None
    copy_bytes: int


def timed(
    setting: Setting, name: str, copy_bytes: int, hlo: Path | None
) -> Generator[Measured | Failed | None]:
    """Yields None when compiled, then the measurement; see `worker.Row`."""
    kernels = setting.kernels()
    contender: Contender
    if name in TORCH_ROWS:
        packages = (
            ("torch", "apollo_torch") if name.startswith("apollo") else ("torch",)
        )
        if missing := [
            package for package in packages if not importlib.util.find_spec(package)
        ]:
            yield Failed(f"{missing[0]} is not installed")
            return
        contender = step_torch.contenders(setting, kernels)[name]
    else:
        known = {
            method.name: method
            for group in methods(setting).values()
            for method in group
        }
        contender = OnJax(known[name], kernels, Draw(kernels))
    copy = Copy(copy_bytes)
    copy.compile()
    contender.compile()
    # Other rows compiled at the same time, so these times mean nothing.
    contender.measured.compilations.clear()
    if isinstance(contender, OnJax):
        keep_hlo(hlo, contender.program)
    yield None
    for _ in range(ROUNDS):
        copy.run_block(BLOCK_SECONDS)
        contender.run_block(BLOCK_SECONDS)
    contender.measured.copy = copy.measured
    yield contender.measured


def goals() -> list[Goal]:
    """Returns the goals of a step on a GPU."""
    setting = Setting("7b", "bfloat16", "unstacked", LAYERS)
    gpu = functools.partial(Goal, place="GPU", setting=setting)

    def over_bytes(ours: str) -> Any:
        return lambda results: over_floor(results[ours]) if ours in results else None

    f32, bf16 = ADAMW["float32"], ADAMW["bfloat16"]
    release = over(MINI, "apollo-torch, mini")
    return [
        gpu("apollo-mini over its floor of bytes", 1.3, outcome=over_bytes(MINI)),
        gpu(
            "apollo rank 256 over its floor of bytes",
            1.45,
            outcome=over_bytes(RANK_256),
        ),
        gpu("apollo-mini over adamw, bfloat16 moments", 0.75, outcome=over(MINI, bf16)),
        gpu("apollo-mini over adamw, float32 moments", 0.45, outcome=over(MINI, f32)),
        gpu(
            "apollo rank 256 over adamw, bfloat16 moments",
            0.95,
            outcome=over(RANK_256, bf16),
        ),
        gpu(
            "apollo rank 256 over adamw, float32 moments",
            0.6,
            outcome=over(RANK_256, f32),
        ),
        gpu(
            "apollo-mini over the authors' release",
            0.3,
            outcome=release,
            layouts=("unstacked",),
        ),
    ]


def row(name: str, results: dict[str, Measured]) -> list[str]:
    measured = results[name]
    found = dict(zip(STEP_HEAD, cells(name, results), strict=True)) | {COPY: ""}
    if measured.copy and (blocks := measured.copy.by_round()):
        bandwidth = measured.copy.floor_bytes / statistics.median(blocks)
        found[COPY] = f"{bandwidth / 1e9:,.0f}"
    return [found[column] for column in HEAD]


def title(setting: Setting) -> str:
    kernels = setting.kernels()
    count = sum(leaf.size for leaf in kernels.values())
    layers = f", {setting.layers} of its layers" if setting.layers else ""
    return (
        f"{setting.model}{layers}, {setting.dtype}, {setting.layout}: {count:,} "
        f"parameters in {len(kernels)} leaves, {megabytes(tree_bytes(kernels))} MB; "
        f"medians of {ROUNDS} rounds of blocks of {BLOCK_SECONDS} s, each beside a "
        "copy in the same process"
    )


def run(bench: Bench) -> None:
    sizes = (
        Sizes("tiny", 2, 2**20)
        if bench.rehearse
        else Sizes("7b", LAYERS, COPY_BYTES["gpu"])
    )
    results: Results = {}
    tables: dict[Setting, Table] = {}

    def put(job: Job, known: Any, found: Measured | Failed) -> None:
        del known
        setting, name, *_ = job.args
        if isinstance(found, Failed):
            tables[setting].put(name, [name, found.reason])
            return
        results[setting][name] = found
        values = {"blocks_s": found.blocks, "floor_bytes": found.floor_bytes}
        values["copy_s"] = found.copy.blocks if found.copy else None
        tables[setting].put(name, row(name, results[setting]), values)
        if found.refresh_every and found.refreshes:
            seconds = statistics.median(found.refreshes)
            bench.report.note(
                f"{name}: one step in {found.refresh_every} takes "
                f"{milliseconds(seconds)} ms, amortised into the table."
            )

    for layout, names in (
        ("unstacked", (*ROWS, *TORCH_ROWS)),
        ("stacked", STACKED_ROWS),
    ):
        setting = Setting(sizes.model, "bfloat16", layout, sizes.layers)
        results[setting] = {}
        tables[setting] = bench.report.table(title(setting), HEAD, numbers_from=1)
        if bench.rehearse:
            names = [name for name in names if name in REHEARSED]
        bench.measure(
            [
                Job(
                    f"{name}, {layout}",
                    timed,
                    (setting, name, sizes.copy_bytes, bench.hlo(f"{name}, {layout}")),
                )
                for name in names
            ],
            put,
        )
    goal_table = bench.report.table("Goals", GOALS_HEAD, numbers_from=5)
    for goal in goals():
        goal_table.put(goal.what, goal.cells(results))

"""One step of each optimizer, timed side by side.

Run it with `python -m benchmarks.optimizer_step`.

A step is `update` and `apply_updates` in one jitted program that donates parameters and
state. The parameters have the shapes of a LLaMA's kernels, attention and MLP of all
layers. Embeddings, head and norms get Adam with any optimizer, and are left out.

The optimizers take turns, with a block of steps each, so that other load on the machine
affects all of them. A large copy takes turns too, and gives the machine's bandwidth.
Each optimizer is compared with its floor, the time to move the bytes that it must move
at that bandwidth. On a GPU, `python -m benchmarks.gpu step` times the same contenders.
"""

import dataclasses
import functools
import os
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax

from benchmarks import import_time, step_torch
from benchmarks.report import made_with, markdown
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
from examples.llama.config import preset
from examples.llama.options import parse
from examples.llama.run.errors import (
    UsageError,
    exit_on_usage_error,
    notice,
    unknown_name,
)

DTYPES = ("float32", "bfloat16")
LAYOUTS = ("unstacked", "stacked")
OPTIMIZERS = tuple(methods(Setting("tiny", "float32", "stacked")))
PAUSE = 0.2  # Seconds before a turn; threads of the last one may still spin.
COPY = "copy"
# On a GPU, the time of a smaller copy would be that of its launch.
COPY_BYTES = {"cpu": 2**30, "gpu": 2**32}
IMPORT_LIMIT = 1.1  # The limit of `import apollo_optax` over `import optax`.


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The time, memory and compile time of one step of each optimizer, side by side."""

    models: tuple[str, ...] = ("60m",)
    """Presets of examples/llama/config.py."""
    layouts: tuple[str, ...] = LAYOUTS
    """unstacked: a leaf per matrix; stacked: a leaf for the matrices of all layers."""
    dtype: str = "float32"
    """The dtype of weights and gradients: float32 or bfloat16."""
    optimizers: tuple[str, ...] = OPTIMIZERS
    """Optimizers to time beside adamw, which is the base of ratios: sgd, adamw,
    adafactor, lion, galore, muon, apollo, apollo-mini, racs, apollo-zero."""
    rounds: int = 7
    """Turns of each optimizer."""
    seconds: float = 0.5
    """The least seconds of a turn; it has a few steps at least."""
    compilations: int = 3
    """How often each step is compiled, to time its compilation."""
    against_torch: bool = False
    """Add the authors' release (apollo-torch) and torch's fused AdamW, to the unstacked
    layout."""

    def __post_init__(self) -> None:
        for name in self.models:
            preset(name)
        for flag, names, known in (
            ("--layouts", self.layouts, LAYOUTS),
            ("--dtype", (self.dtype,), DTYPES),
            ("--optimizers", self.optimizers, OPTIMIZERS),
        ):
            for name in names:
                if name not in known:
                    raise unknown_name(flag, name, known)
        for name in ("rounds", "seconds", "compilations"):
            if not getattr(self, name) > 0:
                raise UsageError(
                    f"--{name} {getattr(self, name)} is out of range; "
                    "give a number above 0"
                )

    def settings(self) -> list[Setting]:
        return [
            Setting(model, self.dtype, layout)
            for model in self.models
            for layout in self.layouts
        ]


# The inner keys are the contenders' names.
Results = dict[Setting, dict[str, Measured]]


def contenders(setting: Setting, options: Options) -> dict[str, Contender]:
    kernels = setting.kernels()
    draw = Draw(kernels)
    found: dict[str, Contender] = {
        COPY: Copy(COPY_BYTES["cpu" if jax.default_backend() == "cpu" else "gpu"])
    }
    for name, group in methods(setting).items():
        if name in ("adamw", *options.optimizers):
            found |= {method.name: OnJax(method, kernels, draw) for method in group}
    if options.against_torch and not setting.stacked:
        found |= step_torch.contenders(setting, kernels)
    return found


def measure(setting: Setting, options: Options) -> dict[str, Measured]:
    """Compiles all contenders, then lets them take turns."""
    taking_turns = contenders(setting, options)
    for contender in taking_turns.values():
        contender.measured.copy = taking_turns[COPY].measured
    for number in range(options.compilations):
        notice(
            f"{setting.model}, {setting.layout}: compilation {number + 1} of "
            f"{options.compilations}"
        )
        for contender in taking_turns.values():
            contender.compile()
    for number in range(options.rounds):
        notice(
            f"{setting.model}, {setting.layout}: round {number + 1} of {options.rounds}"
        )
        # The order alternates, so that a drift of the machine favours none.
        for name in list(taking_turns)[:: 1 if number % 2 == 0 else -1]:
            run_block(name, taking_turns[name], options.seconds)
    return {name: contender.measured for name, contender in taking_turns.items()}


def run_block(name: str, contender: Contender, seconds: float) -> None:
    if contender.measured.out_of_memory:
        return
    time.sleep(PAUSE)
    try:
        contender.run_block(seconds)
    except MemoryError as error:
        notice(f"{name} does not fit: {error}")
        contender.measured.out_of_memory = True


def ratio(ours: Measured, theirs: Measured) -> float | None:
    """Returns the median over the rounds of the ratio of two steps' times."""
    if ours.out_of_memory or theirs.out_of_memory:
        return None
    return statistics.median(
        a / b for a, b in zip(ours.by_round(), theirs.by_round(), strict=True)
    )


def over_floor(ours: Measured) -> float | None:
    """Returns the time of a step over the time to copy the bytes that it must move."""
    if ours.copy is None or (over_copy := ratio(ours, ours.copy)) is None:
        return None
    return over_copy * ours.copy.floor_bytes / ours.floor_bytes


def compilation_ratio(ours: Measured, theirs: Measured) -> float:
    return statistics.median(
        a / b for a, b in zip(ours.compilations, theirs.compilations, strict=True)
    )


ADAMW = {moments: f"adamw, {moments} moments" for moments in DTYPES}
HEAD = (
    "optimizer",
    "ms a step",
    "fastest, slowest block",
    "over adamw, float32 moments",
    "over adamw, bfloat16 moments",
    "least MB",
    "over its floor",
    "compile, s",
    "compile, over adamw",
    "temporaries, MB",
    "state, MB",
)


def table(setting: Setting, results: dict[str, Measured]) -> str:
    """Returns the table of a setting, with a row per optimizer."""
    kernels = setting.kernels()
    matrices = [
        tree_bytes([leaf]) // (leaf.shape[0] if setting.stacked else 1)
        for leaf in kernels.values()
    ]
    copy = results[COPY]
    lines = [
        f"{setting.model}, {setting.dtype}, {setting.layout}: "
        f"{sum(x.size for x in kernels.values()):,} parameters in {len(kernels)} "
        f"leaves, {megabytes(tree_bytes(kernels))} MB, the largest matrix "
        f"{megabytes(max(matrices))} MB; a copy of {megabytes(copy.floor_bytes // 2)} "
        f"MB moves {copy.floor_bytes / statistics.median(copy.by_round()) / 1e9:.1f} "
        "GB/s",
        "",
        markdown(
            HEAD,
            [cells(name, results) for name in results if name != COPY],
            numbers_from=1,
        ),
    ]
    for name, measured in results.items():
        if measured.refresh_every and measured.refreshes:
            refresh = milliseconds(statistics.median(measured.refreshes))
            lines += [
                "",
                (
                    f"{name}: one step in {measured.refresh_every} takes {refresh} ms, "
                    "amortised into the table"
                ),
            ]
    return "\n".join(lines)


def cells(name: str, results: dict[str, Measured]) -> list[str]:
    """Returns a contender's row; ratios to contenders without results are left out."""
    ours = results[name]
    floor = megabytes(ours.floor_bytes)
    if ours.out_of_memory:
        return [name, "out of memory", "", "", "", floor, *[""] * 5]
    blocks = ours.by_round()
    adamws = [results.get(adamw) for adamw in ADAMW.values()]
    return [
        name,
        milliseconds(statistics.median(blocks)),
        f"{milliseconds(min(blocks))}, {milliseconds(max(blocks))}",
        *(number(adamw and ratio(ours, adamw)) for adamw in adamws),
        floor,
        number(over_floor(ours)),
        number(statistics.median(ours.compilations)) if ours.compilations else "",
        number(compilation_ratio(ours, adamws[0]))
        if ours.compilations and adamws[0]
        else "",
        megabytes(ours.temporaries_bytes),
        megabytes(ours.state_bytes),
    ]


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f}"


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:,.1f}"


# The outcome is None if it was not measured.
Outcome = Callable[[dict[str, Measured]], float | None]


class Goal(NamedTuple):
    """A limit of a ratio, for each layout that is measured."""

    what: str
    limit: float
    place: str
    setting: Setting  # The setting of the goal in any layout.
    outcome: Outcome
    layouts: tuple[str, ...] = LAYOUTS

    def cells(self, results: Results) -> list[str]:
        place = f"{self.place}, {self.setting.model}, {self.setting.dtype}"
        head = [place, self.what, f"<= {self.limit}"]
        found = {
            layout: outcome
            for layout in self.layouts
            if (measured := results.get(self.setting._replace(layout=layout)))
            and (outcome := self.outcome(measured)) is not None
        }
        if not found:
            return [*head, "not in this run", ""]
        values = ", ".join(f"{value:.2f} {layout}" for layout, value in found.items())
        return [*head, values, verdict(max(found.values()) <= self.limit)]


def over(ours: str, theirs: str) -> Outcome:
    """Returns the ratio of two contenders' times as a function of the results."""
    return lambda results: (
        ratio(results[ours], results[theirs])
        if {ours, theirs} <= results.keys()
        else None
    )


def goals() -> list[Goal]:
    """Returns the goals on a CPU; those on a GPU are in `benchmarks.gpu.step`."""
    cpu = functools.partial(
        Goal, place="CPU", setting=Setting("60m", "float32", "unstacked")
    )
    adamw, mini, r128 = ADAMW["float32"], "apollo-mini", "apollo, rank 128"

    def to_compile(ours: str, most: float) -> Goal:
        def outcome(results: dict[str, Measured]) -> float | None:
            if ours not in results:
                return None
            return compilation_ratio(results[ours], results[adamw])

        return cpu(f"compile time, {ours} over adamw", most, outcome=outcome)

    return [
        cpu("apollo-mini over optax.adamw", 0.55, outcome=over(mini, adamw)),
        cpu(
            "apollo rank 128 over the authors' release",
            0.65,
            outcome=over(r128, "apollo-torch, rank 128"),
            layouts=("unstacked",),
        ),
        cpu(
            "apollo rank 128 over optax.contrib.galore",
            0.5,
            outcome=over(r128, "galore, rank 128"),
        ),
        cpu("racs over optax.adamw", 0.8, outcome=over("racs", adamw)),
        cpu(
            "apollo-zero over optax.contrib.muon",
            0.25,
            outcome=over("apollo-zero", "muon"),
        ),
        to_compile(mini, 3.0),
        to_compile(r128, 3.0),
        to_compile("racs", 2.0),
    ]


GOALS_HEAD = ("where", "what", "goal", "measured", "")


def goals_table(results: Results, imports: import_time.ImportTimes) -> str:
    """Returns the table of the goals and the measured ratios."""
    rows = [goal.cells(results) for goal in goals()]
    imported = [number(imports.ratio), verdict(imports.ratio <= IMPORT_LIMIT)]
    rows.append(
        [
            "anywhere",
            "import apollo_optax over import optax",
            f"<= {IMPORT_LIMIT}",
            *imported,
        ]
    )
    return markdown(GOALS_HEAD, rows, numbers_from=5)


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def report(options: Options) -> None:
    packages = ["jax", "jaxlib", "optax"]
    if options.against_torch:
        # JAX would preallocate three quarters of a GPU's memory.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        step_torch.check()
        packages += ["torch", "apollo-torch"]
    # The compile times must be those of cold compilations.
    jax.config.update("jax_enable_compilation_cache", False)
    print(made_with(packages))
    print(
        f"ratios: medians over {options.rounds} rounds of blocks of {options.seconds} "
        f"s; compile: median of {options.compilations}; MB of 1e6 bytes\n"
    )
    results: Results = {}
    for setting in options.settings():
        results[setting] = measure(setting, options)
        print(table(setting, results[setting]) + "\n", flush=True)
    print(goals_table(results, import_time.measure()))


def main(args: list[str] | None = None) -> None:
    exit_on_usage_error(
        lambda: report(parse(Options, args, "python -m benchmarks.optimizer_step"))
    )


if __name__ == "__main__":
    main()

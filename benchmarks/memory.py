"""The memory of training steps, compiled for TPUs that need not be attached.

Run it with `python -m benchmarks.memory`.

Three tables: what the paper claims and this project set out to reach, goals for
fine-tuning beside LoRA, and models by optimizers. Numbers are of one device, in GB of
1e9 bytes, from `examples.llama.plan`. A compilation takes from half a minute to some
minutes; what has been compiled is in --out, so that a run that was cut off goes on.
Delete that file when the code has changed.
"""

import dataclasses
import datetime
import functools
import json
import os
import platform
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.report import markdown
from examples.llama.memory.options import (
    PlanOptions,
    TuningPlanOptions,
    bytes_in,
)
from examples.llama.memory.report import versions
from examples.llama.memory.search import fitting_batch, runs
from examples.llama.memory.target import Compiler, Memory, check_target
from examples.llama.options import RunOptions, parse
from examples.llama.run.errors import UsageError, check_names, exit_on_usage_error
from examples.llama.run.setup import model_config
from examples.llama.text.cache import write_whole

LARGE = "v5p:1x1x1"
SMALL = "v5e:1x1"
# The published ranks of APOLLO.
RANKS = {"60m": 128, "130m": 192, "350m": 256, "1b": 512, "7b": 256, "13b": 256}
TABLES = ("goals", "finetune", "models")
# The models of the second table.
TUNED = ("llama-3.1-8b", "qwen3-8b")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Prints the tables of docs/memory.md."""

    out: Path = Path("runs/memory.jsonl")
    """File of what has been compiled, added to."""
    jobs: int = 2
    """Compilations at a time; each takes some GB of memory."""
    tables: tuple[str, ...] = TABLES
    """Any of goals, finetune and models."""
    models: tuple[str, ...] = tuple(RANKS)
    """Of the last table: any of 60m, 130m, 350m, 1b, 7b and 13b."""

    def __post_init__(self) -> None:
        check_names("--tables", self.tables, TABLES)
        check_names("--models", self.models, RANKS)
        if self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs} is out of range; give 1 or more")


class Compiled:
    """The memory of runs by their options and target, kept in a file of JSON lines."""

    def __init__(self, path: Path) -> None:
        self._path, self._lock = path, threading.Lock()
        path.parent.mkdir(parents=True, exist_ok=True)
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # The last line may be cut off.
        try:
            if text and not whole:
                raise ValueError("it has no line feed")
            rows = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise UsageError(
                f"--out {path} is no file of this command's ({error}); give another"
            ) from error
        try:
            self._known = {row["key"]: Memory(**row["memory"]) for row in rows}
        except (KeyError, TypeError) as error:
            raise UsageError(
                f"--out {path} is not a file of this version of the command ({error}); "
                "give another"
            ) from error
        if whole != text:
            write_whole(path, whole)

    def __call__(self, run: RunOptions, target: str) -> Memory:
        """Returns the memory of a run with its defaults filled in."""
        fields = dataclasses.asdict(run) | {
            "target": target,
            "versions": versions(target),
        }
        key = json.dumps(fields, default=str, sort_keys=True)
        if key not in self._known:
            print(
                f"compiling {run.model} {run.optimizer}, batch {run.batch}, {target}",
                file=sys.stderr,
            )
            with Compiler(target) as memory_of:
                memory = memory_of(run)
            with self._lock, self._path.open("a") as file:
                self._known[key] = memory
                file.write(
                    json.dumps({"key": key, "memory": dataclasses.asdict(memory)})
                    + "\n"
                )
        return self._known[key]

    def plan(self, options: PlanOptions) -> Memory:
        (run,) = runs(options, model_config(options))
        return self(run, options.target)

    def largest_batch(self, options: PlanOptions) -> int:
        """Returns the largest batch within --fit, or 0."""
        assert options.fit is not None
        (run,) = runs(options, model_config(options))
        return fitting_batch(
            options,
            bytes_in("--fit", options.fit),
            lambda batch: self(dataclasses.replace(run, batch=batch), options.target),
        )


def step_of(model: str, optimizer: str, **options: Any) -> PlanOptions:
    """Returns a run at the smallest batch, with weights and moments in bfloat16."""
    default = {
        "batch": 1,
        "seq": 256,
        "weights": "bfloat16",
        "moment_dtype": "bfloat16",
        "remat": "none",
    }
    return PlanOptions(
        **{
            "model": model,
            "optimizer": optimizer,
            "target": LARGE,
            **default,
            **options,
        }
    )


def tuning_of(model: str, **options: Any) -> TuningPlanOptions:
    """Returns a fine-tuning by APOLLO-Mini, embeddings too, at the smallest batch."""
    default = {
        "batch": 1,
        "seq": 1024,
        "weights": "bfloat16",
        "moment_dtype": "bfloat16",
        "remat": "none",
        "optimizer": "apollo-mini",
        "embeddings": "apollo",
        "layerwise": True,
        "target": SMALL,
    }
    return TuningPlanOptions(**{"model": model, **default, **options})


def lora_of(model: str) -> TuningPlanOptions:
    """Returns LoRA of rank 32 with the least memory that it takes here."""
    return tuning_of(
        model,
        lora=32,
        optimizer="adamw",
        embeddings="adam",
        layerwise=False,
        remat="full",
    )


class Goal(NamedTuple):
    what: str
    paper: str
    goal: str
    # Returns what was measured, and whether it meets the goal.
    outcome: Callable[[Compiled], tuple[str, bool]]


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def below(limit: float, options: PlanOptions) -> Callable[[Compiled], tuple[str, bool]]:
    """A goal of at most `limit` GB on the device."""

    def outcome(compiled: Compiled) -> tuple[str, bool]:
        memory = compiled.plan(options)
        refused = f", refused by {options.target}" if memory.refused else ""
        return gb(
            memory.peak_bytes
        ) + refused, not memory.refused and memory.peak_bytes <= limit * 1e9

    return outcome


def below_with_host(
    limit: float,
    host_ratio: float | None,
    host_limit: float | None,
    options: PlanOptions,
) -> Callable[[Compiled], tuple[str, bool]]:
    """Goals for the device, and for the host in multiples of its weights or in GB."""

    def outcome(compiled: Compiled) -> tuple[str, bool]:
        memory = compiled.plan(options)
        assert memory.host_bytes is not None
        met = not memory.refused and memory.peak_bytes <= limit * 1e9
        if host_ratio is not None:
            met = met and memory.host_bytes <= host_ratio * memory.host_weights_bytes
        if host_limit is not None:
            met = met and memory.host_bytes <= host_limit * 1e9
        ratio = memory.host_bytes / memory.host_weights_bytes
        return (
            f"{gb(memory.peak_bytes)}, host {gb(memory.host_bytes)} = {ratio:.3f} of "
            "the weights there, "
            f"{memory.host_temporaries_bytes:,} bytes of it temporary",
            met and memory.host_temporaries_bytes == 0,
        )

    return outcome


def more_sequences(times: float, fit: str) -> Callable[[Compiled], tuple[str, bool]]:
    """A goal: layer-wise APOLLO-Mini's largest batch over that of ordinary AdamW."""

    def outcome(compiled: Compiled) -> tuple[str, bool]:
        theirs = compiled.largest_batch(step_of("7b", "adamw", remat="full", fit=fit))
        mini = step_of(
            "7b",
            "apollo-mini",
            layerwise=True,
            embeddings="apollo",
            remat="full",
            fit=fit,
        )
        ours = compiled.largest_batch(mini)
        return f"{ours} / {theirs} = {ours / max(1, theirs):.1f}x", bool(
            theirs
        ) and ours >= times * theirs

    return outcome


def does_not_fit(
    fit: str, options: PlanOptions
) -> Callable[[Compiled], tuple[str, bool]]:
    def outcome(compiled: Compiled) -> tuple[str, bool]:
        memory = compiled.plan(options)
        return gb(memory.peak_bytes), memory.refused or memory.peak_bytes > bytes_in(
            "--fit", fit
        )

    return outcome


def fits_with(
    options: PlanOptions, devices: int
) -> Callable[[Compiled], tuple[str, bool]]:
    def outcome(compiled: Compiled) -> tuple[str, bool]:
        batch = compiled.largest_batch(options)
        return f"{batch // devices} sequences a device", batch > 0

    return outcome


def goals() -> list[Goal]:
    mini = functools.partial(
        step_of, optimizer="apollo-mini", target=SMALL, layerwise=True
    )
    adam, apollo = {"embeddings": "adam"}, {"embeddings": "apollo"}
    of_7b, of_13b = functools.partial(mini, "7b"), functools.partial(mini, "13b")
    of_70b = functools.partial(mini, "llama-2-70b", offload="weights", **apollo)
    int8 = {"weights": "int8"}
    under_12 = "under 12 GB"
    parallel = step_of(
        "13b", "apollo-mini", remat="full", mesh="data=8", batch=8, target="v5p:2x2x2"
    )
    return [
        Goal(
            "7B int8, layer-wise", under_12, "9.5 GB", below(9.5, of_7b(**int8, **adam))
        ),
        Goal(
            "the same, embeddings too",
            under_12,
            "8.5 GB",
            below(8.5, of_7b(**int8, **apollo)),
        ),
        Goal(
            "7B int8, 2048 tokens",
            "",
            "11 GB",
            below(11, of_7b(**int8, **adam, seq=2048)),
        ),
        Goal(
            "13B int8, embeddings too", "", "16 GB", below(16, of_13b(**int8, **apollo))
        ),
        Goal("7B bfloat16, layer-wise", "", "15.5 GB", below(15.5, of_7b(**adam))),
        Goal("the same, embeddings too", "", "14.5 GB", below(14.5, of_7b(**apollo))),
        Goal(
            "13B bfloat16, ordinary step, data parallel over 8, in 80 GB",
            "fits",
            "fits",
            fits_with(dataclasses.replace(parallel, fit="80GB"), 8),
        ),
        Goal(
            "largest batch, 7B in 80 GB",
            "16 / 4 = 4x",
            "2.4x",
            more_sequences(2.4, "80GB"),
        ),
        Goal("largest batch, 7B in 64 GB", "", "4.5x", more_sequences(4.5, "64GB")),
        Goal(
            "7B AdamW, float32 moments, in 80 GB",
            "",
            "does not fit",
            does_not_fit(
                "80GB", step_of("7b", "adamw", remat="full", moment_dtype="float32")
            ),
        ),
        Goal(
            "7B bfloat16, weights on the host, embeddings too",
            "",
            "1.6 GB, host 1.02 of the weights",
            below_with_host(1.6, 1.02, None, of_7b(offload="weights", **apollo)),
        ),
        Goal(
            "70B bfloat16, weights on the host",
            "",
            "6 GB",
            below_with_host(6, None, None, of_70b()),
        ),
        Goal(
            "70B int8, weights on the host",
            "",
            "6 GB, host 75 GB",
            below_with_host(6, None, 75, of_70b(**int8)),
        ),
    ]


class Variant(NamedTuple):
    """A row of the table of models."""

    optimizer: str
    step: str
    weights: str = "bfloat16"
    embeddings: str = "adam"
    moment_dtype: str = "bfloat16"

    def options(self, model: str) -> PlanOptions:
        rank = RANKS[model] if self.optimizer == "apollo" else None
        given = {
            name: getattr(self, name)
            for name in ("weights", "embeddings", "moment_dtype")
        }
        return step_of(
            model,
            self.optimizer,
            rank=rank,
            layerwise=self.step == "layer-wise",
            **given,
        )

    def cells(self) -> list[str]:
        name = self.optimizer + (
            ", embeddings too" if self.embeddings == "apollo" else ""
        )
        return [name, self.moment_dtype, self.step, self.weights]


# GaLore is left out. In seven minutes of one core at 130M, the TPU compiler did not
# finish its SVDs.
VARIANTS = [
    Variant("adamw", "ordinary", moment_dtype="float32"),
    Variant("adamw", "ordinary"),
    Variant("adamw", "layer-wise"),
    Variant("muon", "ordinary"),
    Variant("muon", "layer-wise"),
    Variant("apollo", "ordinary"),
    Variant("apollo", "layer-wise"),
    Variant("apollo", "layer-wise", "int8"),
    Variant("apollo-mini", "ordinary"),
    Variant("apollo-mini", "layer-wise"),
    Variant("apollo-mini", "layer-wise", "int8"),
    Variant("apollo-mini", "layer-wise", "bfloat16", "apollo"),
    Variant("apollo-mini", "layer-wise", "int8", "apollo"),
]


def below_lora(
    limit: float, options: TuningPlanOptions
) -> Callable[[Compiled], tuple[str, bool]]:
    """A goal of at most `limit` GB on the device, and less than LoRA takes."""

    def outcome(compiled: Compiled) -> tuple[str, bool]:
        ours, met = below(limit, options)(compiled)
        assert options.model is not None
        lora = compiled.plan(lora_of(options.model))
        refused = f", refused by {SMALL}" if lora.refused else ""
        beside = compiled.plan(options).peak_bytes < lora.peak_bytes
        return f"{ours}; LoRA {gb(lora.peak_bytes)}{refused}", met and beside

    return outcome


def tuning_goals() -> list[Goal]:
    """Returns the goals of fine-tuning, for models of the newest vocabularies."""
    return [
        Goal(f"{model} {what}", "", f"{limit} GB, below LoRA", below_lora(limit, plan))
        for model in TUNED
        for what, limit, plan in (
            ("int8, layer-wise", 12, tuning_of(model, weights="int8")),
            ("bfloat16, weights on the host", 4, tuning_of(model, offload="weights")),
        )
    ]


def goals_table(given: list[Goal], compiled: Compiled, pool: ThreadPoolExecutor) -> str:
    """Returns what was to be reached, and what is."""
    outcomes = list(pool.map(lambda goal: goal.outcome(compiled), given))
    rows = [
        [goal.what, goal.paper, goal.goal, measured, "met" if met else "missed"]
        for goal, (measured, met) in zip(given, outcomes, strict=True)
    ]
    return markdown(
        ["APOLLO-Mini", "paper", "goal", "measured", ""], rows, numbers_from=5
    )


def models_table(
    compiled: Compiled, pool: ThreadPoolExecutor, models: tuple[str, ...]
) -> str:
    """Returns the peak of one sequence of 256 tokens, by model and optimizer."""

    def cell(pair: tuple[Variant, str]) -> str:
        variant, model = pair
        memory = compiled.plan(variant.options(model))
        return f"{memory.peak_bytes / 1e9:.2f}" + ("*" if memory.refused else "")

    cells = iter(
        list(
            pool.map(
                cell, [(variant, model) for variant in VARIANTS for model in models]
            )
        )
    )
    rows = [[*variant.cells(), *(next(cells) for _ in models)] for variant in VARIANTS]
    head = [
        "optimizer",
        "moments",
        "step",
        "weights",
        *(model.upper() for model in models),
    ]
    return markdown(head, rows, numbers_from=4)


def report(options: Options) -> None:
    check_target(LARGE)
    compiled = Compiled(options.out)
    made_with = ", ".join(
        f"{name} {version}" for name, version in versions(LARGE).items()
    )
    print(
        f"{platform.machine()}, no TPU; {made_with}; "
        f"{datetime.date.today().isoformat()}\n"
    )
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            if "goals" in options.tables:
                print(
                    f"batch 1 of 256 tokens on {SMALL} unless said; "
                    "embeddings with Adam\n"
                )
                print(goals_table(goals(), compiled, pool) + "\n")
            if "finetune" in options.tables:
                print(
                    f"fine-tuning, batch 1 of 1024 tokens on {SMALL}, embeddings and "
                    "head by APOLLO-Mini too; LoRA of rank 32 in bfloat16 with AdamW "
                    "and moments in bfloat16\n"
                )
                print(goals_table(tuning_goals(), compiled, pool) + "\n")
            if "models" in options.tables:
                print(
                    f"GB, batch 1 of 256 tokens, for {LARGE}; *: refused, from the "
                    "compiler's message\n"
                )
                print(models_table(compiled, pool, options.models))
        except KeyboardInterrupt:
            # The exit must also end the compilers at once, which the pool would wait
            # for.
            os._exit(130)


def main(args: list[str] | None = None) -> None:
    exit_on_usage_error(
        lambda: report(parse(Options, args, "python -m benchmarks.memory"))
    )


if __name__ == "__main__":
    main()

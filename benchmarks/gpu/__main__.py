"""The command line of the GPU's benchmarks.

python -m benchmarks.gpu                      all parts
python -m benchmarks.gpu check step memory    these, in this order
python -m benchmarks.gpu --rehearse           all, at tiny sizes, on any machine
python -m benchmarks.gpu --needs              what must be installed
"""

import argparse
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.gpu import needs

# The parts run in this order, so that what takes least time is known first.
DEFAULT_SECONDS = {
    "check": 60.0,
    "step": 120.0,
    "memory": 120.0,
    "throughput": 240.0,
    "train": 300.0,
}
PARTS = tuple(DEFAULT_SECONDS)


def arguments(args: list[str] | None) -> argparse.Namespace:
    # This is argparse, because machines with a GPU may lack tyro.
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Measures what only a GPU can show.",
    )
    budgets = ", ".join(
        f"{name} {seconds:g}" for name, seconds in DEFAULT_SECONDS.items()
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"any of {', '.join(PARTS)}"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/gpu"), help="folder for the tables"
    )
    parser.add_argument(
        "--seconds",
        nargs="+",
        default=[],
        metavar="PART=N",
        help=f"time budgets of parts, by default {budgets}",
    )
    parser.add_argument(
        "--total-seconds", type=float, help="time budget of the whole call"
    )
    parser.add_argument(
        "--rehearse", action="store_true", help="run at tiny sizes, also on a CPU"
    )
    parser.add_argument(
        "--dump",
        nargs="+",
        default=[],
        metavar="PART",
        help="keep the optimised HLO of each step",
    )
    parser.add_argument(
        "--only",
        default="",
        metavar="REGEX",
        help="measure rows with a matching name alone",
    )
    parser.add_argument(
        "--needs", action="store_true", help="list the packages and their versions"
    )
    quality = parser.add_argument_group("quality runs of the part train")
    quality.add_argument("--data", help="as in pretrain; python unless rehearsed")
    quality.add_argument("--seeds", nargs="+", type=int, default=[0])
    quality.add_argument(
        "--lr-factors",
        nargs="+",
        type=float,
        default=[1.0],
        help="multiples of the default rates",
    )
    quality.add_argument(
        "--lr-embeddings",
        nargs="+",
        type=float,
        default=[None],
        help="rates of embeddings, head and norms",
    )
    quality.add_argument("--batch", type=int, help="sequences a step, by default 512")
    quality.add_argument(
        "--optimizers", nargs="+", help="by default those of the table"
    )
    quality.add_argument("--steps", type=int, help="by default as many as fit")
    given = parser.parse_args(args)
    for name in (*given.parts, *given.dump):
        if name not in PARTS:
            parser.error(f"part {name!r} is unknown; choose from {', '.join(PARTS)}")
    given.budgets = dict(DEFAULT_SECONDS)
    for budget in given.seconds:
        name, _, seconds = budget.partition("=")
        if name not in PARTS or not is_positive(seconds):
            parser.error(f"--seconds {budget!r} is malformed; give PART=N, as check=60")
        given.budgets[name] = float(seconds)
    if given.total_seconds is not None and not given.total_seconds > 0:
        parser.error(
            f"--total-seconds {given.total_seconds} is out of range; "
            "give a number above 0"
        )
    try:
        re.compile(given.only)
    except re.error as error:
        parser.error(f"--only {given.only!r} is no regular expression ({error})")
    for flag, value in (("--steps", given.steps), ("--batch", given.batch)):
        if value is not None and value < 1:
            parser.error(f"{flag} {value} is out of range; give 1 or more")
    for flag, rates in (
        ("--lr-factors", given.lr_factors),
        ("--lr-embeddings", given.lr_embeddings),
    ):
        for rate in rates:
            if rate is not None and not rate > 0:
                parser.error(f"{flag} {rate} is out of range; give a number above 0")
    return given


def is_positive(text: str) -> bool:
    try:
        return float(text) > 0
    except ValueError:
        return False


def runners(given: argparse.Namespace) -> dict[str, Callable[..., bool | None]]:
    """Returns the parts as functions of a `Bench`; False means that a check failed."""
    # The imports are here because they load JAX, which --needs must do without.
    from benchmarks.gpu import check, memory, step, throughput, train
    from examples.llama.optimizers.recipes import RECIPES
    from examples.llama.run.errors import unknown_name

    for name in given.optimizers or ():
        if name not in RECIPES:
            raise unknown_name("--optimizers", name, RECIPES)
    options = train.QualityOptions(
        data=given.data or ("stdlib" if given.rehearse else "python"),
        seeds=tuple(given.seeds),
        lr_factors=tuple(given.lr_factors),
        optimizers=tuple(
            given.optimizers
            or (train.REHEARSED if given.rehearse else train.OPTIMIZERS)
        ),
        steps=given.steps,
        lr_embeddings=tuple(given.lr_embeddings),
        batch=given.batch,
    )
    return {
        "check": check.run,
        "step": step.run,
        "memory": memory.run,
        "throughput": throughput.run,
        "train": lambda bench: train.run(bench, options),
    }


def measure(given: argparse.Namespace) -> None:
    started = time.monotonic()
    parts = runners(given)
    from benchmarks.gpu.bench import Bench, this_device
    from benchmarks.gpu.report import Report
    from examples.llama.run.errors import UsageError, notice

    device = this_device()
    if device.platform != "gpu" and not given.rehearse:
        raise UsageError(
            f"JAX finds no GPU, only {device.kind}; install JAX for CUDA, or give "
            "--rehearse to try the command at tiny sizes"
        )
    given.out.mkdir(parents=True, exist_ok=True)
    has_failed = False
    for name in given.parts or PARTS:
        seconds = given.budgets[name]
        if given.total_seconds is not None:
            seconds = min(seconds, given.total_seconds - (time.monotonic() - started))
        if seconds <= 0:
            notice(f"{name}: no time left")
            continue
        report = Report(given.out, name, device.made_with)
        deadline = time.monotonic() + seconds
        dump, only = name in given.dump, given.only
        bench = Bench(report, device, deadline, given.rehearse, dump, only)
        has_failed |= parts[name](bench) is False
        bench.pack_hlo()
        print(report.as_markdown(), flush=True)
    if has_failed:
        sys.exit(1)


def main(args: list[str] | None = None) -> None:
    given = arguments(args)
    if given.needs:
        print(needs.report())
        return
    if missing := needs.missing():
        print(
            f"error: {', '.join(missing)} must be installed; see --needs",
            file=sys.stderr,
        )
        sys.exit(2)
    from examples.llama.run.errors import exit_on_usage_error

    exit_on_usage_error(lambda: measure(given))


if __name__ == "__main__":
    main()

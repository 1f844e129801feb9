"""Tells a run's memory before it runs.

Run it with `python -m examples.llama.plan --model 7b --target v5e:1x1`.

Compiles the very step that `pretrain` runs, for this machine or for TPUs that are not
there, and reads the memory off the compiled program; nothing is trained. All numbers
are for one device, in bytes or in GB of 1e9 bytes, and of the training step alone.
`python -m examples.llama.plan finetune` does the same for the step of `finetune`.
"""

import json
import sys
from typing import Any

from rich.console import Console

from examples.llama.memory.options import PlanOptions, TuningPlanOptions
from examples.llama.memory.report import as_json, draw, table
from examples.llama.memory.search import MemoryOf, plan
from examples.llama.memory.target import (
    Compiler,
    CompilerError,
    Memory,
    check_target,
)
from examples.llama.mesh import device_count
from examples.llama.options import RunOptions, parse
from examples.llama.run.errors import exit_on_usage_error
from examples.llama.run.setup import model_config

PROG = "python -m examples.llama.plan"
# The options by the command that is planned, which the first word may name.
COMMANDS: dict[str, type[PlanOptions]] = {
    "pretrain": PlanOptions,
    "finetune": TuningPlanOptions,
}


def parse_command(args: list[str]) -> PlanOptions:
    """Returns the options that a command line gives, of pretrain by default."""
    if args and args[0] in COMMANDS:
        return parse(COMMANDS[args[0]], args[1:], f"{PROG} {args[0]}")
    return parse(PlanOptions, args, PROG)


def with_progress(memory_of: MemoryOf, console: Console) -> MemoryOf:
    """Returns `memory_of`, saying on a terminal what is being compiled."""

    def measured(run: RunOptions, **more: Any) -> Memory:
        with console.status(f"compiling {run.optimizer}, batch {run.batch:,}"):
            return memory_of(run, **more)

    return measured


def report(options: PlanOptions, console: Console) -> None:
    """Plans and prints, and draws where --plot says so."""
    check_target(options.target)
    config = model_config(options)
    rows = []
    with Compiler(options.target, device_count(options.mesh)) as compiler:
        for row in plan(options, with_progress(compiler, Console(stderr=True))):
            rows.append(row)
            if options.json:
                print(json.dumps(as_json(row, options, config)), flush=True)
    if not options.json:
        console.print(table(rows, options, config))
    if options.plot:
        draw(rows, options, config)


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse_command(sys.argv[1:] if args is None else args)
        try:
            report(options, Console())
        except CompilerError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(1)

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()

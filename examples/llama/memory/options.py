"""The options of a plan, which are those of a run and a few more."""

import dataclasses
import os
import re
from pathlib import Path

from examples.llama.mesh import batch_shards
from examples.llama.optimizers.recipes import RECIPES
from examples.llama.options import RunOptions, TuningOptions
from examples.llama.run.errors import UsageError, unknown_name

UNITS = {
    "kb": 1e3,
    "mb": 1e6,
    "gb": 1e9,
    "tb": 1e12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanOptions(RunOptions):
    """The memory that pretrain would need with these options, from compiling its step.

    Nothing is run. `plan finetune` takes the options of finetune in the same way.
    """

    out: Path = Path(os.devnull)
    """Not used. It is accepted so that a command line of pretrain works as it is."""
    target: str = "cpu"
    """The device to compile for: cpu, gpu (that of this machine), or TPUs, even if none
    is attached: v5e:1x1, v5e:4x4, v6e:2x2, v5p:2x2x1, v4:2x2x1."""
    fit: str | None = None
    """A size such as 16GB (16e9 bytes) or 15.75GiB. Finds the largest batch that fits,
    instead of taking --batch."""
    compare: tuple[str, ...] = ()
    """Several optimizers instead of --optimizer, such as adamw,apollo,apollo-mini."""
    json: bool = False
    """Print a JSON object for each optimizer instead of the table."""
    plot: Path | None = None
    """Draw the memory as bars into this .png."""

    def __post_init__(self) -> None:
        names = tuple(
            name for words in self.compare for name in words.split(",") if name
        )
        if self.compare and not names:
            raise UsageError(
                "--compare names no optimizer; give some as adamw,apollo, "
                "or leave it out"
            )
        for name in names:
            if name not in RECIPES:
                raise unknown_name("--compare", name, RECIPES)
            if names.count(name) > 1:
                raise UsageError(
                    f"--compare {name} is given twice; give each optimizer once"
                )
        object.__setattr__(self, "compare", names)
        if self.fit is not None:
            bytes_in("--fit", self.fit)
            object.__setattr__(self, "batch", smallest_batch(self))
        if self.plot and not (self.plot.suffix == ".png" and self.plot.parent.is_dir()):
            raise UsageError(
                f"--plot {self.plot} is no .png in a folder that is there; give another"
            )
        super().__post_init__()

    @property
    def run_type(self) -> type[RunOptions]:
        """The class of options that the planned command takes."""
        return RunOptions


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlannedTuning(TuningOptions):
    """The options of a fine-tuning that is only planned; its model may be a preset."""

    out: Path = Path(os.devnull)
    """Not used. It is accepted so that a command line of finetune works as it is."""
    data: str = "none"
    """Not used, like the other options about the conversations."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TuningPlanOptions(PlannedTuning, PlanOptions):
    """The memory that finetune would need with these options, from compiling its step.

    The step takes packed rows, as in finetune. Give --model if the model itself is not
    available. Nothing is run.
    """

    @property
    def run_type(self) -> type[RunOptions]:
        return PlannedTuning


def bytes_in(flag: str, text: str) -> int:
    """Returns the bytes in `16GB` or `15.75GiB`; other forms raise `UsageError`."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmgt]i?b)", text.strip().lower())
    if not match or not float(match[1]):
        raise UsageError(
            f"{flag} {text!r} is no size; give one as 16GB (1e9 bytes each) or "
            "15.75GiB (2**30)"
        )
    return int(float(match[1]) * UNITS[match[2]])


def smallest_batch(options: RunOptions) -> int:
    """Returns the number that the batch must be a multiple of."""
    return batch_shards(options.mesh) * max(1, options.accumulate)

"""What a user can set; the classes are the command lines, their docstrings the help."""

import dataclasses
import math
from pathlib import Path
from typing import TypeVar

from examples.llama.config import preset
from examples.llama.usage import UsageError, unknown_name

REMAT = ("none", "full")
MOMENT_DTYPES = ("float32", "bfloat16")
EMBEDDINGS = ("adam", "apollo")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingOptions:
    """What runs that are compared have in common."""

    out: Path
    """Folder for the results; must not hold an earlier run."""
    model: str = "tiny"
    """tiny, 60m, 130m, 350m, 1b, 7b or 13b."""
    data: str = "stdlib"
    """stdlib: the source of Python's standard library, which needs no network."""
    steps: int = 800
    """Training steps; the first tenth warms the learning rates up."""
    batch: int = 8
    """Sequences a step."""
    seq: int = 128
    """Tokens a sequence."""
    seed: int = 0
    """Sets the initial weights, the order of the data and APOLLO's projections."""
    eval_every: int = 100
    """Steps between evaluations; the last step always has one."""
    remat: str = "none"
    """none, or full: compute activations again in the backward pass to save memory."""
    rank: int | None = None
    """APOLLO's rank; by default 1 for apollo-mini, else a quarter of the hidden size."""
    scale: float | None = None
    """APOLLO's scale; by default 128 for apollo-mini, else 1."""
    moment_dtype: str = "float32"
    """float32 or bfloat16, of APOLLO's moments; of only the first moment in adamw."""
    embeddings: str = "adam"
    """What APOLLO does with the embeddings and the head: adam, or apollo as with the kernels."""

    def __post_init__(self) -> None:
        for flag, value in self.numbers().items():
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{flag} {value} is out of range; give a number above 0")
        if self.seed < 0:
            raise UsageError(f"--seed {self.seed} is out of range; give 0 or more")
        limit = preset(self.model).max_seq_len
        if self.seq > limit:
            raise UsageError(f"--seq {self.seq} is too long; --model {self.model} takes {limit}")
        for flag, value, known in (
            ("--remat", self.remat, REMAT),
            ("--moment-dtype", self.moment_dtype, MOMENT_DTYPES),
            ("--embeddings", self.embeddings, EMBEDDINGS),
        ):
            if value not in known:
                raise unknown_name(flag, value, known)

    def numbers(self) -> dict[str, float | None]:
        """Returns what must be positive, by flag."""
        return {
            "--steps": self.steps,
            "--batch": self.batch,
            "--seq": self.seq,
            "--eval-every": self.eval_every,
            "--rank": self.rank,
            "--scale": self.scale,
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunOptions(TrainingOptions):
    """One run: a model trained with one optimizer at one pair of learning rates."""

    optimizer: str = "apollo-mini"
    """adamw, apollo, apollo-mini or apollo-svd."""
    lr: float | None = None
    """Peak learning rate of the layers' kernels; by default the optimizer's own."""
    lr_embeddings: float | None = None
    """Peak learning rate of embeddings, head and norms; by default the optimizer's own."""

    def numbers(self) -> dict[str, float | None]:
        return super().numbers() | {"--lr": self.lr, "--lr-embeddings": self.lr_embeddings}


Options = TypeVar("Options", bound=TrainingOptions)


def parse(options: type[Options], args: list[str] | None, prog: str) -> Options:
    """Returns the options a command line gives; one that does not parse exits with status 2."""
    import tyro  # Here, so that training from Python does not need it.

    return tyro.cli(options, args=args, prog=prog)

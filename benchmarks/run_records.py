"""The results of training runs, in a file of JSON lines that can be published."""

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from benchmarks import report
from examples.llama.options import RunOptions, differing_fields
from examples.llama.run.errors import UsageError
from examples.llama.run.log import Row

# Options that do not change a result, and the seed, which has a field of its own.
LEFT_OUT = frozenset(("out", "resume", "workers", "seed"))


class RunRecord(NamedTuple):
    """The result of a run, a line in the file."""

    part: str
    contender: str
    seed: int
    options: dict[str, Any]  # Those of the trainer, with all defaults filled in.
    val_loss: float | None  # In nats per token; None if the run diverged.
    # The RMS of the kernels' update over the learning rate, mean over the evaluations
    # in the second half of the run. None if the run diverged before it.
    update_rms: float | None
    step_seconds: float | None  # The median over the steps. None without a step.
    curve: list[list[float]]  # Pairs of step and validation perplexity.
    corpus: str  # A digest of the text and its tokenizer.
    made_with: str  # Machine, versions and date.

    @classmethod
    def of(
        cls,
        part: str,
        contender: str,
        run: RunOptions,
        val_loss: float | None,
        rows: Sequence[Row],
        corpus: str,
    ) -> Self:
        """Returns the result of a run that has ended, from its metrics."""
        sizes = [
            row["update_rms_over_lr"]
            for row in rows
            if row["step"] > run.steps / 2 and "update_rms_over_lr" in row
        ]
        return cls(
            *(part, contender, run.seed, options_of(run), val_loss),
            update_rms=statistics.mean(sizes) if sizes else None,
            step_seconds=step_seconds(rows) if rows else None,
            curve=[[row["step"], row["val_ppl"]] for row in rows if "val_ppl" in row],
            corpus=corpus,
            made_with=report.made_with(("jax", "flax", "optax")),
        )

    @property
    def loss(self) -> float:
        return math.inf if self.val_loss is None else self.val_loss

    @property
    def lr(self) -> float:
        return self.options["lr"]

    @property
    def lr_embeddings(self) -> float:
        return self.options["lr_embeddings"]


def options_of(run: RunOptions) -> dict[str, Any]:
    """Returns what decides the result of a run, besides its seed."""
    return {
        name: value
        for name, value in dataclasses.asdict(run).items()
        if name not in LEFT_OUT
    }


def step_seconds(rows: Sequence[Row]) -> float:
    """Returns the median over a run's steps, which leaves out compilation."""
    tokens = rows[-1]["tokens"] / rows[-1]["step"]
    return tokens / statistics.median(row["tokens_per_s"] for row in rows)


class Records:
    """The runs in a file. Several processes may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        try:
            self._runs = [RunRecord(**json.loads(line)) for line in lines]
        except (json.JSONDecodeError, TypeError) as error:
            raise UsageError(
                f"{path} is not a file of results ({error}); give another --results"
            ) from error

    def of(self, part: str, contender: str, base: RunOptions) -> list[RunRecord]:
        """Returns the runs of a contender, whose rates may differ from those of `base`.

        Raises:
            UsageError: if a run was made with other options, or if the part's runs were
                made with different texts.
        """
        in_part = [run for run in self._runs if run.part == part]
        if len({run.corpus for run in in_part}) > 1:
            raise UsageError(
                f"{self.path} has runs of part {part} with different texts (see its "
                f"field corpus), which can't be compared; keep the lines of one text"
            )
        runs = [run for run in in_part if run.contender == contender]
        for run in runs:
            # The rates are what a search varies.
            rates = {"lr": run.lr, "lr_embeddings": run.lr_embeddings}
            text = {"corpus": run.corpus}
            differing = differing_fields(
                options_of(base) | rates | text, run.options | text
            )
            if differing:
                raise UsageError(
                    f"{self.path} has a run of {contender} in part {part} with other "
                    f"options ({'; '.join(differing)}); remove its line or give "
                    f"another --results"
                )
        return runs

    def find(self, part: str, contender: str, run: RunOptions) -> RunRecord | None:
        """Returns the result of a run, or None if the file does not have it."""
        for each in self.of(part, contender, run):
            if (each.lr, each.lr_embeddings, each.seed) == (
                run.lr,
                run.lr_embeddings,
                run.seed,
            ):
                return each
        return None

    def add(self, run: RunRecord) -> None:
        """Adds a run, here and to the file."""
        self._runs.append(run)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps(run._asdict()) + "\n"
        # One write in append mode, so that processes do not mix their lines.
        with self.path.open("ab", buffering=0) as file:
            file.write(line.encode())

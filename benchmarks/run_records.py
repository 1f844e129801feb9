"""The results of training runs, in a file of JSON lines that can be published."""

import dataclasses
import fcntl
import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

from examples.llama.options import RunOptions, differing_fields
from examples.llama.run.errors import UsageError
from examples.llama.run.log import Row, read_config

# These options do not change a result, and the seed has a field of its own.
LEFT_OUT = frozenset(("out", "resume", "workers", "seed"))


def made_with(config: Mapping[str, Any]) -> str:
    """Returns the machine, the versions and the date in a run's config.json.

    The date is that on which the run began, or was last continued.
    """
    made = config["made_with"]
    versions = ", ".join(f"{name} {made[name]}" for name in ("jax", "flax", "optax"))
    return f"{made['device']}; {versions}; {made['date']}"


def runs_made_with(folders: Iterable[Path]) -> str:
    """Returns a line for each way in which the runs in some folders were made."""
    return "\n".join(sorted({made_with(read_config(folder)) for folder in folders}))


class RunRecord(NamedTuple):
    """The result of a run, a line in the file.

    Attributes:
        part: the part of the comparison.
        contender: an optimizer with options of its own.
        seed: the seed of the run.
        options: the options of the trainer, with all defaults filled in.
        val_loss: the validation loss in nats per token, or None if the run diverged.
        update_rms: the RMS of the kernels' update over the learning rate, as the mean
            over the evaluations in the second half of the run. It is None if the run
            diverged before that.
        step_seconds: the median over the steps, or None without a step.
        curve: pairs of step and validation perplexity.
        corpus: a digest of the text and its tokenizer.
        made_with: the machine, the versions and the date.
    """

    part: str
    contender: str
    seed: int
    options: dict[str, Any]
    val_loss: float | None
    update_rms: float | None
    step_seconds: float | None
    curve: list[list[float]]
    corpus: str
    made_with: str

    @classmethod
    def of(
        cls,
        part: str,
        contender: str,
        run: RunOptions,
        val_loss: float | None,
        rows: Sequence[Row],
        config: Mapping[str, Any],
    ) -> Self:
        """Returns the result of a run that has ended, from its files."""
        sizes = [
            row["update_rms_over_lr"]
            for row in rows
            if row["step"] > run.steps / 2 and "update_rms_over_lr" in row
        ]
        return cls(
            part,
            contender,
            run.seed,
            options_of(run),
            val_loss,
            update_rms=statistics.mean(sizes) if sizes else None,
            step_seconds=step_seconds(rows) if rows else None,
            curve=[[row["step"], row["val_ppl"]] for row in rows if "val_ppl" in row],
            corpus=config["corpus"],
            made_with=made_with(config),
        )

    @property
    def key(self) -> tuple[Any, ...]:
        return self.part, self.contender, self.lr, self.lr_embeddings, self.seed

    @property
    def name(self) -> str:
        return (
            f"the run of {self.contender} in part {self.part} (lr {self.lr:g}, "
            f"lr_embeddings {self.lr_embeddings:g}, seed {self.seed})"
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
    """Returns the median over a run's steps. Compilation counts only in the first."""
    tokens = rows[-1]["tokens"] / rows[-1]["step"]
    return tokens / statistics.median(row["tokens_per_s"] for row in rows)


class Records:
    """The runs in a file, as they were when it was read, and those added since.

    Other processes may add lines meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: list[RunRecord] = []
        if not path.exists():
            return
        with path.open(encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            lines = file.read().splitlines()
        for number, line in enumerate(lines, start=1):
            try:
                run = RunRecord(**json.loads(line))
            except (ValueError, TypeError) as error:
                raise UsageError(
                    f"line {number} of {path} is not the result of a run ({error}); "
                    "remove it, or give another --results"
                ) from error
            if run.key in (other.key for other in self._runs):
                raise UsageError(
                    f"line {number} of {path} is a second result of {run.name}; remove "
                    "one of the two"
                )
            self._check_text(run)
            self._runs.append(run)

    def of(self, part: str, contender: str, base: RunOptions) -> list[RunRecord]:
        """Returns the runs of a contender, whose rates may differ from those of `base`.

        Raises:
            UsageError: if a run was made with other options.
        """
        runs = [
            run for run in self._runs if (run.part, run.contender) == (part, contender)
        ]
        for run in runs:
            # The rates are what a search varies.
            rates = {"lr": run.lr, "lr_embeddings": run.lr_embeddings}
            text = {"corpus": run.corpus}
            differing = differing_fields(
                options_of(base) | rates | text, run.options | text
            )
            # The comparison leaves options of the text out if the text is the same,
            # which is not known before the first run here.
            if run.options["data"] != base.data:
                differing.append(f"data: {run.options['data']} -> {base.data}")
            if differing:
                raise UsageError(
                    f"{self.path} has {run.name} with other options "
                    f"({'; '.join(differing)}); remove such lines, or give another "
                    "--results"
                )
        return runs

    def find(self, part: str, contender: str, run: RunOptions) -> RunRecord | None:
        """Returns the result of a run, or None if the file does not have it."""
        key = (part, contender, run.lr, run.lr_embeddings, run.seed)
        runs = self.of(part, contender, run)
        return next((each for each in runs if each.key == key), None)

    def add(self, run: RunRecord) -> None:
        """Adds a run, here and to the file.

        Raises:
            UsageError: if the part's other runs have another text.
        """
        self._check_text(run)
        line = json.dumps(run._asdict(), allow_nan=False) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(line)
        self._runs.append(run)

    def _check_text(self, run: RunRecord) -> None:
        for other in self._runs:
            if other.part == run.part and other.corpus != run.corpus:
                raise UsageError(
                    f"{run.name} has the text {run.corpus}, but {self.path} has runs "
                    f"of this part with the text {other.corpus}, which can't be "
                    "compared; give another --results"
                )

"""The output of a run: metrics lines and the progress bar."""

import functools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from tqdm import tqdm

from examples.llama import flops
from examples.llama.config import LlamaConfig
from examples.llama.evaluate import perplexity
from examples.llama.model import Params
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError, notice
from examples.llama.run.log import NoLog, Row, RunLog
from examples.llama.step import StepMetrics

LR_BLOCK = 4096
MOST_SKIPPED = 20  # The most steps that are skipped in a row.


class DivergedError(UsageError):
    """The loss left the range in which training can recover."""


class Recorder:
    """Turns steps into metrics lines and a progress bar, one step behind the device.

    A loss is read when the next step has been handed to the device, so the device never
    waits for the host.
    """

    def __init__(
        self,
        options: RunOptions,
        config: LlamaConfig,
        mesh: jax.sharding.Mesh,
        schedule: optax.Schedule,
        log: RunLog | NoLog,
        bar: "tqdm[Any]",
    ) -> None:
        self._options = options
        self._config = config
        self._mesh = mesh
        self._tokens = options.batch * options.seq
        # Many rates are computed at once. Computing one per step would wait for the
        # device.
        self._lrs = functools.lru_cache(maxsize=1)(
            lambda block: np.asarray(
                jax.vmap(schedule)(block * LR_BLOCK + np.arange(LR_BLOCK))
            )
        )
        # The ceiling is far above the loss of guessing, which a good run hardly
        # exceeds.
        self._ceiling = 10 * math.log(config.vocab_size)
        self._log = log
        self._bar = bar
        self._skipped = (
            log.rows_before[-1].get("skipped_steps", 0) if log.rows_before else 0
        )
        self._skipped_in_a_row = 0
        self._pending: tuple[int, StepMetrics] | None = None
        self._clock = self._clock_before = time.perf_counter()

    def add(self, step: int, metrics: StepMetrics) -> None:
        """Queues `step`, counted from 1, and writes the previous step."""
        self.flush()
        self._pending = step, metrics

    def flush(
        self, evaluate: Callable[[], Row] | None = None, *, at_once: bool = False
    ) -> None:
        """Writes out the queued step, with what `evaluate` returns where it is given.

        Args:
            evaluate: called after the step has ended.
            at_once: whether no step was dispatched after the queued one. This is so if
                `evaluate` is given.

        Raises:
            DivergedError: if the loss or a gradient is not finite, unless such steps
                are skipped, or if the loss is far above that of guessing.
        """
        if self._pending is None:
            return
        (step, device_metrics), self._pending = self._pending, None
        metrics: StepMetrics = jax.device_get(device_metrics)
        loss, grad_norm = float(metrics.loss), float(metrics.grad_norm)
        now = time.perf_counter()
        # A step that is read at once may have run while the step before it was read.
        # Then the two are timed together.
        at_once = at_once or evaluate is not None
        steps = 2 if at_once and self._clock_before < self._clock else 1
        seconds = now - (self._clock_before if at_once else self._clock)
        tokens_per_s = steps * self._tokens / seconds
        # The schedule counts the steps that were made.
        block, offset = divmod(step - 1 - self._skipped, LR_BLOCK)
        lr = float(self._lrs(block)[offset])
        self._check(loss, grad_norm, step)
        row = {
            "step": step,
            "loss": finite_or_none(loss),
            "grad_norm": finite_or_none(grad_norm),
            "lr": lr,
            "tokens": step * self._tokens,
            "tokens_per_s": tokens_per_s,
        }
        if metrics.update_rms is not None and lr > 0:
            # The ratio shows the size of what the optimizer made of the gradients.
            row["update_rms_over_lr"] = float(metrics.update_rms) / lr
        if self._skipped or self._options.on_nonfinite == "skip":
            row["skipped_steps"] = self._skipped
        if mfu := self._mfu(tokens_per_s):
            row["mfu"] = mfu
        if evaluate:
            row |= evaluate()
            row["val_ppl"] = perplexity(row["val_loss"])
            notice(
                f"step {step}: validation perplexity {row['val_ppl']:.2f}; ",
                quoted=repr(row["sample"]),
            )
        self._log.write(row)
        self._show(row)
        # The device already runs the next step while this row is written.
        self._clock_before, self._clock = self._clock, now
        if evaluate:
            self.restart_clock()

    def checked(
        self, evaluate: Callable[[Params, int], Row]
    ) -> Callable[[Params, int], Row]:
        """Returns an `evaluate` that raises `DivergedError` if the loss diverged."""

        def evaluate_and_check(params: Params, step: int) -> Row:
            row = evaluate(params, step)
            # The condition also holds for NaN.
            if not row["val_loss"] < self._ceiling:
                raise DivergedError(
                    f"the validation loss is {row['val_loss']:.4g} at step {step}; "
                    "lower `lr` or `lr_embeddings`"
                )
            return row

        return evaluate_and_check

    def sync(self) -> None:
        """Writes out the queued step, and returns when all steps are on disk."""
        self.flush(at_once=True)
        self._log.sync()

    def restart_clock(self) -> None:
        """Excludes the time since the last step from the next step's throughput."""
        self._clock = self._clock_before = time.perf_counter()

    def _mfu(self, tokens_per_s: float) -> float | None:
        assert self._options.compute_dtype is not None
        return flops.mfu(
            tokens_per_s,
            self._config,
            self._options.seq,
            list(self._mesh.devices.flat),
            self._options.compute_dtype,
        )

    def _check(self, loss: float, grad_norm: float, step: int) -> None:
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            if self._options.on_nonfinite == "stop":
                raise DivergedError(
                    f"the loss is {loss:.4g} and the gradient's norm {grad_norm:.4g} "
                    f"at step {step}; lower `lr` or `lr_embeddings`, "
                    "or give `on_nonfinite` skip"
                )
            self._skipped += 1
            self._skipped_in_a_row += 1
            notice(
                f"step {step} is skipped: the loss is {loss:.4g}, "
                f"the gradient's norm {grad_norm:.4g}"
            )
            if self._skipped_in_a_row == MOST_SKIPPED:
                raise DivergedError(
                    f"no loss or gradient was finite in the {MOST_SKIPPED} steps up to "
                    f"{step}; lower `lr` or `lr_embeddings`"
                )
            return
        self._skipped_in_a_row = 0
        if loss > self._ceiling:
            raise DivergedError(
                f"the loss is {loss:.4g} at step {step}; lower `lr` or `lr_embeddings`"
            )

    def _show(self, row: Row) -> None:
        parts = [f"loss {row['loss']:.3f}" if row["loss"] is not None else "skipped"]
        parts.append(f"{row['tokens_per_s']:,.0f} tokens/s")
        if "mfu" in row:
            parts.append(f"MFU {row['mfu']:.0%}")
        if stats := self._mesh.local_devices[0].memory_stats():  # None on a CPU.
            parts.append(f"{stats['peak_bytes_in_use'] / 1e9:.1f} GB")
        self._bar.set_postfix_str(", ".join(parts), refresh=False)
        self._bar.update()


def finite_or_none(value: float) -> float | None:
    """Returns None for NaN and infinities, which JSON does not have."""
    return value if math.isfinite(value) else None

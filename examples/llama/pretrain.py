"""Pre-trains one model: `python -m examples.llama.pretrain --out runs/one --optimizer apollo-mini`.

Writes metrics.jsonl, config.json and curves.png to the output folder.
"""

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from tqdm import tqdm

from examples.llama import corpus, data, plots
from examples.llama.config import preset
from examples.llama.evaluate import make_evaluator, perplexity
from examples.llama.model import Params, init_model
from examples.llama.optimizers import make_optimizer, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.run_log import RunLog, check_free
from examples.llama.state_size import StateBytes, state_bytes
from examples.llama.train import TrainState, TrainStep, make_train_step
from examples.llama.usage import UsageError, exit_on_usage_error


class DivergedError(UsageError):
    """The loss left the range in which training can recover."""


class RunResult(NamedTuple):
    """What a comparison shows of a run; `options` have their defaults filled in."""

    options: RunOptions
    val_loss: float
    state: StateBytes
    seconds: float  # Training and evaluation, compilation included.
    tokens_per_s: float  # Median over the steps, so without compilation.


class Recorder:
    """Turns steps into metrics lines and a progress bar, one step behind the device.

    A loss is read when the next step has been handed to the device, so the device never waits for
    the host.
    """

    def __init__(self, options: RunOptions, schedule: optax.Schedule, log: RunLog, bar: "tqdm[Any]") -> None:
        self._tokens = options.batch * options.seq
        # All at once: computing one a step would wait for the device.
        self._lrs = np.asarray(jax.vmap(schedule)(np.arange(options.steps)))
        # Far above the loss of guessing, which no run that goes well exceeds by much.
        self._ceiling = 10 * math.log(preset(options.model).vocab_size)
        self._log = log
        self._bar = bar
        self._pending: tuple[int, jax.Array] | None = None
        self._clock = time.perf_counter()
        self.tokens_per_s: list[float] = []  # By step, without the time of evaluations.
        self.val_loss = math.nan

    def add(self, step: int, loss: jax.Array) -> None:
        """Queues `step`, counted from 1, and writes out the step before."""
        self.flush()
        self._pending = step, loss

    def flush(self, evaluate: Callable[[], float] | None = None) -> None:
        """Writes out the queued step, with a validation loss where a function for it is given."""
        if self._pending is None:
            return
        (step, device_loss), self._pending = self._pending, None
        loss = self._checked("loss", float(device_loss), step)
        self.tokens_per_s.append(self._tokens / (time.perf_counter() - self._clock))
        metrics = {
            "step": step,
            "loss": loss,
            "lr": float(self._lrs[step - 1]),
            "tokens": step * self._tokens,
            "tokens_per_s": self.tokens_per_s[-1],
        }
        if evaluate:
            self.val_loss = self._checked("validation loss", evaluate(), step)
            metrics |= {"val_loss": self.val_loss, "val_ppl": perplexity(self.val_loss)}
        self._log.write(metrics)
        self._bar.set_postfix_str(f"loss {loss:.3f}, {self.tokens_per_s[-1]:,.0f} tokens/s", refresh=False)
        self._bar.update()
        self._clock = time.perf_counter()

    def _checked(self, name: str, loss: float, step: int) -> float:
        if not loss < self._ceiling:  # Also when it is not a number.
            raise DivergedError(f"the {name} is {loss:.3g} at step {step}; lower --lr or --lr-embeddings")
        return loss


def run_steps(
    options: RunOptions,
    recorder: Recorder,
    train_step: TrainStep,
    state: TrainState,
    batches: Iterator[np.ndarray],
    evaluate: Callable[[Params], float],
) -> None:
    """Trains for all steps, with evaluations on the way and after the last."""
    for step in range(1, options.steps + 1):
        state, loss = train_step(state, next(batches))
        recorder.add(step, loss)
        if step % options.eval_every == 0 or step == options.steps:
            recorder.flush(functools.partial(evaluate, state.params))


def pretrain(options: RunOptions) -> RunResult:
    """Runs one pre-training.

    Raises:
        UsageError: for input that makes no run, before anything is written.
        DivergedError: where the loss blew up; the metrics up to there are kept.
    """
    options = with_defaults(options)
    check_free(options.out)
    config = preset(options.model)
    text = corpus.load_corpus(options.data, config.vocab_size)
    batches = data.train_batches(text.train_tokens, seq=options.seq, batch=options.batch, seed=options.seed)
    held_out = data.validation_batches(text.validation_tokens, seq=options.seq)

    start = time.perf_counter()
    graphdef, params = init_model(config, seed=options.seed, remat=options.remat)
    tx, schedules = make_optimizer(options, config)
    state_size = state_bytes(tx, params)
    with (
        RunLog(options.out, options) as log,
        tqdm(total=options.steps, unit="step", desc=options.optimizer) as bar,
    ):
        recorder = Recorder(options, schedules["kernels"], log, bar)
        run_steps(
            options,
            recorder,
            make_train_step(graphdef, tx),
            TrainState(params, jax.jit(tx.init)(params)),
            batches,
            make_evaluator(graphdef, held_out),
        )
    seconds = time.perf_counter() - start
    plots.plot_curves({options.optimizer: options.out}, options.out)
    tokens_per_s = statistics.median(recorder.tokens_per_s)
    return RunResult(options, recorder.val_loss, state_size, seconds, tokens_per_s)


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(RunOptions, args, "python -m examples.llama.pretrain")
        result = pretrain(options)
        print(
            f"validation perplexity {perplexity(result.val_loss):.2f} after {options.steps} steps "
            f"in {result.seconds:.0f} s; curves and metrics in {options.out}"
        )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()

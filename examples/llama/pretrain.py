"""Pre-trains one model: `python -m examples.llama.pretrain --out runs/one --optimizer apollo-mini`.

Writes config.json, metrics.jsonl, tensorboard/, curves.png and checkpoints/ to the output folder.
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from examples.llama import build, data, plots
from examples.llama.checkpoint import Checkpoints
from examples.llama.corpus import Corpus
from examples.llama.evaluate import make_evaluator, perplexity
from examples.llama.interrupt import StopRequest
from examples.llama.mesh import make_mesh, over_data
from examples.llama.model import Params, Pieces, pieces_of
from examples.llama.optimizers import make_optimizer, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.recorder import DivergedError, Recorder
from examples.llama.result import RunResult, read_result
from examples.llama.run_log import Row, RunLog, check_free, check_same_run, only_run_in, write_config
from examples.llama.sample import make_sampler
from examples.llama.train import TrainState, TrainStep
from examples.llama.usage import RunInterrupted, exit_on_usage_error, notice


def run_steps(
    options: RunOptions,
    first_step: int,
    state: TrainState,
    *,
    train_step: TrainStep,
    batches: grain.DatasetIterator[Any],
    mesh: jax.sharding.Mesh,
    stop: StopRequest,
    evaluate: Callable[[Params, int], Row],
    recorder: Recorder,
    checkpoints: Checkpoints,
) -> None:
    """Trains from `first_step` to the last, with evaluations and checkpoints on the way."""
    with stop.deferred():
        for step in range(first_step, options.steps + 1):
            tokens_BxS = jax.device_put(next(batches), over_data(mesh))
            state, metrics = train_step(state, tokens_BxS, np.int32(step))
            recorder.add(step, metrics)
            last = step == options.steps
            if last or step % options.eval_every == 0:
                recorder.flush(functools.partial(evaluate, state.params, step))
            if last or stop.signal or step % options.checkpoint_every == 0:
                recorder.sync()  # A checkpoint is never ahead of the metrics, nor of a loss unseen.
                checkpoints.save(step, state, batches.get_state())
                recorder.restart_clock()
            checkpoints.check()
            if stop.signal and not last:
                checkpoints.wait()
                raise RunInterrupted(
                    f"stopped by {stop.signal.name} after step {step} of {options.steps}; "
                    f"{checkpoints.newest()}, and --resume auto continues from it"
                )


def pretrain(options: RunOptions, stop: StopRequest) -> RunResult:
    """Runs one pre-training, or the rest of it.

    Args:
        options: of the run.
        stop: entered by the caller; a signal that comes in the last step is left to it.

    Raises:
        UsageError: for input that makes no run, before anything is written; where a checkpoint cannot
            be written or read.
        DivergedError: where the loss blew up; the metrics and checkpoints up to there are kept.
        RunInterrupted: after SIGTERM or Ctrl-C, when a checkpoint is on disk.
    """
    config = build.model_config(options)
    options = with_defaults(options, config)
    resume = options.resume == "auto"
    mesh = make_mesh(options.mesh)
    build.check_offload(options)
    check_free(options.out, resume=resume)
    text = build.load_corpus(options, config)
    description = build.describe(options, config, text)
    check_same_run(options.out, description)
    if resume and (result := read_result(options)):
        return result
    batches = data.train_loader(
        text.train, seq=options.seq, batch=options.batch, seed=options.seed, workers=options.workers
    )
    held_out = data.validation_batches(text.validation, seq=options.seq, count=options.eval_windows)

    pieces = pieces_of(config, build.execution_of(options, config))
    tx, schedules = make_optimizer(options, config)
    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run_in(options.out))
        check_free(options.out, resume=resume)  # Another run may have begun meanwhile.
        write_config(options.out, description, text.tokenizer.to_str())
        checkpoints = stack.enter_context(
            Checkpoints(options.out, keep=options.keep_checkpoints, config=description)
        )
        step, state = 0, None
        if resume and (
            restored := checkpoints.restore_newest(build.abstract_state(options, config, tx, mesh))
        ):
            step, state = restored.step, restored.state
            batches.set_state(restored.data)
        with (
            RunLog(options.out, step=step) as log,
            tqdm(initial=step, total=options.steps, unit="step", desc=options.optimizer) as bar,
        ):
            notice(build.summary(options, config, text, tx, mesh))
            if step:
                notice(f"continuing after step {step} of {options.steps} in {options.out}")
            try:
                run_steps(
                    options,
                    step + 1,
                    state or build.initial_state(options, config, tx, mesh),
                    train_step=build.training_step(options, config, tx),
                    batches=batches,
                    mesh=mesh,
                    stop=stop,
                    evaluate=make_evaluation(options, pieces, text, held_out),
                    recorder=Recorder(options, config, schedules["kernels"], log, bar),
                    checkpoints=checkpoints,
                )
            except DivergedError as error:
                checkpoints.wait()
                raise DivergedError(f"{error}; {checkpoints.newest()}") from error
    plots.plot_curves({options.optimizer: options.out}, options.out)
    result = read_result(options)
    assert result is not None
    return result


def make_evaluation(
    options: RunOptions, pieces: Pieces, text: Corpus, held_out: np.ndarray
) -> Callable[[Params, int], Row]:
    """Returns a function of the parameters and the step, to what an evaluation adds to the metrics."""
    validation_loss = make_evaluator(pieces, held_out)
    sample = make_sampler(pieces, text.tokenizer, text.end_id, seed=options.seed)

    def evaluate(params: Params, step: int) -> Row:
        return {"val_loss": validation_loss(params), "sample": sample(params, step)}

    return evaluate


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(RunOptions, args, "python -m examples.llama.pretrain")
        with StopRequest() as stop:
            result = pretrain(options, stop)
        print(
            f"best validation perplexity {perplexity(result.val_loss):.2f} in {options.steps} steps; "
            f"curves, metrics and checkpoints in {options.out}"
        )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()

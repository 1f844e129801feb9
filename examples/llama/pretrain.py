"""Pre-trains one model.

Run it with `python -m examples.llama.pretrain --out runs/one --optimizer apollo-mini`.

Writes config.json, metrics.jsonl, tensorboard/, curves.png and checkpoints/ to the
output folder.
"""

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable
from typing import Any

import grain
import jax
import numpy as np
from tqdm import tqdm

from examples.llama import build, data, distributed, plots, pretrained
from examples.llama.checkpoint import Checkpoints
from examples.llama.corpus import Corpus
from examples.llama.evaluate import make_evaluator, perplexity
from examples.llama.interrupt import StopRequest
from examples.llama.mesh import batch_share, over_data
from examples.llama.model import Params, Pieces, pieces_of
from examples.llama.optimizers import make_optimizer, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.recorder import DivergedError, Recorder
from examples.llama.result import RunResult, read_result
from examples.llama.run_log import (
    NoLog,
    Row,
    RunLog,
    bos_of_run,
    check_free,
    check_same_run,
    only_run_in,
    write_config,
)
from examples.llama.sample import make_sampler
from examples.llama.train import TrainState, TrainStep
from examples.llama.usage import RunInterrupted, exit_on_usage_error, is_first, notice
from examples.llama.windows import validation_batches


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
    """Trains from `first_step` to the last step, with evaluations and checkpoints."""
    shape, vote = (options.batch, options.seq + 1), distributed.Vote()
    with stop.deferred():
        for step in range(first_step, options.steps + 1):
            tokens_BxS = jax.make_array_from_process_local_data(
                over_data(mesh), next(batches), shape
            )
            state, metrics = train_step(state, tokens_BxS, np.int32(step))
            recorder.add(step, metrics)
            last = step == options.steps
            if last or step % options.eval_every == 0:
                recorder.flush(functools.partial(evaluate, state.params, step))
            asked = vote.highest(stop.signal or 0)
            if last or asked or step % options.checkpoint_every == 0:
                # A checkpoint must not be ahead of the metrics, nor of an unseen loss.
                recorder.sync()
                checkpoints.save(step, state, batches.get_state())
                recorder.restart_clock()
            checkpoints.check()
            if asked and not last:
                checkpoints.wait()
                raise RunInterrupted(
                    f"stopped by {signal.Signals(asked).name} after step {step} of "
                    f"{options.steps}; {checkpoints.newest()}, and --resume auto "
                    "continues from it"
                )


def pretrain(options: RunOptions, stop: StopRequest) -> RunResult:
    """Runs one pre-training, or the rest of it.

    Args:
        options: of the run.
        stop: entered by the caller; a signal that comes in the last step is left to it.

    Raises:
        UsageError: for input that makes no run, before anything is written; where a
            checkpoint cannot be written or read.
        DivergedError: where the loss blew up; the metrics and checkpoints up to there
            are kept.
        RunInterrupted: after SIGTERM or Ctrl-C, when a checkpoint is on disk.
    """
    distributed.check_same(options.as_run() | {"jax": jax.__version__}, "options")
    resume = options.resume == "auto"
    if resume and options.bos == "auto":
        began_with = distributed.from_first(lambda: bos_of_run(options.out))
        options = dataclasses.replace(options, bos=began_with or options.bos)
    with distributed.together():
        config = build.model_config(options)
        options = with_defaults(options, config)
        mesh = build.mesh_of(options, config)
        build.check_offload(options)
        if is_first():
            check_free(options.out, resume=resume)
        text = build.load_corpus(options, config)
        share, shares = batch_share(mesh, options.batch)
        batches = data.train_loader(
            text.train,
            seq=options.seq,
            batch=options.batch,
            seed=options.seed,
            workers=options.workers,
            process_index=share,
            process_count=shares,
        )
        held_out = validation_batches(
            text.validation, seq=options.seq, count=options.eval_windows
        )
        given = pretrained.find_files(options.tokenizer, options.init_from)
        description = build.describe(options, config, text)
        if is_first():
            check_same_run(options.out, description)
    distributed.check_same({"corpus": text.key}, "text, or caches of it")
    if resume and (result := result_of(options)):
        return result

    pieces = pieces_of(config, build.execution_of(options, config, mesh))
    tx, schedules = make_optimizer(options, config)
    with contextlib.ExitStack() as stack:
        with distributed.together():
            if is_first():
                stack.enter_context(only_run_in(options.out))
                # Another run may have begun meanwhile.
                check_free(options.out, resume=resume)
                write_config(options.out, description, text.tokenizer.to_str())
                pretrained.keep(given, options.out)
        checkpoints = stack.enter_context(
            Checkpoints(options.out, keep=options.keep_checkpoints, config=description)
        )
        step, state = 0, None
        if resume and (
            restored := checkpoints.restore_newest(
                build.abstract_state(options, config, tx, mesh)
            )
        ):
            step, state = restored.step, restored.state
            batches.set_state(restored.data)
        with distributed.together():
            log = stack.enter_context(
                RunLog(options.out, step=step) if is_first() else NoLog()
            )
        bar = stack.enter_context(
            tqdm(
                initial=step,
                total=options.steps,
                unit="step",
                desc=options.optimizer,
                disable=not is_first(),
            )
        )
        notice(build.summary(options, config, text, tx, mesh))
        if step:
            notice(f"continuing after step {step} of {options.steps} in {options.out}")
        stack.enter_context(distributed.ends_at_once(DivergedError, RunInterrupted))
        try:
            run_steps(
                options,
                step + 1,
                state or build.initial_state(options, config, tx, mesh),
                train_step=build.training_step(options, config, tx, mesh),
                batches=batches,
                mesh=mesh,
                stop=stop,
                evaluate=make_evaluation(options, pieces, text, held_out, mesh),
                recorder=Recorder(
                    options, config, mesh, schedules["kernels"], log, bar
                ),
                checkpoints=checkpoints,
            )
        except DivergedError as error:
            checkpoints.wait()
            raise DivergedError(f"{error}; {checkpoints.newest()}") from error
    if is_first():
        plots.plot_curves({options.optimizer: options.out}, options.out)
    result = result_of(options)
    assert result is not None
    return result


def result_of(options: RunOptions) -> RunResult | None:
    """Returns, on every process, what the first reads."""

    def numbers() -> tuple[float, float] | None:
        result = read_result(options)
        return result and (result.val_loss, result.tokens_per_s)

    found = distributed.from_first(numbers)
    return None if found is None else RunResult(options, *found)


def make_evaluation(
    options: RunOptions,
    pieces: Pieces,
    text: Corpus,
    held_out: np.ndarray,
    mesh: jax.sharding.Mesh,
) -> Callable[[Params, int], Row]:
    """Returns a function from parameters and step to an evaluation's metrics."""
    validation_loss = make_evaluator(pieces, held_out)
    sample = make_sampler(
        pieces,
        text.tokenizer,
        text.end_id,
        start_id=text.prefix[-1] if text.prefix else text.end_id,
        seed=options.seed,
        mesh=mesh,
    )

    def evaluate(params: Params, step: int) -> Row:
        return {"val_loss": validation_loss(params), "sample": sample(params, step)}

    return evaluate


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(RunOptions, args, "python -m examples.llama.pretrain")
        if args is None:
            # Only the command line starts the processes. A caller in Python may have
            # used JAX already, and starts them itself.
            distributed.start(options)
        with StopRequest() as stop:
            result = pretrain(options, stop)
        if is_first():
            print(
                f"best validation perplexity {perplexity(result.val_loss):.2f} in "
                f"{options.steps} steps; curves, metrics and checkpoints in "
                f"{options.out}"
            )

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()

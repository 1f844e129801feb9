"""Pre-trains one model.

Run it with `python -m examples.llama.pretrain --out runs/one --optimizer apollo-mini`.

Writes config.json, metrics.jsonl, tensorboard/, curves.png and checkpoints/ to the
output folder.
"""

import contextlib
import dataclasses

import jax
from tqdm import tqdm

from examples.llama.evaluate import perplexity
from examples.llama.hf import pretrained
from examples.llama.loop import make_evaluation, run_steps
from examples.llama.mesh import batch_share
from examples.llama.model import pieces_of
from examples.llama.optimizers import make_optimizer, with_defaults
from examples.llama.options import RunOptions, parse
from examples.llama.run import distributed, plots, setup
from examples.llama.run.checkpoint import Checkpoints, steps_on_disk
from examples.llama.run.errors import (
    RunInterrupted,
    exit_on_usage_error,
    is_first,
    notice,
)
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import (
    NoLog,
    RunLog,
    began_with,
    check_free,
    check_same_run,
    only_run_in,
    write_config,
)
from examples.llama.run.recorder import DivergedError, Recorder
from examples.llama.run.result import RunResult, read_result
from examples.llama.text import loader
from examples.llama.text.windows import validation_batches


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
    if resume:
        before = distributed.from_first(lambda: began_with(options.out))
        kept = {k: v for k, v in before.items() if getattr(options, k) == "auto"}
        options = dataclasses.replace(options, **kept)
    with distributed.together():
        config = setup.model_config(options)
        options = with_defaults(options, config)
        mesh = setup.mesh_of(options, config)
        setup.check_offload(options)
        if is_first():
            check_free(options.out, resume=resume)
        text = setup.load_corpus(options, config)
        share, shares = batch_share(mesh, options.batch)
        batches = loader.train_loader(
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
        description = setup.describe(options, config, text)
        if is_first():
            check_same_run(options.out, description)
        if options.init_from and not steps_on_disk(options.out):
            # Weights that cannot be downloaded or read are an error before the run's
            # folder is made. A run with a checkpoint does not read them.
            setup.pretrained_weights(options, config)
    distributed.check_same({"corpus": text.key}, "text, or caches of it")
    if resume and (result := result_of(options)):
        return result

    pieces = pieces_of(config, setup.execution_of(options, config, mesh))
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
                setup.abstract_state(options, config, tx, mesh)
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
        notice(setup.summary(options, config, text, tx, mesh))
        if step:
            notice(f"continuing after step {step} of {options.steps} in {options.out}")
        stack.enter_context(distributed.ends_at_once(DivergedError, RunInterrupted))
        try:
            run_steps(
                options,
                step + 1,
                state or setup.initial_state(options, config, tx, mesh),
                train_step=setup.training_step(options, config, tx, mesh),
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

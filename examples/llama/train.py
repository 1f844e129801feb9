"""One run from its options to its result, for any kind of text."""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from tqdm import tqdm

from examples.llama.config import LlamaConfig
from examples.llama.hf import pretrained
from examples.llama.loop import Text, make_evaluation, run_steps
from examples.llama.lora import joined
from examples.llama.model import Params, pieces_of
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import RunOptions
from examples.llama.run import distributed, plots, setup
from examples.llama.run.checkpoint import BestWeights, Checkpoints, steps_on_disk
from examples.llama.run.errors import (
    RunInterrupted,
    UsageError,
    is_first,
    notice,
)
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import (
    NoLog,
    Row,
    RunLog,
    check_free,
    check_same_run,
    config_of,
    only_run_in,
    write_config,
)
from examples.llama.run.recorder import DivergedError, Recorder
from examples.llama.run.result import RunResult, read_result
from examples.llama.step import with_update_rms

# Returns the text of a run, and its options with what only the text decides.
LoadText = Callable[
    [RunOptions, LlamaConfig, jax.sharding.Mesh], tuple[RunOptions, Text]
]

# Returns the metrics of parameters at a step.
Evaluate = Callable[[Params, int], Row]


def train(
    options: RunOptions,
    stop: StopRequest,
    load_text: LoadText,
    *,
    keep_best: bool = False,
    measure_updates: bool = False,
) -> RunResult:
    """Runs one training, or the rest of it.

    Args:
        options: the options of the run.
        stop: a request that the caller has entered. A signal that comes in the last
            step is left to the caller.
        load_text: reads the text of the run, before anything is written.
        keep_best: whether to keep the weights of the evaluation with the lowest loss.
        measure_updates: record the RMS of the kernels' update, over the learning rate,
            at the steps with an evaluation. It needs float32 weights.

    Raises:
        UsageError: for invalid input, before anything is written, or if a checkpoint
            cannot be written or read.
        DivergedError: if the loss diverged. The metrics and checkpoints up to that step
            are kept.
        RunInterrupted: after SIGTERM or Ctrl-C, when a checkpoint is on disk.
    """
    if measure_updates and options.weights != "float32":
        raise UsageError(
            f"`weights` {options.weights} are rounded, and an update is measured as "
            "the change of the weights; give `weights` float32"
        )
    options, config, mesh, text, description = prepare(options, load_text)
    resume = options.resume == "auto"
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
                pretrained.keep(text.passed_on, options.out)
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
            text.batches.set_state(restored.data)
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
        notice(setup.summary(options, config, text, mesh))
        if step:
            notice(f"continuing after step {step} of {options.steps} in {options.out}")
        stack.enter_context(distributed.ends_at_once(DivergedError, RunInterrupted))
        frozen = setup.frozen_params(options, config, mesh)
        train_step = functools.partial(
            setup.training_step(options, config, tx, mesh), frozen=frozen
        )
        if measure_updates:
            train_step = with_update_rms(train_step, options.evaluates_after)
        recorder = Recorder(options, config, mesh, schedules["kernels"], log, bar)
        evaluate = recorder.checked(
            with_frozen(make_evaluation(options, pieces, text, mesh), frozen)
        )
        if keep_best:
            best = stack.enter_context(
                BestWeights(options.out, step=step, config=description)
            )
            evaluate = best.kept_by(evaluate)
        try:
            run_steps(
                options,
                step + 1,
                state or setup.initial_state(options, config, tx, mesh),
                train_step=train_step,
                batches=text.batches,
                mesh=mesh,
                stop=stop,
                evaluate=evaluate,
                recorder=recorder,
                checkpoints=checkpoints,
            )
        except DivergedError as error:
            checkpoints.wait()
            raise DivergedError(f"{error}; {checkpoints.newest()}") from error
    # The curves mark the run as finished, so all checkpoints must be on disk before.
    if is_first():
        plots.plot_curves({options.optimizer: options.out}, options.out)
    result = result_of(options)
    assert result is not None
    return result


class Prepared(NamedTuple):
    """What a run needs, after everything that the user gave has been checked."""

    options: RunOptions
    config: LlamaConfig
    mesh: jax.sharding.Mesh
    text: Text
    description: dict[str, Any]  # What the run's config.json says.


def prepare(options: RunOptions, load_text: LoadText) -> Prepared:
    """Reads and checks what a run needs, before anything is written.

    Raises:
        UsageError: for invalid input.
    """
    distributed.check_same(options.as_run() | {"jax": jax.__version__}, "options")
    resume = options.resume == "auto"
    began = distributed.from_first(lambda: config_of(options.out)) if resume else None
    options = options.as_begun(began)
    with distributed.together():
        config = setup.model_config(options)
        options = with_defaults(options, config)
        mesh = setup.mesh_of(options, config)
        setup.check_offload(options)
        if is_first():
            check_free(options.out, resume=resume)
        options, text = load_text(options, config, mesh)
        description = setup.describe(options, config, text)
        if is_first():
            check_same_run(options.out, description)
        if options.init_from and (config.lora_rank or not steps_on_disk(options.out)):
            # Weights that cannot be downloaded or read are an error before the run's
            # folder is made. Only a run with adapters reads them again, since its
            # checkpoints have the adapters alone.
            setup.pretrained_weights(options, config)
    distributed.check_same({"corpus": text.key}, "text, or caches of it")
    return Prepared(options, config, mesh, text, description)


def with_frozen(evaluate: Evaluate, frozen: Params | None) -> Evaluate:
    """Returns `evaluate` as a function of only the parameters that are trained."""
    return lambda params, step: evaluate(joined(params, frozen), step)


def result_of(options: RunOptions) -> RunResult | None:
    """Returns, on every process, the result that the first process reads."""

    def numbers() -> tuple[float, float] | None:
        result = read_result(options)
        return result and (result.val_loss, result.tokens_per_s)

    found = distributed.from_first(numbers)
    return None if found is None else RunResult(options, *found)

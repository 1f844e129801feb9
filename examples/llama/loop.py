"""The training loop: steps, evaluations and checkpoints."""

import functools
import signal
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tokenizers

from examples.llama.evaluate import make_evaluator
from examples.llama.hf.pretrained import Files
from examples.llama.mesh import over_data
from examples.llama.model import Batch, Params, Pieces
from examples.llama.options import RunOptions
from examples.llama.run import distributed
from examples.llama.run.checkpoint import Checkpoints
from examples.llama.run.errors import RunInterrupted
from examples.llama.run.interrupt import StopRequest
from examples.llama.run.log import Row
from examples.llama.run.recorder import Recorder
from examples.llama.sample import make_sampler
from examples.llama.step import TrainState, TrainStep


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
    on_devices = functools.partial(
        jax.make_array_from_process_local_data,
        over_data(mesh),
        global_shape=(options.batch, options.seq + 1),
    )
    vote = distributed.Vote()
    with stop.deferred():
        for step in range(first_step, options.steps + 1):
            rows = next(batches)
            # Batches of whole windows are tokens alone.
            rows = rows if isinstance(rows, Batch) else Batch(rows)
            batch = jax.tree.map(on_devices, rows)
            state, metrics = train_step(state, batch, np.int32(step))
            recorder.add(step, metrics)
            last = step == options.steps
            if options.evaluates_after(step):
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
                    f"{options.steps}; {checkpoints.newest()}, and `resume` auto "
                    "continues from it"
                )


class Text(NamedTuple):
    """The texts that a run trains on and is evaluated on."""

    tokenizer: tokenizers.Tokenizer
    end_id: int  # The token that ends a text.
    key: str  # Changes when the tokens do.
    tokens: int  # How many there are to train on.
    batches: grain.DatasetIterator[Any]  # Tokens (B, S) of each step, or a `Batch`.
    held_out: Batch  # What evaluations take; leaves are (K, B, S).
    # What samples continue, by the text to show before them.
    prompts: Mapping[str, Sequence[int]]
    stop_ids: Collection[int]  # The tokens at which samples end.
    passed_on: Files  # The files that an export gets from what the run began from.


def make_evaluation(
    options: RunOptions, pieces: Pieces, text: Text, mesh: jax.sharding.Mesh
) -> Callable[[Params, int], Row]:
    """Returns a function from parameters and step to an evaluation's metrics."""
    validation_loss = make_evaluator(pieces, text.held_out)
    sample = make_sampler(
        pieces,
        text.tokenizer,
        text.prompts,
        end_ids=text.stop_ids,
        seed=options.seed,
        mesh=mesh,
    )

    def evaluate(params: Params, step: int) -> Row:
        return {"val_loss": validation_loss(params), "sample": sample(params, step)}

    return evaluate

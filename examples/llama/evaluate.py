"""Validation loss and perplexity."""

import math
from collections.abc import Callable

import jax
import numpy as np

from apollo_optax import layerwise_apply
from examples.llama.mesh import batch_shards
from examples.llama.model import Batch, Params, Pieces, target_weights
from examples.llama.options import TrainingOptions

MOST_ROWS = 8  # The most rows that an evaluation computes at once on a device.


def rows_at_once(options: TrainingOptions) -> int:
    """Returns the rows of an evaluation's batches, a power of 2.

    They are no more than those of a step's micro-batch, which bounds the memory of an
    evaluation. On a mesh there are more, so that every device can have some: all of
    them compute a batch that can't be sharded.
    """
    most = MOST_ROWS * batch_shards(options.mesh)
    rows = min(most, options.batch // options.accumulate)
    return 1 << (rows.bit_length() - 1)


def make_evaluator(pieces: Pieces, batches: Batch) -> Callable[[Params], float]:
    """Returns a function of parameters: the batches' mean loss per token, in nats.

    Args:
        pieces: the model.
        batches: K batches, whose leaves are (K, B, S).
    """
    loss_of = jax.jit(layerwise_apply(pieces.embed, pieces.layer, pieces.head))
    each = [jax.tree.map(lambda x, k=k: x[k], batches) for k in range(len(batches[0]))]
    weights = [target_weights(batch) for batch in each]
    total_weights = [np.sum(x) for x in weights if x is not None] or None

    def evaluate(params: Params) -> float:
        # All batches are dispatched before the first result is read, so that the device
        # does not wait for the host.
        losses = [loss_of(params, batch) for batch in each]
        return float(np.average(jax.device_get(losses), weights=total_weights))

    return evaluate


def perplexity(loss: float) -> float:
    """Returns exp(loss), the number of equally likely tokens with the same loss."""
    return math.exp(loss)

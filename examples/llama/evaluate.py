"""Validation loss and perplexity."""

import math
from collections.abc import Callable

import jax
import numpy as np

from apollo_optax import layerwise_apply
from examples.llama.model import Batch, Params, Pieces, target_weights


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
        # All batches are in flight before the first result is read.
        losses = [loss_of(params, batch) for batch in each]
        return float(np.average(jax.device_get(losses), weights=total_weights))

    return evaluate


def perplexity(loss: float) -> float:
    """Returns exp(loss), the number of equally likely tokens with the same loss."""
    return math.exp(loss)

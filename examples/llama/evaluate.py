"""Validation loss and perplexity."""

import math
from collections.abc import Callable

import jax
import numpy as np

from apollo_optax import layerwise_apply
from examples.llama.model import Params, Pieces


def make_evaluator(
    pieces: Pieces, batches_KxBxS: np.ndarray
) -> Callable[[Params], float]:
    """Returns a function of parameters: the batches' mean loss per token, in nats."""
    loss_of = jax.jit(layerwise_apply(pieces.embed, pieces.layer, pieces.head))

    def evaluate(params: Params) -> float:
        # All batches are in flight before the first result is read.
        losses = [loss_of(params, tokens_BxS) for tokens_BxS in batches_KxBxS]
        return float(np.mean(jax.device_get(losses)))

    return evaluate


def perplexity(loss: float) -> float:
    """Returns exp(loss): how many equally likely tokens the model hesitates between."""
    return math.exp(loss)

"""Validation loss and perplexity."""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from flax import nnx

from examples.llama.model import Llama, Params, next_token_loss


def make_evaluator(graphdef: nnx.GraphDef[Llama], batches_KxBxS: np.ndarray) -> Callable[[Params], float]:
    """Returns a function of the parameters: the mean loss over the batches, in nats a token."""
    loss_of = jax.jit(functools.partial(next_token_loss, graphdef))

    def evaluate(params: Params) -> float:
        # All batches are in flight before the first result is read.
        losses = [loss_of(params, tokens_BxS) for tokens_BxS in batches_KxBxS]
        return float(np.mean(jax.device_get(losses)))

    return evaluate


def perplexity(loss: float) -> float:
    """Returns exp(loss): how many equally likely tokens the model hesitates between."""
    return math.exp(loss)

"""The training step."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import optax
from flax import nnx

from examples.llama.model import Llama, Params, next_token_loss


class TrainState(NamedTuple):
    """Everything a step changes."""

    params: Params
    opt_state: optax.OptState


TrainStep = Callable[[TrainState, jax.typing.ArrayLike], tuple[TrainState, jax.Array]]


def make_train_step(graphdef: nnx.GraphDef[Llama], tx: optax.GradientTransformation) -> TrainStep:
    """Returns the compiled step: it takes the state, which it consumes, and tokens (B, S)."""

    # The new state takes over the memory of the old one.
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, tokens_BxS: jax.Array) -> tuple[TrainState, jax.Array]:
        loss_of = functools.partial(next_token_loss, graphdef)
        loss, grads = jax.value_and_grad(loss_of)(state.params, tokens_BxS)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(cast(Params, params), opt_state), loss

    return train_step

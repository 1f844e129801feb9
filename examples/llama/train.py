"""The training step."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from examples.llama.model import Llama, Params, next_token_loss


class TrainState(NamedTuple):
    """Everything a step changes."""

    params: Params
    opt_state: optax.OptState


class StepMetrics(NamedTuple):
    """What a step tells; scalars on the device."""

    loss: jax.Array  # Mean over the batch, in nats a token, before the step.
    grad_norm: jax.Array  # Euclidean, over all parameters; not finite where any gradient is not.


TrainStep = Callable[[TrainState, jax.typing.ArrayLike], tuple[TrainState, StepMetrics]]


def make_train_step(
    graphdef: nnx.GraphDef[Llama],
    tx: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    skip_nonfinite: bool = False,
) -> TrainStep:
    """Returns the compiled step: it takes the state, which it consumes, and tokens (B, S).

    Args:
        graphdef: the model's structure.
        tx: the optimizer.
        accumulate: into how many micro-batches the batch is cut, one after the other; must divide B.
        skip_nonfinite: leave the state as it is where the loss or a gradient is not finite.
    """
    loss_and_grads = jax.value_and_grad(functools.partial(next_token_loss, graphdef))

    # The new state takes over the memory of the old one.
    @functools.partial(jax.jit, donate_argnums=0)
    def train_step(state: TrainState, tokens_BxS: jax.Array) -> tuple[TrainState, StepMetrics]:
        if accumulate == 1:
            loss, grads = loss_and_grads(state.params, tokens_BxS)
        else:
            loss, grads = accumulated(loss_and_grads, state.params, tokens_BxS, accumulate)
        metrics = StepMetrics(loss, global_norm(grads))

        def stepped() -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            return TrainState(cast(Params, params), opt_state)

        if not skip_nonfinite:
            return stepped(), metrics
        finite = jnp.isfinite(metrics.loss) & jnp.isfinite(metrics.grad_norm)
        return jax.lax.cond(finite, stepped, lambda: state), metrics

    return train_step


def accumulated(
    loss_and_grads: Callable[[Params, jax.Array], tuple[jax.Array, Params]],
    params: Params,
    tokens_BxS: jax.Array,
    micro_batches: int,
) -> tuple[jax.Array, Params]:
    """Returns the mean loss and gradients over micro-batches, of which one is in memory at a time."""
    B, S = tokens_BxS.shape
    # Every device that holds rows of the batch holds some of each micro-batch.
    tokens_KxMxS = jnp.moveaxis(tokens_BxS.reshape(B // micro_batches, micro_batches, S), 1, 0)

    def add(sums: tuple[jax.Array, Params], tokens_MxS: jax.Array) -> tuple[tuple[jax.Array, Params], None]:
        return jax.tree.map(lambda total, x: total + x, sums, loss_and_grads(params, tokens_MxS)), None

    # In float32 for bfloat16 parameters: a sum of many loses what each adds.
    zeros = jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.promote_types(p.dtype, jnp.float32)), params)
    (loss, grads), _ = jax.lax.scan(add, (jnp.zeros(()), zeros), tokens_KxMxS)
    return loss / micro_batches, jax.tree.map(lambda g, p: (g / micro_batches).astype(p.dtype), grads, params)


def global_norm(grads: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads)))

"""Optax transformations, and changes to them, that are for no model in particular."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax


def in_float32(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """Returns `tx` as it is for float32 parameters.

    Optax gives a second moment the parameters' dtype. In bfloat16 its decay of 0.999
    rounds to 1, so it would never decay. APOLLO's moments are float32 by default.
    """

    def widened(tree: Any) -> Any:
        return jax.tree.map(
            lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        return tx.update(widened(updates), state, widened(params))

    return optax.GradientTransformation(lambda params: tx.init(widened(params)), update)


def moments_in(
    dtype: str, tx: optax.GradientTransformation
) -> optax.GradientTransformation:
    """Returns `tx` with its state stored in `dtype` between steps.

    Optax itself has this option for first moments only.
    """

    def cast(state: optax.OptState, dtype: Any) -> optax.OptState:
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x,
            state,
        )

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        updates, state = tx.update(updates, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    if dtype == "float32":
        # The state is already so, and float64 parameters have moments in float64.
        return tx
    return optax.GradientTransformation(
        lambda params: cast(tx.init(params), dtype), update
    )


# A count is not mapped. If it were, GaLore would compute the SVD in every step.
UNMAPPED: Any = None


def over_layers(
    tx: optax.GradientTransformation, axes: Any
) -> optax.GradientTransformation:
    """Maps a transformation of matrices over the first axis of stacked matrices.

    The norms of the matrices stay separate.

    Args:
        tx: a transformation of matrices.
        axes: 0 for each part of its state that every matrix has, and `UNMAPPED` for
            each part that they share.
    """
    mapped_init = jax.vmap(tx.init, out_axes=axes)
    mapped_update = jax.vmap(tx.update, in_axes=(0, axes, 0), out_axes=(0, axes))

    # If all matrices are masked out, there is nothing to map over.
    def init(params: optax.Params) -> optax.OptState:
        return mapped_init(params) if jax.tree.leaves(params) else tx.init(params)

    def update(
        updates: optax.Updates,
        state: optax.OptState,
        params: optax.Params | None = None,
    ) -> tuple[optax.Updates, optax.OptState]:
        return (mapped_update if jax.tree.leaves(updates) else tx.update)(
            updates, state, params
        )

    return optax.GradientTransformation(init, update)


def by_matrix(
    rule: Callable[[jax.Array], jax.Array],
) -> optax.GradientTransformation:
    """Returns the stateless transformation that applies `rule` to each matrix.

    Args:
        rule: a function of the gradient of one kernel, (in, out).
    """
    return optax.stateless(
        lambda updates, params: jax.tree.map(jax.vmap(rule), updates)
    )


def by_leaf(rule: Callable[[jax.Array], jax.Array]) -> optax.GradientTransformation:
    """Returns the stateless transformation that applies `rule` to whole leaves."""
    return optax.stateless(lambda updates, params: jax.tree.map(rule, updates))


def over_rms(x: jax.Array, axis: int) -> jax.Array:
    """Returns `x` divided by its RMS over an axis, or zeros if the RMS is 0."""
    rms = jnp.sqrt(jnp.mean(jnp.square(x), axis, keepdims=True))
    return x / jnp.where(rms > 0, rms, 1)


def factored_rms(
    b2: float | None = None, min_dim_size_to_factor: int = 128
) -> optax.GradientTransformation:
    """Returns Adafactor's second moments, whose decay rises towards 1.

    If `b2` is given, the decay rises to that at most, as in Scaling Vision Transformers
    (https://arxiv.org/abs/2106.04560).
    """

    def decay(step: jax.typing.ArrayLike, exponent: jax.typing.ArrayLike) -> jax.Array:
        steps = jnp.asarray(step, jnp.float32) + 1
        rising = 1 - steps ** jnp.negative(exponent)
        return rising if b2 is None else jnp.minimum(rising, b2)

    return optax.scale_by_factored_rms(
        min_dim_size_to_factor=min_dim_size_to_factor, decay_rate_fn=decay
    )


def clip_by_global_norm(limit: float) -> optax.GradientTransformation:
    """Returns Optax's transformation of the name, with a norm in float32.

    Optax sums the squares in the gradients' dtype, and in bfloat16 small ones are lost.
    """

    def clipped(updates: optax.Updates, params: optax.Params | None) -> optax.Updates:
        del params
        norm = global_norm(updates)
        factor = jnp.where(norm < limit, 1, limit / norm)
        return jax.tree.map(lambda x: (factor * x).astype(x.dtype), updates)

    return optax.stateless(clipped)


def global_norm(grads: Any) -> jax.Array:
    return jnp.sqrt(
        sum(jnp.sum(jnp.square(g.astype(jnp.float32))) for g in jax.tree.leaves(grads))
    )

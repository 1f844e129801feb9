"""Adam's moments and bias correction, for matrices and for all other leaves."""

from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax

from apollo_optax._dtypes import saturating_cast
from apollo_optax._state import LeafState, updated


class AdamHyperparams(Protocol):
    """The hyperparameters of Adam; floats or arrays."""

    @property
    def b1(self) -> Any: ...
    @property
    def b2(self) -> Any: ...
    @property
    def eps(self) -> Any: ...


def update_moments(
    h: AdamHyperparams, gradient: jax.Array, state: LeafState
) -> tuple[jax.Array, jax.Array]:
    """New first and second moments, in the dtype of `gradient`."""
    mu, nu = (state[name].astype(gradient.dtype) for name in ("mu", "nu"))
    mu = optax.tree.update_moment(gradient, mu, h.b1, 1)
    nu = optax.tree.update_moment_per_elem_norm(gradient, nu, h.b2, 2)
    return mu, nu


def update_leaf(
    h: AdamHyperparams,
    gradient: jax.Array,
    state: LeafState,
    count: jax.Array,
    dtype: Any,
) -> tuple[jax.Array, LeafState]:
    """The update of :func:`optax.scale_by_adam` for one leaf, by its own formulas.

    Its bias correction is Optax's, so that the update is Optax's to the last bit.
    :func:`bias_correction` is more precise in the first steps.
    """
    mu, nu = update_moments(h, gradient.astype(dtype), state)
    mu_hat = optax.tree.bias_correction(mu, h.b1, count)
    nu_hat = optax.tree.bias_correction(nu, h.b2, count)
    update = mu_hat / (jnp.sqrt(nu_hat) + h.eps)
    return saturating_cast(update, gradient.dtype), updated(state, mu=mu, nu=nu)


def bias_correction(h: AdamHyperparams, count: jax.Array) -> jax.Array:
    """Adam's bias corrections as one factor, ``sqrt(1 - b2^t) / (1 - b1^t)``."""
    return jnp.sqrt(_one_minus_power(h.b2, count)) / _one_minus_power(h.b1, count)


def _one_minus_power(decay: Any, count: jax.Array) -> jax.Array:
    """``1 - decay**count`` without the cancellation that costs float32 four digits."""
    return -jnp.expm1(count * jnp.log1p(decay - 1.0))

"""The equation of a momentum, which the flattening and `int8_trace` share."""

from typing import Any

import jax

from apollo_optax._hyperparams import in_dtype


def accumulate(
    decay: Any, momentum: jax.Array, G: jax.Array, *, nesterov: bool
) -> tuple[jax.Array, jax.Array]:
    """The update and the new momentum ``M = decay momentum + G``.

    The update is ``M``, or Nesterov's ``G + decay M``.
    """
    decay = in_dtype(decay, G.dtype)
    M = decay * momentum + G
    return (G + decay * M if nesterov else M), M

"""Hyperparameters: constants of the compiled code, or traced, as they are given."""

import dataclasses
from typing import Any

import jax
import numpy as np

from apollo_optax._projection import Projection

STATIC_ARGS = frozenset(
    {
        "rank",
        "scale_type",
        "update_proj_gap",
        "scale_front",
        "projection",
        "key",
        "weight_dimension_numbers",
        "moment_dtype",
        "mask",
    }
)
"""Arguments of :func:`apollo` that ``optax.inject_hyperparams`` must leave as they are.

``inject_hyperparams`` would otherwise turn integers into arrays, and treat callables
and dtypes as schedules. A factory that lacks some of these arguments takes
``STATIC_ARGS & inspect.signature(factory).parameters.keys()``.
"""

ARRAYS = (jax.Array, np.ndarray)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True)
class Hyperparams:
    """The hyperparameters of :func:`scale_by_apollo`, for jitted functions.

    Arrays, as ``inject_hyperparams`` gives them, are traced. Python numbers stay
    constants of the compiled code, because ``1 - b2`` loses four digits when ``b2`` is
    a float32 array.
    """

    scale_type: str
    scale: Any
    b1: Any
    b2: Any
    eps: Any
    norm_growth_limit: Any
    scale_front: bool
    projection: Projection

    def tree_flatten(self) -> tuple[list[Any], tuple[Any, ...]]:
        values = [getattr(self, field.name) for field in dataclasses.fields(self)]
        arrays = [value for value in values if isinstance(value, ARRAYS)]
        return arrays, tuple(ARRAYS if isinstance(v, ARRAYS) else v for v in values)

    @classmethod
    def tree_unflatten(
        cls, constants: tuple[Any, ...], arrays: list[Any]
    ) -> "Hyperparams":
        remaining = iter(arrays)
        return cls(*(next(remaining) if c is ARRAYS else c for c in constants))

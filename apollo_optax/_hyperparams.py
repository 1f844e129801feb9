"""Hyperparameters: constants of the compiled code, or traced, as they are given."""

import dataclasses
import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

_STATIC = frozenset(
    {
        "int8_momentum",
        "iterations",
        "key",
        "mask",
        "method",
        "moment_dtype",
        "nesterov",
        "projection",
        "rank",
        "relative",
        "scale_front",
        "scale_type",
        "update_proj_gap",
        "weight_dimension_numbers",
    }
)


def static_args(factory: Callable[..., Any]) -> frozenset[str]:
    """The arguments that ``optax.inject_hyperparams`` must leave as they are.

    ``inject_hyperparams`` would otherwise turn integers into arrays, and treat
    callables and dtypes as schedules.

    Args:
      factory: a function of this library that returns a transformation, such as
        :func:`apollo`.

    Returns:
      The names for the argument `static_args` of ``inject_hyperparams``.

    Examples:
      >>> import apollo_optax, jax.numpy as jnp, optax
      >>> tx = optax.inject_hyperparams(
      ...     apollo_optax.racs,
      ...     static_args=apollo_optax.static_args(apollo_optax.racs),
      ...     hyperparam_dtype=jnp.float32,
      ... )(learning_rate=optax.cosine_decay_schedule(1e-3, 1000))
      >>> state = tx.init({"kernel": jnp.ones((8, 16))})
      >>> print(f"{state.hyperparams['learning_rate']:.3f}")
      0.001
    """
    return _STATIC & inspect.signature(factory).parameters.keys()


ARRAYS = (jax.Array, np.ndarray)


def in_dtype(hyperparameter: Any, dtype: Any) -> Any:
    """An array in `dtype`; a Python number stays a constant of any dtype."""
    is_array = isinstance(hyperparameter, ARRAYS)
    return jnp.asarray(hyperparameter, dtype) if is_array else hyperparameter


_Class = TypeVar("_Class", bound=type[Any])


@dataclass_transform(frozen_default=True)
def hyperparams(cls: _Class) -> _Class:
    """A decorator for a class of hyperparameters, for jitted functions.

    It makes a frozen dataclass and a pytree of the class. Arrays, as
    ``inject_hyperparams`` gives them, are traced. All else stays a constant of the
    compiled code: ``1 - b2`` loses four digits when ``b2`` is a float32 array.
    """
    made: Any = dataclasses.dataclass(frozen=True)(cls)
    names = [field.name for field in dataclasses.fields(made)]

    def flatten(h: Any) -> tuple[list[Any], tuple[Any, ...]]:
        values = [getattr(h, name) for name in names]
        arrays = [value for value in values if isinstance(value, ARRAYS)]
        return arrays, tuple(ARRAYS if isinstance(v, ARRAYS) else v for v in values)

    def unflatten(constants: tuple[Any, ...], arrays: Iterable[Any]) -> Any:
        remaining = iter(arrays)
        return made(*(next(remaining) if c is ARRAYS else c for c in constants))

    jax.tree_util.register_pytree_node(made, flatten, unflatten)
    return made

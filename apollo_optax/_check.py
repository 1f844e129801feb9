"""Checks of arguments, leaves and states; every error names the value and the remedy.

Ranges are checked for Python and NumPy numbers only. An array may be traced, as under
``optax.inject_hyperparams``, and reading a concrete one would wait for the device.
"""

import math
import numbers
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax import _tree
from apollo_optax._dtypes import wide_dtype
from apollo_optax._hyperparams import ARRAYS

# Optax calls callables with a count of steps, as schedules, and makes arrays of ints.
USE_STATIC_ARGS = (
    "optax.inject_hyperparams needs static_args=apollo_optax.static_args(factory)"
)
MUST_BE_STATIC = (
    "it decides shapes or code, so it must be known when the step is compiled; "
    + USE_STATIC_ARGS
)


def _is_array(value: Any) -> bool:
    return isinstance(value, ARRAYS)


def positive_int(name: str, value: Any) -> None:
    if _is_array(value):
        raise TypeError(
            f"{name} must be a Python int, got an array ({value!r}): {MUST_BE_STATIC}"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")


def one_of(name: str, value: Any, known: Iterable[str], otherwise: str = "") -> None:
    is_name = isinstance(value, str)
    if not is_name or value not in known:
        names = " or ".join(f'"{choice}"' for choice in known)
        error = ValueError if is_name else TypeError
        raise error(f"{name} must be {names}{otherwise}, got {value!r}")


def boolean(name: str, value: Any) -> None:
    if not isinstance(value, (bool, np.bool_)):
        reason = f": {MUST_BE_STATIC}" if _is_array(value) else ""
        raise TypeError(f"{name} must be True or False, got {value!r}{reason}")


def decay_mask(value: Any) -> None:
    """Raises for a single truth value.

    ``inject_hyperparams`` calls a mask with a count of steps, as if it were a schedule,
    and a mask by the number of axes is then False: there would be no weight decay.
    """
    if isinstance(value, (bool, np.bool_)) or _is_array(value):
        raise TypeError(
            f"mask must be a tree of booleans, a callable that returns one or None, "
            f"got {value!r}; leave it out for weight decay of all leaves, or give "
            f"weight_decay=0 for none. If the mask is a callable, {USE_STATIC_ARGS}"
        )


def _number_in_range(
    name: str, value: Any, is_in_range: Callable[[Any], bool], range_words: str
) -> None:
    if _is_array(value):
        _real_number(name, value)
        _wide_enough(name, value)
        return
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number {range_words}, got {value!r}")
    if not is_in_range(value):
        raise ValueError(f"{name} must be {range_words}, got {value!r}")


def _real_number(name: str, array: Any) -> None:
    """Raises for several numbers, which would broadcast, and for other dtypes."""
    dtype = jnp.result_type(array)
    is_real = jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)
    if array.ndim or not is_real:
        raise TypeError(
            f"{name} must be one real number, got an array of shape {array.shape} and "
            f"dtype {dtype}"
        )


def _wide_enough(name: str, array: Any) -> None:
    """Raises for 16 bits: a decay of 0.999 rounds to 1, and all updates would be 0.

    ``inject_hyperparams`` casts to the parameters' dtype unless it is given another.
    """
    dtype = jnp.result_type(array)
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 32:
        raise TypeError(
            f"{name} has dtype {dtype}, which rounds decay rates such as 0.999; pass a "
            "Python number or float32, with optax.inject_hyperparams by "
            "hyperparam_dtype=jnp.float32"
        )


def decay(name: str, value: Any) -> None:
    _number_in_range(name, value, lambda x: 0 <= x < 1, "in [0, 1)")


def rank_of_method(rank: Any, method: str) -> None:
    if method != "low_rank":
        raise ValueError(
            f'method="{method}" has no rank, got rank={rank!r}; leave it out, or use '
            'method="low_rank"'
        )


def non_negative(name: str, value: Any) -> None:
    _number_in_range(
        name, value, lambda x: 0 <= x < float("inf"), "finite and at least 0"
    )


def positive(name: str, value: Any) -> None:
    _number_in_range(
        name, value, lambda x: 0 < x < float("inf"), "finite and greater than 0"
    )


def rms_bounds(min_rms: Any, max_rms: Any) -> None:
    non_negative("min_rms", min_rms)
    _number_in_range("max_rms", max_rms, lambda x: x > 0, "greater than 0")
    if not _is_array(min_rms) and not _is_array(max_rms) and max_rms < min_rms:
        raise ValueError(
            f"max_rms is {max_rms!r}, below min_rms, which is {min_rms!r}; change one"
        )


def norm_growth_limit(value: Any) -> None:
    _number_in_range("norm_growth_limit", value, lambda x: x >= 1, "at least 1")


def moment_dtype(value: Any) -> None:
    if value is None:
        return
    if _is_array(value):
        # NumPy takes a number for the dtype of the number.
        raise TypeError(
            f"moment_dtype must be a dtype, got an array ({value!r}): {MUST_BE_STATIC}"
        )
    try:
        dtype = jnp.dtype(value)
    except TypeError as error:
        raise TypeError(
            f"moment_dtype must be a floating-point dtype, got {value!r}"
        ) from error
    if not jnp.issubdtype(dtype, jnp.floating):
        raise TypeError(
            f"moment_dtype must be a real floating-point dtype, got {value!r}"
        )
    is_small = jnp.finfo(dtype).tiny > jnp.finfo(jnp.float32).tiny
    if is_small or jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"moment_dtype {dtype} can't hold the squares of small gradients, or has "
            "too few bits to add a gradient to a moment; give bfloat16, float32 or "
            "float64"
        )


def accumulator_dtype(path: _tree.Path, leaf: Any) -> Any:
    """The dtype in which norms, factors and moments of a leaf are computed."""
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"'{_tree.show(path)}' has dtype {dtype}, but only real "
            "floating-point leaves can be trained; exclude integer and complex leaves "
            "with optax.masked or optax.partition, split complex ones with "
            "optax.contrib.split_real_and_imaginary, or give dequantize(params) for "
            "int8 weights"
        )
    if jnp.finfo(dtype).bits < 16:
        raise ValueError(
            f"'{_tree.show(path)}' has dtype {dtype}, which has too few bits to add an "
            "update to; keep the parameter in bfloat16 or wider"
        )
    return wide_dtype(dtype)


OUTSIDE_SHARD_MAP = "update outside shard_map, where jit shards the computation"


def not_varying(
    path: _tree.Path,
    leaf: Any,
    remedy: str = "average the gradient first (jax.lax.pmean), or " + OUTSIDE_SHARD_MAP,
) -> None:
    """Raises for a leaf whose values may differ by device, or are partial sums."""
    kind: Any = jax.typeof(leaf)
    # Older JAX names the axes in the type itself.
    varying = kind.vma if hasattr(kind, "vma") else kind.manual_axis_type.varying
    if varying:
        raise ValueError(
            f"'{_tree.show(path)}' varies over the manual axes {sorted(varying)} "
            f"inside shard_map, so its norms would be local to each device; {remedy}"
        )
    unreduced = getattr(kind.sharding.spec, "unreduced", None)
    if unreduced:
        raise ValueError(
            f"'{_tree.show(path)}' is unreduced over the mesh axes "
            f"{sorted(unreduced)}, so each device has a part of a sum; add them up "
            "first, by jax.sharding.reshard to a spec without unreduced axes"
        )


def same_paths(
    leaves: Mapping[_tree.Path, Any], stored: Mapping[_tree.Path, Any]
) -> None:
    """Raises if the leaves of a state's field, by path, are not the updates'."""
    difference = path_difference(
        leaves,
        stored,
        missing="has leaves that the state lacks",
        unexpected="lacks leaves that the state has",
    )
    if difference:
        raise ValueError(
            "the tree of updates has another structure than the parameters given to "
            f"init: it {difference}; call init with the parameters of these gradients"
        )


def params_of_updates(
    updates: Mapping[_tree.Path, Any], params: Mapping[_tree.Path, Any]
) -> None:
    """Raises unless the parameters have the updates' leaves, by path, and shapes."""
    difference = path_difference(
        updates, params, missing="lacks leaves", unexpected="has further leaves"
    )
    if difference:
        raise ValueError(
            "the tree of parameters has another structure than the updates: it "
            f"{difference}; pass the parameters that the gradients are of, and int8 "
            "weights as dequantize(params)"
        )
    for path, update in updates.items():
        if jnp.shape(update) != jnp.shape(params[path]):
            raise ValueError(
                f"the parameter '{_tree.show(path)}' has shape "
                f"{jnp.shape(params[path])}, but its update has {jnp.shape(update)}; "
                "pass the parameters that the gradients are of"
            )


def path_difference(
    expected: Mapping[_tree.Path, Any],
    actual: Mapping[_tree.Path, Any],
    *,
    missing: str,
    unexpected: str,
) -> str:
    """Names up to five paths that only one of two trees has.

    Args:
      expected: the leaves of one tree.
      actual: the leaves of the other tree.
      missing: the words before paths that only `expected` has.
      unexpected: the words before paths that only `actual` has.

    Returns:
      ``"<words>: 'a', 'b'"``, or an empty string if both trees have the same paths.
    """
    lacking, beyond = expected.keys() - actual.keys(), actual.keys() - expected.keys()
    if not lacking and not beyond:
        return ""
    shown = ", ".join(f"'{_tree.show(path)}'" for path in sorted(lacking or beyond)[:5])
    return f"{missing if lacking else unexpected}: {shown}"


def layer_output(out: Any, x: Any, has_aux_loss: bool) -> None:
    """Raises unless a layer returns activations like `x`, or these and a loss."""
    if has_aux_loss:
        if not (isinstance(out, tuple) and len(out) == 2):
            raise ValueError(
                "with has_aux_loss, a layer must return a pair of activations and a "
                f"loss, got a {type(out).__name__}; return both, or leave out "
                "has_aux_loss"
            )
        out, loss = out
        shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(loss)]
        if any(shapes):
            raise ValueError(
                f"an auxiliary loss must be a scalar, got shape {shapes[0]}; return "
                "its sum or its mean"
            )
    found, expected = jax.tree.structure(out), jax.tree.structure(x)
    if found != expected:
        remedy = "" if has_aux_loss else "; if it returns a loss too, give has_aux_loss"
        raise ValueError(
            f"a layer must return activations like those it is given, {expected}, got "
            f"{found}{remedy}"
        )


def batch_index(value: Any) -> None:
    if _is_array(value):
        is_index = value.ndim == 0 and jnp.issubdtype(value.dtype, jnp.integer)
    else:
        is_index = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not is_index:
        raise TypeError(
            f"batch_index must be an integer, the index of a layer, got {value!r}"
        )


def key_shape(stored: Any, expected: tuple[int, ...]) -> None:
    if jnp.shape(stored) != expected:
        raise ValueError(
            f"the state's key has shape {jnp.shape(stored)}, but the generator of the "
            f"argument key takes {expected}; the state was made with other arguments: "
            "use the same kind of key as then, or call init again"
        )


def state_class(state: Any, expected: type[Any]) -> None:
    """Raises for a state that lacks a field of the class `expected`."""
    # Every tuple and list has a method `count`, which is no field.
    is_sequence = isinstance(state, (tuple, list))
    fields = getattr(state, "_fields", ()) if is_sequence else dir(state)
    lacking = [name for name in expected._fields if name not in fields]
    if lacking:
        remedy = "the state was made by another one: call init again"
        if isinstance(state, tuple) and not hasattr(state, "_fields"):
            remedy = (
                "it may be that of a chain: give the part of this transformation, or "
                "call the chain's update"
            )
        if isinstance(state, (Mapping, list)):
            remedy = (
                "a checkpoint that is restored without a target has dictionaries and "
                "lists in the place of its classes: restore it with tx.init(params) as "
                "the target"
            )
        raise ValueError(
            f"the state is a {type(state).__name__} without {', '.join(lacking)}, and "
            f"this transformation's is a {expected.__name__}; {remedy}"
        )


def optional_fields(state: Any, with_optional: bool) -> None:
    """Raises for a state with an optional field that is not used, or without one."""
    for name in state._field_defaults:
        if with_optional != (getattr(state, name) is not None):
            problem = "lacks" if with_optional else "has"
            verb = "store" if with_optional else "do not store"
            raise ValueError(
                f"the state {problem} a {name}, which these arguments {verb}; it was "
                f"made with others: give the same `{name}` as then, or call init again"
            )


def warn_of_large_scale(
    rank: int, scale: Any, matrices: Mapping[_tree.Path, Any]
) -> None:
    """Warns of matrices that rank 1 gives updates more than twice as large as Adam's.

    At rank 1 the update of a matrix is about ``sqrt(scale / m)`` times Adam's.
    """
    if rank > 1 or _is_array(scale):
        return
    small = [
        path
        for path, matrix in matrices.items()
        if scale > 4 * matrix.axes.contracted_size
    ]
    if not small:
        return
    shown = ", ".join(f"'{_tree.show(path)}'" for path in small[:5])
    warnings.warn(
        f"at rank 1 with scale={scale}, as in APOLLO-Mini, matrices whose smaller side "
        f"is below {math.ceil(scale / 4)} get updates of more than twice Adam's size, "
        f"and of a size that depends on chance: {shown}"
        f"{' and others' if len(small) > 5 else ''} ({len(small)} in all). Give them "
        "to Adam with None in weight_dimension_numbers, for example by "
        "dimension_numbers_by_path([(r'<their path>$', None)]), or use a higher rank",
        UserWarning,
        stacklevel=4,  # Without a chain, this is the line that calls `init`.
    )


OTHER_ARGUMENTS = (
    "the state was made with other arguments: use the same "
    "weight_dimension_numbers as then, and the same rank if there is one, or call init "
    "again"
)
OTHER_NUMBERS = "pass the weight_dimension_numbers that the optimizer was given"


def state_shape(
    path: _tree.Path,
    field: str,
    array: Any,
    expected: tuple[int, ...] | None,
    remedy: str = OTHER_ARGUMENTS,
) -> None:
    """Raises for a field of another shape; None stands for no array, in either."""
    actual = None if array is None else jnp.shape(array)
    if actual != expected:
        found, wanted = (
            "no array" if shape is None else f"shape {shape}"
            for shape in (actual, expected)
        )
        raise ValueError(
            f"the state's {field} for '{_tree.show(path)}' has {found}, but the "
            f"arguments here give {wanted.removeprefix('shape ')}; {remedy}"
        )

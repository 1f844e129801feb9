"""A transformation that updates each leaf by itself.

Matrices are updated by an algorithm such as APOLLO, and all other leaves by Adam, or
not at all. This module has everything that these algorithms share: dimension numbers,
checks of leaves, Adam, Flax's boxes, the count of steps and the trees of the state. An
algorithm is a set of functions that are passed in.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _adam, _check, _keys, _sharding, _state, _tree
from apollo_optax._dimension_numbers import (
    Unguessed,
    WeightDimensionNumbers,
    check_batch_index,
    resolve,
    warn_if_unguessable,
)
from apollo_optax._matrix import Matrix
from apollo_optax._state import LeafState


class MatrixLeaf(NamedTuple):
    """A leaf that is a matrix or a batch of them, with everything its update reads."""

    matrix: Matrix
    gradient: jax.Array
    state: LeafState


class Step(NamedTuple):
    """The arguments of an update that belong to no leaf.

    Attributes:
      state: of the transformation, before the update.
      number: of this step, counted from 1; None if the state has no count.
      batch_index: the index of the first slice if the leaves are slices of stacks, or
        0.
    """

    state: Any
    number: Any
    batch_index: jax.Array


BY_ADAM = Unguessed(
    "Adam trains {}, with Adam's memory",
    "is trained with Adam and takes Adam's memory, because memory is saved on "
    "matrices only",
    "leaves a kernel to Adam",
)

CheckMatrices = Callable[[Mapping[_tree.Path, Matrix]], None]
UpdateMatrices = Callable[
    [Step, Mapping[_tree.Path, MatrixLeaf]],
    Mapping[_tree.Path, tuple[jax.Array, LeafState]],
]


def leafwise(
    state_class: type[Any],
    update_matrices: UpdateMatrices,
    *,
    adam: _adam.AdamHyperparams | None,
    rank: int = 0,
    weight_dimension_numbers: WeightDimensionNumbers,
    unguessed: Unguessed = BY_ADAM,
    moment_dtype: jax.typing.DTypeLike | None = None,
    with_optional: bool = False,
    state_key: _keys.StateKey | None = None,
    check_matrices: CheckMatrices = lambda matrices: None,
) -> optax.GradientTransformationExtraArgs:
    """Makes a transformation from an algorithm for matrices.

    Args:
      state_class: a NamedTuple, with a `count` of steps if `adam` is given. Its other
        fields are annotated with a :class:`Field`, but for a `key` if `state_key` is
        given.
      update_matrices: the algorithm, from the leaves that are matrices to the update
        and the new state of each, by path.
      adam: the hyperparameters of all other leaves; None if these pass through.
      rank: the rank that the matrices are projected to.
      weight_dimension_numbers: which axes of a leaf form a matrix.
      unguessed: what happens to kernels whose axes can't be guessed.
      moment_dtype: dtype of the fields that are moments; None for the default.
      with_optional: whether the state has the fields with a default.
      state_key: the key in the state; None if there is none.
      check_matrices: raises or warns, in `init`, for matrices that the algorithm can't
        serve.

    Raises:
      TypeError: for `adam` or `moment_dtype` of the wrong type.
      ValueError: for `adam` or `moment_dtype` out of range.
    """
    if adam is not None:
        _check.decay("b1", adam.b1)
        _check.decay("b2", adam.b2)
        _check.non_negative("eps", adam.eps)
    _check.moment_dtype(moment_dtype)
    fields = _state.fields_of(state_class, with_optional=with_optional)

    def init_fn(params: optax.Params) -> Any:
        if weight_dimension_numbers is None:
            warn_if_unguessable(params, unguessed)
        axes = resolve(weight_dimension_numbers, params)
        leaves = _tree.leaves_by_path(params)
        states, matrices = {}, {}
        for path, leaf in leaves.items():
            dtype, matrix = _check.accumulator_dtype(path, leaf), None
            if (matrix_axes := axes[path]) is not None:
                matrix = Matrix.of_parameter(leaf, matrix_axes, dtype, rank)
                matrices[path] = matrix
            states[path] = _state.init_leaf(fields, leaf, matrix, dtype, moment_dtype)
        check_matrices(matrices)
        shardings = map(_sharding.sharding_of, leaves.values())
        on_mesh = next((s for s in shardings if s is not None), None)
        replicated = _sharding.replicated(on_mesh)
        zero = jnp.zeros((), jnp.int32, device=replicated)
        return state_class(
            **({} if adam is None else {"count": zero}),
            **({} if state_key is None else state_key.init(replicated)),
            **_state.trees_of(fields, states, matrices, params),
        )

    def update_fn(
        updates: optax.Updates,
        state: Any,
        params: optax.Params | None = None,
        *,
        batch_index: jax.typing.ArrayLike | None = None,
        **extra_args: Any,
    ) -> tuple[optax.Updates, Any]:
        del params, extra_args
        axes = resolve(weight_dimension_numbers, updates)
        check_batch_index(batch_index, axes)
        gradients = _tree.leaves_by_path(updates)
        _check.state_class(state, state_class)
        _check.optional_fields(state, with_optional)
        if state_key is not None:
            state_key.check(state.key)
        states = _state.by_leaf(fields, state, gradients)
        number: Any = None
        if adam is not None:
            number = jnp.asarray(optax.safe_increment(state.count))

        new_updates, matrices = dict(gradients), {}
        for path, leaf in gradients.items():
            dtype, matrix = _check.accumulator_dtype(path, leaf), None
            gradient, leaf_state = jnp.asarray(leaf), states[path]
            if (matrix_axes := axes[path]) is not None:
                _check.not_varying(path, leaf)
                matrix = Matrix.of_gradient(gradient, matrix_axes, dtype, rank)
                matrices[path] = MatrixLeaf(matrix, gradient, leaf_state)
            _state.check_leaf(fields, path, leaf, leaf_state, matrix)
            if matrix is None and adam is not None:
                # A gradient may be sharded unlike the parameter, and so unlike `mu`.
                before = _sharding.explicit_sharding_of(gradient)
                gradient = _sharding.reshard(
                    gradient, _sharding.explicit_sharding_of(leaf_state["mu"])
                )
                update, states[path] = _adam.update_leaf(
                    adam, gradient, leaf_state, number, dtype
                )
                new_updates[path] = _sharding.reshard(update, before)

        # A narrower integer would overflow where it becomes the index of a matrix.
        first = jnp.asarray(0 if batch_index is None else batch_index, jnp.int32)
        step = Step(state, number, first)
        for path, result in update_matrices(step, matrices).items():
            new_updates[path], states[path] = result
        new_state = _state.with_leaves(fields, state, states)
        if number is not None:
            new_state = new_state._replace(count=number)
        return (
            jax.tree.unflatten(
                jax.tree.structure(updates), [new_updates[path] for path in gradients]
            ),
            new_state,
        )

    # Optax types any state as a tree of arrays.
    init: Any = init_fn
    update: Any = update_fn
    return optax.GradientTransformationExtraArgs(init, update)

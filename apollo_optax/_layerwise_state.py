"""Runs an Optax transformation on some of the parameters at a time.

The layer-wise step updates one layer per call. :class:`PartialOptimizer` selects the
part of the optimizer state that belongs to the parameters at hand, and splits the state
of a stack by layer. It rejects transformations whose state shows that they mix layers.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _boxes, _state, _tree
from apollo_optax._quantization import (
    apply_updates_stochastic,
    dequantize,
    is_quantized,
)

Leaves = dict[_tree.Path, Any]


def leaves_of(params: Any) -> Leaves:
    """The parameters by path; a ``QuantizedArray`` is one leaf."""
    return _tree.leaves_by_path(params, is_leaf=is_quantized)


def structure_of(params: Any) -> Any:
    """The tree structure in which a ``QuantizedArray`` is one leaf."""
    return jax.tree.structure(params, is_leaf=is_quantized)


class Updated(NamedTuple):
    """The result of an update of some of the parameters."""

    params: Leaves
    state: Leaves  # The state of these parameters, and leaves that belong to none.


class PartialOptimizer:
    """A transformation with its parameters and state, which updates part of them."""

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        params: Any,
        opt_state: Any,
        key: Any,
    ) -> None:
        """Checks that `opt_state` is the state of `tx` for `params`.

        Args:
          tx: the transformation.
          params: the tree of all parameters; any may be a ``QuantizedArray``.
          opt_state: ``tx.init(dequantize(params))``.
          key: a JAX key for stochastic rounding; None rounds to nearest.

        Raises:
          ValueError: if `opt_state` is another state, or if parameters are in int8 and
            `key` is None.
        """
        self.params = leaves_of(params)
        self.state = _tree.leaves_by_path(opt_state)
        dtypes = [leaf.dtype for leaf in self.params.values()]
        self.norm_dtype = jnp.result_type(jnp.float32, *dtypes)
        self._tx, self._key = tx, key
        self._params_structure = structure_of(params)
        self._state_structure = jax.tree.structure(opt_state)
        self._check_state()
        shared = _state.shared_state(tx.init, self.params_tree({}))
        owners = _state.owners(self.state, self.params, shared)
        self._owner = {path: owner.parameter for path, owner in owners.items()}
        self._has_rule = {path for path, owner in owners.items() if owner.rule}
        self._check_steps()
        quantized = [path for path, leaf in self.params.items() if is_quantized(leaf)]
        if quantized and key is None:
            raise ValueError(
                f"'{_tree.show(quantized[0])}' is in int8, where rounding to nearest "
                "loses every update smaller than half a rounding step; give the step a "
                "key=, another JAX key for each step, to round stochastically"
            )

    def _check_state(self) -> None:
        """Raises if the state is another optimizer's, or for other parameters."""
        # Take shapes instead of dequantizing: a QuantizedArray that is partly in host
        # memory can't be dequantized.
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self.params.items()
        }
        state = _boxes.shapes_of_state(self._tx.init, self.params_tree(shapes))
        expected, actual = (
            {path: jnp.shape(leaf) for path, leaf in leaves.items()}
            for leaves in (_tree.leaves_by_path(state), self.state)
        )
        for path in expected | actual:
            name = f"'{_tree.show(path)}'"
            if path not in actual:
                found = f"lacks {name} of shape {expected[path]}"
            elif path not in expected:
                found = f"has an unexpected {name} of shape {actual[path]}"
            elif actual[path] != expected[path]:
                found = f"has {name} of shape {actual[path]}, not {expected[path]}"
            else:
                continue
            raise ValueError(
                f"opt_state is not tx.init(dequantize(params)): it {found}; give the "
                "state of this optimizer for these parameters"
            )

    def _check_steps(self) -> None:
        """Raises if the state is that of `optax.MultiSteps`.

        MultiSteps does not pass `batch_index` on, so all layers would draw the same
        projection.
        """
        for path, owner in self._owner.items():
            if owner is None and path[-1] == "mini_step":
                raise ValueError(
                    f"opt_state has '{_tree.show(path)}' of optax.MultiSteps, which "
                    "does not tell the optimizer inside which layer it updates; leave "
                    "MultiSteps out, and give the step larger batches"
                )

    def params_tree(self, leaves: Leaves) -> Any:
        """The tree of parameters with these leaves; all others are masked out."""
        nothing = optax.MaskedNode()
        return self._params_structure.unflatten(
            leaves.get(path, nothing) for path in self.params
        )

    def state_tree(self, leaves: Leaves) -> Any:
        """The optimizer state with these leaves; all others are masked out."""
        nothing = optax.MaskedNode()
        return self._state_structure.unflatten(
            leaves.get(path, nothing) for path in self.state
        )

    def state_of(self, params: Iterable[_tree.Path]) -> Leaves:
        """The state of these parameters, and the leaves that belong to no parameter."""
        owners = {None, *params}
        return {
            path: leaf
            for path, leaf in self.state.items()
            if self._owner[path] in owners
        }

    def update(
        self,
        params: Leaves,
        grads: Leaves,
        states: Leaves | None = None,
        index: Any = None,
    ) -> Updated:
        """Updates some of the parameters.

        Args:
          params: the parameters to update, as stored.
          grads: their gradients.
          states: leaves that replace the stored state of these parameters.
          index: the layer's number, if `params` are one layer of the stack.
        """
        states = self.state_of(params) | (states or {})
        updates, new = self._tx.update(
            self.params_tree(grads),
            self.state_tree(states),
            self.params_tree(dequantize(params)),
            **({} if index is None else {"batch_index": index}),
        )
        new_states = _tree.leaves_by_path(new)
        if index is not None:
            self._check_new_state(states, new_states)
        tree = self.params_tree(params)
        if self._key is None:
            new_params = optax.apply_updates(tree, updates)
        else:
            new_params = apply_updates_stochastic(
                tree, updates, self._key, batch_index=index
            )
        return Updated(leaves_of(new_params), new_states)

    def stacked_state(self, stack: Leaves, depth: int) -> Leaves:
        """The leaves of the state that have one row per layer of the stack.

        Raises:
          ValueError: if the state of a single layer is not a row of the state of all.
        """
        row, row_state = self._abstract(stack, 1)
        row_shapes = _shapes(row_state)
        for path in row_shapes:
            if path not in self.state:
                reason = "is there for one layer alone, but not for all layers"
                raise self._mixes_layers(path, reason)
        self._check_shared(row, row_state)
        # A stack of vectors that is taken for a matrix has moments of the shape of its
        # smaller side. With this many layers that is not the side of the layers, so the
        # moments can't be mistaken for a row per layer.
        many = 1 + max(math.prod(leaf.shape[1:]) for leaf in stack.values())
        shapes_of_many = _shapes(self._abstract(stack, many)[1])
        stacked = {}
        for path, leaf in self.state_of(stack).items():
            shape, row_shape = jnp.shape(leaf), row_shapes.get(path)
            has_rows = self._owner[path] is not None and shape[:1] == (depth,)
            if has_rows and row_shape == (1, *shape[1:]):
                is_mixed = shapes_of_many.get(path) != (many, *shape[1:])
                if depth > 1 and path in self._has_rule and is_mixed:
                    reason = "has the shape of a matrix over the layers"
                    raise self._mixes_layers(path, reason)
                stacked[path] = leaf
            elif row_shape != shape:
                reason = f"has shape {shape}, and for one layer {row_shape}"
                raise self._mixes_layers(path, reason)
        return stacked

    def _abstract(self, stack: Leaves, depth: int) -> tuple[Leaves, Any]:
        """The shapes of a stack of `depth` layers and of its state."""
        params = {
            path: jax.ShapeDtypeStruct((depth, *leaf.shape[1:]), leaf.dtype)
            for path, leaf in stack.items()
        }
        return params, jax.eval_shape(self._tx.init, self.params_tree(params))

    def _check_shared(self, params: Leaves, state: Any) -> None:
        """Raises if a leaf that no parameter owns depends on a layer's gradient."""

        def update(grads: Any, params: Any, state: Any) -> Leaves:
            _, new_state = self._tx.update(grads, state, params, batch_index=0)
            return _tree.leaves_by_path(new_state)

        tree = self.params_tree(params)
        traced, after = jax.make_jaxpr(update, return_shape=True)(tree, tree, state)
        jaxpr = traced.jaxpr
        # The first two arguments, the gradients and the parameters, differ by layer.
        differ = [i < 2 * len(params) for i in range(len(jaxpr.invars))]
        depends = depends_on(jaxpr, differ)
        for path, by_layer in zip(sorted(after), depends, strict=True):
            if self._owner[path] is None and by_layer:
                reason = "is computed from the gradients of all layers"
                raise self._mixes_layers(path, reason)

    def _check_new_state(self, before: Leaves, after: Leaves) -> None:
        """Raises if one layer's update changes a dtype, or a leaf that layers share.

        A leaf in another dtype can't be written to its place in the state. A shared
        leaf may be a norm over all layers.
        """
        for path, leaf in before.items():
            if self._owner[path] is None:
                continue
            if after[path].dtype != leaf.dtype:
                raise ValueError(
                    f"the update changes '{_tree.show(path)}' of the optimizer's state "
                    f"from {leaf.dtype} into {after[path].dtype}, which can't be "
                    "written back to the state; keep it in one dtype (with mu_dtype=, "
                    "or with hyperparam_dtype= of optax.inject_hyperparams)"
                )
            is_shared = leaf is self.state[path]
            if is_shared and after[path] is not leaf:
                reason = f"has shape {jnp.shape(leaf)}, without an axis of layers"
                raise self._mixes_layers(path, reason)

    def _mixes_layers(self, path: _tree.Path, reason: str) -> ValueError:
        return ValueError(
            f"'{_tree.show(path)}' of the optimizer's state {reason}, so the optimizer "
            "does not treat the layers of a stacked leaf separately; use one that "
            "does, name the layers' axis as a batch axis (weight_dimension_numbers), "
            "or use the ordinary step"
        )


def depends_on(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    """For each output of a program, whether it depends on one of the marked `inputs`.

    A loop counts as one operation: all of its outputs depend on all of its inputs.
    """
    marked = zip(jaxpr.invars, inputs, strict=True)
    reached = {id(var) for var, is_marked in marked if is_marked}
    for eqn in jaxpr.eqns:
        read = [id(var) in reached for var in eqn.invars]
        outputs = [any(read)] * len(eqn.outvars)
        if eqn.primitive.name == "jit":
            outputs = depends_on(eqn.params["jaxpr"].jaxpr, read)
        elif eqn.primitive.name == "cond" and not read[0]:
            branches = [
                depends_on(branch.jaxpr, read[1:]) for branch in eqn.params["branches"]
            ]
            outputs = [any(output) for output in zip(*branches, strict=True)]
        written = zip(eqn.outvars, outputs, strict=True)
        reached.update(id(var) for var, is_reached in written if is_reached)
    return [id(var) in reached for var in jaxpr.outvars]


def _shapes(tree: Any) -> dict[_tree.Path, tuple[int, ...]]:
    return {path: jnp.shape(leaf) for path, leaf in _tree.leaves_by_path(tree).items()}

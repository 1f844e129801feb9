"""An Optax transformation and its state, for some of the parameters at a time."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _tree
from apollo_optax._quantization import (
    apply_updates_stochastic,
    dequantize,
    is_quantized,
)

Leaves = dict[_tree.Path, Any]


def leaves_of(params: Any) -> Leaves:
    return _tree.leaves_by_path(params, is_leaf=is_quantized)


def structure_of(params: Any) -> Any:
    return jax.tree.structure(params, is_leaf=is_quantized)


class Updated(NamedTuple):
    """What an update makes of some of the parameters."""

    params: Leaves
    state: Leaves  # Of these parameters, and what belongs to none.


class PartialOptimizer:
    """A transformation and its state, for some of the parameters at a time."""

    def __init__(
        self,
        tx: optax.GradientTransformationExtraArgs,
        params: Any,
        opt_state: Any,
        key: Any,
    ) -> None:
        self.params = leaves_of(params)
        self.state = _tree.leaves_by_path(opt_state)
        self.norm_dtype = jnp.result_type(
            jnp.float32, *(leaf.dtype for leaf in self.params.values())
        )
        self._tx, self._key = tx, key
        self._params_structure, self._state_structure = (
            structure_of(params),
            jax.tree.structure(opt_state),
        )
        self._check_state()
        shared = _tree.shared_state(tx.init, self.params_tree({}))
        owners = _tree.owners(self.state, self.params, shared)
        self._owner = {path: owner.parameter for path, owner in owners.items()}
        quantized = [path for path, leaf in self.params.items() if is_quantized(leaf)]
        if quantized and key is None:
            raise ValueError(
                f"'{_tree.show(quantized[0])}' is in int8, which updates smaller than its rounding step "
                "would never move; give the step a key=, a JAX key that differs from step to step, to round "
                "stochastically"
            )

    def _check_state(self) -> None:
        """Raises for a state of another optimizer, or of other parameters."""
        # Of shapes: dequantizing what is partly in host memory would mix memories.
        shapes = {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in self.params.items()
        }
        expected = jax.eval_shape(self._tx.init, self.params_tree(shapes))
        ours, theirs = (
            {path: jnp.shape(leaf) for path, leaf in leaves.items()}
            for leaves in (_tree.leaves_by_path(expected), self.state)
        )
        differing = [
            path for path in ours | theirs if ours.get(path) != theirs.get(path)
        ]
        if differing:
            path = differing[0]
            there = (
                f"has '{_tree.show(path)}' of shape {theirs[path]}"
                if path in theirs
                else "lacks it"
            )
            expects = (
                f"has '{_tree.show(path)}' of shape {ours[path]}"
                if path in ours
                else "lacks it"
            )
            raise ValueError(
                f"opt_state is not tx.init(dequantize(params)): that {expects}, and this {there}; give the "
                "state of this optimizer and these parameters"
            )

    def params_tree(self, leaves: Leaves) -> Any:
        """The parameters' tree with these leaves, all others masked out."""
        return self._params_structure.unflatten(
            leaves.get(path, optax.MaskedNode()) for path in self.params
        )

    def state_tree(self, leaves: Leaves) -> Any:
        return self._state_structure.unflatten(
            leaves.get(path, optax.MaskedNode()) for path in self.state
        )

    def state_of(self, params: Iterable[_tree.Path]) -> Leaves:
        """What the state holds for these parameters, and what belongs to none, as a count."""
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
        """Updates `params`, with `states` in place of what the state holds for them, as layer `index`."""
        states = self.state_of(params) | (states or {})
        updates, new = self._tx.update(
            self.params_tree(grads),
            self.state_tree(states),
            self.params_tree(dequantize(params)),
            **({} if index is None else {"batch_index": index}),
        )
        new_states = _tree.leaves_by_path(new)
        if index is not None:
            self._check_unchanged(states, new_states)
        if self._key is None:
            new_params = optax.apply_updates(self.params_tree(params), updates)
        else:
            new_params = apply_updates_stochastic(
                self.params_tree(params), updates, self._key, batch_index=index
            )
        return Updated(leaves_of(new_params), new_states)

    def layered_state(self, stack: Leaves, depth: int) -> Leaves:
        """What the state holds for each layer of the stack apart: leaves of `depth` rows.

        Raises:
          ValueError: where the state of one layer is no row of the state of all.
        """
        one = {
            path: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype)
            for path, leaf in stack.items()
        }
        state_of_one = jax.eval_shape(self._tx.init, self.params_tree(one))
        of_one = _tree.leaves_by_path(state_of_one)
        self._check_shared(one, state_of_one)
        layered = {}
        for path, leaf in self.state_of(stack).items():
            expected = jnp.shape(of_one[path]) if path in of_one else None
            rows = self._owner[path] is not None and jnp.shape(leaf)[:1] == (depth,)
            if rows and expected == (1, *jnp.shape(leaf)[1:]):
                layered[path] = leaf
            elif expected != jnp.shape(leaf):
                raise self._inseparable(
                    path, f"has shape {jnp.shape(leaf)}, and for one layer {expected}"
                )
        return layered

    def _check_shared(self, params: Leaves, state: Any) -> None:
        """Raises for what belongs to no parameter and yet is computed from a layer's gradient."""

        def update(grads: Any, params: Any, state: Any) -> Leaves:
            return _tree.leaves_by_path(
                self._tx.update(grads, state, params, batch_index=0)[1]
            )

        tree = self.params_tree(params)
        after = jax.eval_shape(update, tree, tree, state)
        jaxpr = jax.make_jaxpr(update)(tree, tree, state).jaxpr
        computed = _computed_from(
            jaxpr, [i < 2 * len(params) for i in range(len(jaxpr.invars))]
        )
        for path, from_gradients in zip(sorted(after), computed, strict=True):
            if self._owner[path] is None and from_gradients:
                raise self._inseparable(
                    path, "is computed from the gradients of all layers"
                )

    def _check_unchanged(self, before: Leaves, after: Leaves) -> None:
        """Raises for what the layers share and yet each of them changes, as a norm over all of them.

        And for what comes back in another dtype, which can't be written where it was.
        """
        for path, leaf in before.items():
            if self._owner[path] is not None and after[path].dtype != leaf.dtype:
                raise ValueError(
                    f"the update turns '{_tree.show(path)}' of the optimizer's state from {leaf.dtype} into "
                    f"{after[path].dtype}, so it has no place in the state; keep it in one dtype (such as by "
                    "mu_dtype=, or hyperparam_dtype= of optax.inject_hyperparams)"
                )
            shared = self._owner[path] is not None and leaf is self.state[path]
            if shared and after[path] is not leaf:
                raise self._inseparable(
                    path, f"has shape {jnp.shape(leaf)}, without an axis of layers"
                )

    def _inseparable(self, path: _tree.Path, reason: str) -> ValueError:
        return ValueError(
            f"'{_tree.show(path)}' of the optimizer's state {reason}, so the optimizer does not treat the "
            "layers of a stacked leaf separately; take one that does, name the layers' axis as a batch axis "
            "(weight_dimension_numbers), or take the ordinary step"
        )


def _computed_from(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a program are computed from some of its inputs; loops count as one operation."""
    reached = {
        id(var) for var, is_input in zip(jaxpr.invars, inputs, strict=True) if is_input
    }
    for eqn in jaxpr.eqns:
        read = [id(var) in reached for var in eqn.invars]
        outputs = [any(read)] * len(eqn.outvars)
        if eqn.primitive.name in ("jit", "pjit"):
            outputs = _computed_from(eqn.params["jaxpr"].jaxpr, read)
        elif eqn.primitive.name == "cond" and not read[0]:
            branches = (
                _computed_from(branch.jaxpr, read[1:])
                for branch in eqn.params["branches"]
            )
            outputs = list(map(any, zip(*branches, strict=True)))
        reached.update(
            id(var)
            for var, is_reached in zip(eqn.outvars, outputs, strict=True)
            if is_reached
        )
    return [id(var) in reached for var in jaxpr.outvars]

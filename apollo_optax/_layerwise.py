"""The update fused into the backward pass, a layer at a time.

For a model that is an embedding, a stack of identical layers and a head. The stack is run forward
keeping each layer's input, then walked backward: compute the layer again, take its gradient, update its
weights and its optimizer state in place, drop the gradient. There are never gradients of two layers, and
weights in host memory are on the device a layer at a time.

No optimizer is written here: every layer goes through ``tx.update`` as a tree of the parameters'
structure in which all other leaves are masked out, as :func:`optax.masked` does it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.experimental.layout import Layout, with_layout_constraint

from apollo_optax import _state, _tree
from apollo_optax._quantization import QuantizedArray, apply_updates_stochastic, dequantize

Leaves = dict[_tree.Path, Any]


class LayerwiseMetrics(NamedTuple):
    """What a layer-wise step tells beside the new parameters and state; scalars."""

    loss: jax.Array  # Before the step, with the layers' auxiliary losses.
    grad_norm: jax.Array  # Euclidean, over all parameters; known only when all are updated.


def layerwise_step(
    embed: Callable[[Any, Any], Any],
    layer: Callable[[Any, Any, Any, Any], Any],
    head: Callable[[Any, Any, Any], jax.Array],
    tx: optax.GradientTransformation,
    *,
    layers: str = "layers",
    has_aux_loss: bool = False,
    offload_inputs: bool = False,
) -> Callable[..., tuple[Any, Any, LayerwiseMetrics]]:
    """A training step that never holds the gradients of more than one layer.

    It takes the numbers of the ordinary step (gradients of the whole model, ``tx.update``,
    ``optax.apply_updates``), up to rounding, and the very same optimizer state, so a run may change from
    one to the other at any step. Its memory is that of the weights, the optimizer state, one input and one
    gradient per layer of the deepest kind: the weights and gradients of *one* layer, the activations
    within one layer, and each layer's input.

    A model is three pure functions. `params` below are the parameters without the stack, `layer_params`
    one layer of the stack, its leaves without their leading axis. Activations `x` are a floating-point array
    or a tree of them, of the same shapes and dtypes before and after each layer.

    Args:
      embed: ``(params, batch) -> x``.
      layer: ``(layer_params, x, batch, constants) -> x``, or ``(x, loss)`` with `has_aux_loss`. Wrapped in
        ``jax.checkpoint`` it keeps less while its gradient is taken. XLA may put the gradients of its weights
        off to their updates and keep the activations that they take until then, which matters with large
        batches: between its parts, a barrier on the gradients keeps them in order
        (``gradient_barrier`` in ``examples/llama/model.py``).
      head: ``(params, x, batch) -> loss``, a scalar. A tied embedding is a parameter that both `embed` and
        `head` use: it gets the sum of both gradients, once.
      tx: any Optax transformation that treats leaves, and the layers of a stacked leaf, separately: the
        layers of a leaf come to its ``update`` one by one, as ``(1, ...)`` slices with the layer's number as
        the extra argument `batch_index`. Of those that do not, what shows in the state is refused:
        ``MultiSteps``, ``apply_if_finite``, the factored moments of ``optax.adafactor``. Others compute
        something else **unnoticed**: ``clip_by_global_norm``, ``adaptive_grad_clip``, ``clip_by_block_rms``,
        ``scale_by_param_block_norm``, ``scale_by_param_block_rms``, ``scale_by_trust_ratio`` and
        ``normalize_by_update_norm``, whose norms are over a whole leaf or tree; ``optax.contrib.muon`` unless
        its ``muon_weight_dimension_numbers`` say that the layers' axis is none of a matrix, vectors of the
        stack included; ``add_noise``, which gives every layer the same noise. The norm-growth limiter of
        :func:`scale_by_apollo` takes the place of clipping and acts on each layer alone.
      layers: where in the parameters the stack is, as ``"layers"`` or ``"decoder/layers"``. Every leaf in it
        has the number of layers as its leading axis.
      has_aux_loss: whether layers return an auxiliary loss, a scalar, to be added to the head's.
      offload_inputs: keep the layers' inputs in host memory from the forward to the backward walk.

    Returns:
      A pure function ``step(params, opt_state, batch, *, key=None, per_layer=None)`` that returns the new
      parameters, the new state and :class:`LayerwiseMetrics`; to be jitted with the first two donated
      (``donate_argnums=(0, 1)``), without which nothing happens in place.

      * `params` are nested dictionaries; any leaf may be a :class:`QuantizedArray`. Leaves of the stack that
        are in host memory (``memory_kind="pinned_host"``) stay there: a layer is fetched while the one before
        is computed, and written back.
      * `opt_state` is ``tx.init(dequantize(params))``.
      * `key`, a JAX key that differs from step to step, has bfloat16 weights rounded stochastically (see
        :func:`apply_updates_stochastic`); int8 weights need it. Without it rounding is to nearest.
      * `per_layer` is a tree of arrays with the number of layers as leading axis, of which `layer` gets its
        row as `constants`: window sizes, dropout keys (``jax.random.split(key, L)``).

    Raises:
      TypeError: if `layers` is no string.
      ValueError: from the step, where there is no stack at `layers`, where its leaves or those of `per_layer`
        differ in their leading axis, where `opt_state` is not that of `tx` and these parameters, where the
        optimizer keeps something for a stacked leaf that is not its layers' one by one or changes the
        dtype of its state, or where int8 weights come without a `key`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import ApolloDimensionNumbers, apollo_mini, layerwise_step
      >>> numbers = {"embed": None, "layers": ApolloDimensionNumbers(1, 2), "head": None}
      >>> tx = apollo_mini(0.01, weight_dimension_numbers=numbers)
      >>> step = jax.jit(
      ...     layerwise_step(
      ...         lambda params, batch: params["embed"][batch],
      ...         lambda kernel, x, *_: x + jnp.tanh(x @ kernel),
      ...         lambda params, x, batch: jnp.mean((x @ params["head"]) ** 2),
      ...         tx,
      ...     ),
      ...     donate_argnums=(0, 1),
      ... )
      >>> params = {"embed": jnp.ones((5, 8)), "layers": jnp.ones((3, 8, 8)), "head": jnp.ones((8, 1))}
      >>> opt_state = tx.init(params)
      >>> params, opt_state, metrics = step(params, opt_state, jnp.array([0, 3, 1]))
      >>> metrics.loss.shape
      ()

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023 (the fused update, for SGD)
    """
    tx = optax.with_extra_args_support(tx)
    stack_path = _stack_path(layers)

    def step(
        params: Any, opt_state: Any, batch: Any, *, key: Any = None, per_layer: Any = None
    ) -> tuple[Any, Any, LayerwiseMetrics]:
        optimizer = _Optimizer(tx, params, opt_state, key)
        stack_structure = _structure(_subtree(params, stack_path))
        stack = {
            path: leaf for path, leaf in optimizer.params.items() if path[: len(stack_path)] == stack_path
        }
        depth = _depth(stack, per_layer)
        states = optimizer.layered_state(stack, depth)
        rest = {path: leaf for path, leaf in optimizer.params.items() if path not in stack}

        def run_embed(weights: Leaves) -> Any:
            return embed(_without(optimizer.params_tree(weights), stack_path), batch)

        def run_layer(weights: Leaves, x: Any, constants: Any) -> tuple[Any, Any]:
            one = [jax.lax.squeeze(weights[path], (0,)) for path in stack]
            out = layer(stack_structure.unflatten(one), x, batch, constants)
            return out if has_aux_loss else (out, None)

        def run_head(weights: Leaves, x: Any) -> jax.Array:
            return head(_without(optimizer.params_tree(weights), stack_path), x, batch)

        def kept(x: Any, aux_loss: Any) -> tuple[Any, Any]:
            return _move(x, jax.memory.Space.Host) if offload_inputs else x, aux_loss

        indices = jnp.arange(depth)
        weights = dequantize(rest)
        x, (inputs, aux_losses) = _forward(run_layer, stack, run_embed(weights), per_layer, kept)
        loss, (grads, dx) = jax.value_and_grad(run_head, argnums=(0, 1))(weights, x)
        loss = sum((jnp.sum(losses) for losses in jax.tree.leaves(aux_losses)), loss)

        # What the embedding does not read is updated first, so that its gradient, a head's among them, is not
        # there during the walk.
        waiting = _read_by(run_embed, weights)
        ready = {path: grads.pop(path) for path in weights if path not in waiting}
        squares = _sum_of_squares(ready, optimizer.norm_dtype)
        done = optimizer.update({path: rest[path] for path in ready}, ready)
        dx, done, last = jax.lax.optimization_barrier((dx, done, indices[-1]))

        # A row is read from the stack as the write of the next one has left it: of one that is read before
        # it is written in an iteration, XLA for CPU makes a copy, as fusions may read it again later.
        def backward(carry: tuple[Any, ...], row: tuple[Any, ...]) -> tuple[Any, None]:
            (stack, states, stored, state, dx, squares), (index, constants, x) = carry, row
            x = _move(x, jax.memory.Space.Device) if offload_inputs else x
            (_, aux_loss), vjp = jax.vjp(
                lambda weights, x: run_layer(weights, x, constants), dequantize(stored), x
            )
            grads, dx = vjp((dx, jax.tree.map(jnp.ones_like, aux_loss)))
            new = optimizer.update(stored, grads, state, index)
            squares += _sum_of_squares(grads, squares.dtype)
            before = jnp.maximum(index - 1, 0)
            fetched = _fetch_after(new.params, stack, before)
            stack = _write(_after_fetch(stack, fetched), new.params, index)
            states = _write(states, {path: new.state[path] for path in states}, index)
            stored = _row_major(_rows(stack, fetched, before))
            state = _rows(states, _fetch(states, before), before)
            return (stack, states, stored, state, dx, squares), None

        stored = _row_major(_rows(stack, _fetch(stack, last), last))
        state = _rows(states, _fetch(states, last), last)
        walk = (stack, states, stored, state, dx, squares)
        (stack, states, _, _, dx, squares), _ = jax.lax.scan(
            backward, walk, (indices, per_layer, inputs), reverse=True
        )

        _, vjp = jax.vjp(lambda some: run_embed(weights | some), {path: weights[path] for path in waiting})
        grads = {path: grads[path] + grad for path, grad in vjp(dx)[0].items()}
        squares += _sum_of_squares(grads, squares.dtype)
        final = optimizer.update({path: rest[path] for path in waiting}, grads)
        return (
            optimizer.params_tree(stack | done.params | final.params),
            optimizer.state_tree(optimizer.state | done.state | final.state | states),
            LayerwiseMetrics(loss, jnp.sqrt(squares)),
        )

    return step


def layerwise_apply(
    embed: Callable[[Any, Any], Any],
    layer: Callable[[Any, Any, Any, Any], Any],
    head: Callable[[Any, Any, Any], Any],
    *,
    layers: str = "layers",
    has_aux_loss: bool = False,
) -> Callable[..., Any]:
    """The forward pass of :func:`layerwise_step` alone, to evaluate what it trains.

    Weights in int8 are dequantized, and those in host memory fetched, a layer at a time.

    Args:
      embed: as in :func:`layerwise_step`.
      layer: as there.
      head: as there, but it may return anything.
      layers: as there.
      has_aux_loss: as there; the losses are dropped.

    Returns:
      A pure function ``apply(params, batch, *, per_layer=None)`` that returns what `head` does.

    Raises:
      ValueError: as :func:`layerwise_step`, for a stack that is none.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> params = {"embed": jnp.ones((5, 8)), "layers": jnp.ones((3, 8, 8)), "head": jnp.ones((8, 1))}
      >>> apply = layerwise_apply(
      ...     lambda params, batch: params["embed"][batch],
      ...     lambda kernel, x, *_: x + jnp.tanh(x @ kernel),
      ...     lambda params, x, batch: x @ params["head"],
      ... )
      >>> apply(params, jnp.array([0, 3, 1])).shape
      (3, 1)
    """
    stack_path = _stack_path(layers)

    def apply(params: Any, batch: Any, *, per_layer: Any = None) -> Any:
        leaves = _leaves(params)
        structure = _structure(_subtree(params, stack_path))
        stack = {path: leaf for path, leaf in leaves.items() if path[: len(stack_path)] == stack_path}
        _depth(stack, per_layer)

        def run_layer(weights: Leaves, x: Any, constants: Any) -> tuple[Any, None]:
            one = [jax.lax.squeeze(weights[path], (0,)) for path in stack]
            out = layer(structure.unflatten(one), x, batch, constants)
            return (out[0] if has_aux_loss else out), None

        rest = dequantize(_without(params, stack_path))
        x, _ = _forward(run_layer, stack, embed(rest, batch), per_layer, lambda x, aux_loss: None)
        return head(rest, x, batch)

    return apply


def _forward(
    run_layer: Callable[[Leaves, Any, Any], tuple[Any, Any]],
    stack: Leaves,
    x: Any,
    per_layer: Any,
    kept: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """The walk through the stack; returns its end and what is `kept` of each layer's input and loss."""
    depth = _depth(stack, per_layer)

    def body(carry: tuple[Any, Leaves], row: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        (x, fetched), (index, constants) = carry, row
        weights = dequantize(_rows(stack, fetched, index))
        fetched = _fetch(stack, jnp.minimum(index + 1, depth - 1))
        y, aux_loss = run_layer(weights, x, constants)
        return (y, fetched), kept(x, aux_loss)

    (x, _), rows = jax.lax.scan(body, (x, _fetch(stack, 0)), (jnp.arange(depth), per_layer))
    return x, rows


class _New(NamedTuple):
    """What an update makes of some of the parameters."""

    params: Leaves
    state: Leaves  # Of these parameters, and what belongs to none.


class _Optimizer:
    """A transformation and its state, for some of the parameters at a time."""

    def __init__(
        self, tx: optax.GradientTransformationExtraArgs, params: Any, opt_state: Any, key: Any
    ) -> None:
        self.params = _leaves(params)
        self.state = _tree.leaves_by_path(opt_state)
        self.norm_dtype = jnp.result_type(jnp.float32, *(leaf.dtype for leaf in self.params.values()))
        self._tx, self._key = tx, key
        self._params_structure, self._state_structure = _structure(params), jax.tree.structure(opt_state)
        self._check_state()
        shared = _state.shared_state(tx.init, self.params_tree({}))
        owners = _state.owners(self.state, self.params, shared)
        self._owner = {path: owner.parameter for path, owner in owners.items()}
        quantized = [path for path, leaf in self.params.items() if _is_quantized(leaf)]
        if quantized and key is None:
            raise ValueError(
                f"'{_tree.show(quantized[0])}' is in int8, which updates smaller than its rounding step "
                "would never move; give the step a key=, a JAX key that differs from step to step, to round "
                "stochastically"
            )

    def _check_state(self) -> None:
        """Raises for a state of another optimizer, or of other parameters."""
        # Of shapes: dequantizing what is partly in host memory would mix memories.
        shapes = {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for path, leaf in self.params.items()}
        expected = jax.eval_shape(self._tx.init, self.params_tree(shapes))
        ours, theirs = (
            {path: jnp.shape(leaf) for path, leaf in leaves.items()}
            for leaves in (_tree.leaves_by_path(expected), self.state)
        )
        differing = [path for path in ours | theirs if ours.get(path) != theirs.get(path)]
        if differing:
            path = differing[0]
            there = f"has '{_tree.show(path)}' of shape {theirs[path]}" if path in theirs else "lacks it"
            expects = f"has '{_tree.show(path)}' of shape {ours[path]}" if path in ours else "lacks it"
            raise ValueError(
                f"opt_state is not tx.init(dequantize(params)): that {expects}, and this {there}; give the "
                "state of this optimizer and these parameters"
            )

    def params_tree(self, leaves: Leaves) -> Any:
        """The parameters' tree with these leaves, all others masked out."""
        return self._params_structure.unflatten(leaves.get(path, optax.MaskedNode()) for path in self.params)

    def state_tree(self, leaves: Leaves) -> Any:
        return self._state_structure.unflatten(leaves.get(path, optax.MaskedNode()) for path in self.state)

    def state_of(self, params: Iterable[_tree.Path]) -> Leaves:
        """What the state holds for these parameters, and what belongs to none, as a count."""
        owners = {None, *params}
        return {path: leaf for path, leaf in self.state.items() if self._owner[path] in owners}

    def update(self, params: Leaves, grads: Leaves, states: Leaves | None = None, index: Any = None) -> _New:
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
        return _New(_leaves(new_params), new_states)

    def layered_state(self, stack: Leaves, depth: int) -> Leaves:
        """What the state holds for each layer of the stack apart: leaves of `depth` rows.

        Raises:
          ValueError: where the state of one layer is no row of the state of all.
        """
        one = {path: jax.ShapeDtypeStruct((1, *leaf.shape[1:]), leaf.dtype) for path, leaf in stack.items()}
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
                raise self._inseparable(path, f"has shape {jnp.shape(leaf)}, and for one layer {expected}")
        return layered

    def _check_shared(self, params: Leaves, state: Any) -> None:
        """Raises for what belongs to no parameter and yet is computed from a layer's gradient."""

        def update(grads: Any, params: Any, state: Any) -> Leaves:
            return _tree.leaves_by_path(self._tx.update(grads, state, params, batch_index=0)[1])

        tree = self.params_tree(params)
        after = jax.eval_shape(update, tree, tree, state)
        jaxpr = jax.make_jaxpr(update)(tree, tree, state).jaxpr
        computed = _computed_from(jaxpr, [i < 2 * len(params) for i in range(len(jaxpr.invars))])
        for path, from_gradients in zip(sorted(after), computed, strict=True):
            if self._owner[path] is None and from_gradients:
                raise self._inseparable(path, "is computed from the gradients of all layers")

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
                raise self._inseparable(path, f"has shape {jnp.shape(leaf)}, without an axis of layers")

    def _inseparable(self, path: _tree.Path, reason: str) -> ValueError:
        return ValueError(
            f"'{_tree.show(path)}' of the optimizer's state {reason}, so the optimizer does not treat the "
            "layers of a stacked leaf separately; take one that does, name the layers' axis as a batch axis "
            "(weight_dimension_numbers), or take the ordinary step"
        )


def _is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def _leaves(params: Any) -> Leaves:
    return _tree.leaves_by_path(params, is_leaf=_is_quantized)


def _structure(params: Any) -> Any:
    return jax.tree.structure(params, is_leaf=_is_quantized)


def _subtree(tree: Any, path: _tree.Path) -> Any:
    for i, name in enumerate(path):
        if not isinstance(tree, Mapping) or name not in tree:
            there = f"it has {sorted(map(str, tree))}" if isinstance(tree, Mapping) else f"it is {type(tree)}"
            raise ValueError(
                f"params have no '{name}' at '{_tree.show(path[:i])}' ({there}); give layers= the place of "
                "the stack in nested dictionaries, as 'decoder/layers'"
            )
        tree = tree[name]
    return tree


def _without(tree: Any, path: _tree.Path) -> Any:
    """A tree of nested dictionaries without what is at `path`."""
    name, rest = path[0], path[1:]
    kept = {key: value for key, value in tree.items() if rest or key != name}
    return kept | ({name: _without(tree[name], rest)} if rest else {})


def _stack_path(layers: Any) -> _tree.Path:
    if not isinstance(layers, str):
        raise TypeError(f"layers must be a string, as 'decoder/layers', got {layers!r}")
    return tuple(layers.split("/"))


def _depth(stack: Leaves, per_layer: Any) -> int:
    for path, leaf in stack.items():
        if _is_quantized(leaf) and any(part.shape[:1] != leaf.shape[:1] for part in jax.tree.leaves(leaf)):
            raise ValueError(
                f"'{_tree.show(path)}' is quantized along its axis of layers; give quantize another axis="
            )
    sizes = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in stack.items()}
    if not sizes or None in sizes.values() or len(set(sizes.values())) > 1 or 0 in sizes.values():
        shapes = {_tree.show(path): tuple(leaf.shape) for path, leaf in stack.items()}
        raise ValueError(
            f"every leaf of the stack must have the number of layers as its leading axis, got {shapes}"
        )
    depth = next(iter(stack.values())).shape[0]
    if any(jnp.shape(leaf)[:1] != (depth,) for leaf in jax.tree.leaves(per_layer)):
        raise ValueError(
            f"every leaf of per_layer must have the number of layers, {depth}, as its leading axis, got "
            f"{jax.tree.map(jnp.shape, per_layer)}"
        )
    return depth


def _read_by(function: Callable[[Leaves], Any], leaves: Leaves) -> list[_tree.Path]:
    """Which of its arguments a function reads."""
    jaxpr = jax.make_jaxpr(function)(leaves).jaxpr
    read = {id(var) for eqn in jaxpr.eqns for var in eqn.invars} | {id(var) for var in jaxpr.outvars}
    # As JAX flattens a dictionary.
    return [path for path, var in zip(sorted(leaves), jaxpr.invars, strict=True) if id(var) in read]


def _computed_from(jaxpr: Any, inputs: Sequence[bool]) -> list[bool]:
    """Which outputs of a program are computed from some of its inputs; loops count as one operation."""
    reached = {id(var) for var, is_input in zip(jaxpr.invars, inputs, strict=True) if is_input}
    for eqn in jaxpr.eqns:
        read = [id(var) in reached for var in eqn.invars]
        outputs = [any(read)] * len(eqn.outvars)
        if eqn.primitive.name in ("jit", "pjit"):
            outputs = _computed_from(eqn.params["jaxpr"].jaxpr, read)
        elif eqn.primitive.name == "cond" and not read[0]:
            branches = (_computed_from(branch.jaxpr, read[1:]) for branch in eqn.params["branches"])
            outputs = list(map(any, zip(*branches, strict=True)))
        reached.update(id(var) for var, is_reached in zip(eqn.outvars, outputs, strict=True) if is_reached)
    return [id(var) in reached for var in jaxpr.outvars]


def _in_host_memory(array: jax.Array) -> bool:
    return jax.typeof(array).memory_space == jax.memory.Space.Host


def _move(tree: Any, space: Any) -> Any:
    return jax.tree.map(lambda x: jax.device_put(x, space), tree)


def _slice(array: jax.Array, index: jax.typing.ArrayLike) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(array, index, 1)


def _fetch(stack: Any, index: jax.typing.ArrayLike) -> Any:
    """Row `index`, ``(1, ...)``, of what is in host memory; None in place of what is on the device."""

    def fetch(array: jax.Array) -> jax.Array | None:
        return _move(_slice(array, index), jax.memory.Space.Device) if _in_host_memory(array) else None

    return jax.tree.map(fetch, stack)


def _fetch_after(new: Leaves, stack: Leaves, index: jax.Array) -> Leaves:
    """:func:`_fetch`, each leaf as soon as its `new` row is there and can give up its memory."""
    when = {path: jax.lax.optimization_barrier((index, leaf))[0] for path, leaf in new.items()}
    return {path: _fetch(leaf, when[path]) for path, leaf in stack.items()}


def _after_fetch(stack: Leaves, fetched: Leaves) -> Leaves:
    """`stack`, of which no leaf in host memory is written before its row is `fetched`.

    Without this order XLA for GPUs copies the whole stack, so that it can do both at once.
    """

    def after(array: jax.Array, row: jax.Array | None) -> jax.Array:
        return array if row is None else jax.lax.optimization_barrier((array, row))[0]

    return {path: jax.tree.map(after, leaf, fetched[path]) for path, leaf in stack.items()}


def _rows(stack: Any, fetched: Any, index: jax.typing.ArrayLike) -> Any:
    """Row `index` of the stack, ``(1, ...)``, where what :func:`_fetch` brought is taken as it is."""
    return jax.tree.map(lambda array, row: _slice(array, index) if row is None else row, stack, fetched)


def _row_major(rows: Any) -> Any:
    """Keeps XLA from giving a row the layout that the next product wants, and with it the whole stack."""

    def constrained(row: jax.Array) -> jax.Array:
        return with_layout_constraint(row, Layout(tuple(range(row.ndim))))

    return jax.tree.map(constrained, rows)


def _write(stack: Any, rows: Any, index: jax.typing.ArrayLike) -> Any:
    """The stack with row `index` replaced, in the memory where it is."""

    def write(array: jax.Array, row: jax.Array) -> jax.Array:
        row = _move(row, jax.memory.Space.Host) if _in_host_memory(array) else row
        return jax.lax.dynamic_update_slice_in_dim(array, row, index, 0)

    return jax.tree.map(write, stack, rows)


def _sum_of_squares(grads: Any, dtype: Any) -> jax.Array:
    squares = (jnp.sum(jnp.square(grad.astype(dtype))) for grad in jax.tree.leaves(grads))
    return sum(squares, jnp.zeros((), dtype))

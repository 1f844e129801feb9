"""The update fused into the backward pass, a layer at a time.

For a model that is an embedding, a stack of identical layers and a head. The stack is run forward
keeping each layer's input, then walked backward: compute the layer again, take its gradient, update its
weights and its optimizer state in place, drop the gradient. There are never gradients of two layers, and
weights in host memory are on the device a layer at a time.

No optimizer is written here: every layer goes through ``tx.update`` as a tree of the parameters'
structure in which all other leaves are masked out, as :func:`optax.masked` does it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _stack_rows, _tree
from apollo_optax._layerwise_state import (
    Leaves,
    PartialOptimizer,
    leaves_of,
    structure_of,
)
from apollo_optax._quantization import dequantize, is_quantized

RunLayer = Callable[[Leaves, Any, Any], tuple[Any, Any]]


class LayerwiseMetrics(NamedTuple):
    """What a layer-wise step tells beside the new parameters and state; scalars."""

    loss: jax.Array  # Before the step, with the layers' auxiliary losses.
    grad_norm: (
        jax.Array
    )  # Euclidean, over all parameters; known only when all are updated.


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
        params: Any,
        opt_state: Any,
        batch: Any,
        *,
        key: Any = None,
        per_layer: Any = None,
    ) -> tuple[Any, Any, LayerwiseMetrics]:
        optimizer = PartialOptimizer(tx, params, opt_state, key)
        structure = structure_of(_subtree(params, stack_path))
        stack = _under(optimizer.params, stack_path)

        def outside_stack(weights: Leaves) -> Any:
            return _without(optimizer.params_tree(weights), stack_path)

        model = _Model(
            embed=lambda weights: embed(outside_stack(weights), batch),
            layer=_on_rows(layer, structure, list(stack), batch, has_aux_loss),
            head=lambda weights, x: head(outside_stack(weights), x, batch),
            stack=stack,
            per_layer=per_layer,
            offload_inputs=offload_inputs,
        )
        return _train_step(model, optimizer)

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
        leaves = leaves_of(params)
        structure = structure_of(_subtree(params, stack_path))
        stack = _under(leaves, stack_path)
        _depth(stack, per_layer)
        run_layer = _on_rows(layer, structure, list(stack), batch, has_aux_loss)
        rest = dequantize(_without(params, stack_path))
        x = embed(rest, batch)
        x, _ = _forward(run_layer, stack, x, per_layer, lambda x, aux_loss: None)
        return head(rest, x, batch)

    return apply


class _Model(NamedTuple):
    """The caller's functions bound to one batch, and the stack that they walk through."""

    embed: Callable[[Leaves], Any]  # Takes the leaves outside of the stack.
    layer: RunLayer
    head: Callable[[Leaves, Any], jax.Array]  # Takes the leaves outside of the stack.
    stack: Leaves
    per_layer: Any
    offload_inputs: bool


class _Walk(NamedTuple):
    """What the walk backward hands from a layer to the one before it."""

    stack: Leaves
    states: Leaves
    row: Leaves
    row_state: Leaves
    dx: Any
    squares: jax.Array


def _on_rows(
    layer: Callable[[Any, Any, Any, Any], Any],
    structure: Any,
    paths: list[_tree.Path],
    batch: Any,
    has_aux_loss: bool,
) -> RunLayer:
    """`layer` as a function of rows ``(1, ...)`` of the stack by path; its loss is None if it has none."""

    def run(rows: Leaves, x: Any, constants: Any) -> tuple[Any, Any]:
        params = structure.unflatten(
            [jax.lax.squeeze(rows[path], (0,)) for path in paths]
        )
        out = layer(params, x, batch, constants)
        return out if has_aux_loss else (out, None)

    return run


def _train_step(
    model: _Model, optimizer: PartialOptimizer
) -> tuple[Any, Any, LayerwiseMetrics]:
    """One step: forward through the model, then backward, updating the parameters on the way."""
    depth = _depth(model.stack, model.per_layer)
    states = optimizer.layered_state(model.stack, depth)
    rest = {
        path: leaf for path, leaf in optimizer.params.items() if path not in model.stack
    }
    indices = jnp.arange(depth)
    weights = dequantize(rest)

    def keep(x: Any, aux_loss: Any) -> tuple[Any, Any]:
        return (
            _stack_rows.move(x, jax.memory.Space.Host) if model.offload_inputs else x
        ), aux_loss

    x = model.embed(weights)
    x, (inputs, aux_losses) = _forward(
        model.layer, model.stack, x, model.per_layer, keep
    )
    loss, (grads, dx) = jax.value_and_grad(model.head, argnums=(0, 1))(weights, x)
    loss = sum((jnp.sum(losses) for losses in jax.tree.leaves(aux_losses)), loss)

    # What the embedding does not read is updated first, so that its gradient, a head's among them, is not
    # there during the walk.
    waiting = _read_by(model.embed, weights)
    ready = {path: grads.pop(path) for path in weights if path not in waiting}
    squares = _sum_of_squares(ready, optimizer.norm_dtype)
    done = optimizer.update({path: rest[path] for path in ready}, ready)
    dx, done, last = jax.lax.optimization_barrier((dx, done, indices[-1]))

    walk = _start_walk(model.stack, states, dx, squares, last)
    walk = _backward(model, optimizer, walk, (indices, model.per_layer, inputs))

    read = {path: weights[path] for path in waiting}
    _, vjp = jax.vjp(lambda read: model.embed(weights | read), read)
    grads = {path: grads[path] + grad for path, grad in vjp(walk.dx)[0].items()}
    squares = walk.squares + _sum_of_squares(grads, walk.squares.dtype)
    final = optimizer.update({path: rest[path] for path in waiting}, grads)
    return (
        optimizer.params_tree(walk.stack | done.params | final.params),
        optimizer.state_tree(optimizer.state | done.state | final.state | walk.states),
        LayerwiseMetrics(loss, jnp.sqrt(squares)),
    )


def _forward(
    run_layer: RunLayer,
    stack: Leaves,
    x: Any,
    per_layer: Any,
    kept: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """The walk through the stack; returns its end and what is `kept` of each layer's input and loss."""
    depth = _depth(stack, per_layer)

    def body(carry: tuple[Any, Leaves], row: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        (x, fetched), (index, constants) = carry, row
        weights = dequantize(_stack_rows.read_row(stack, fetched, index))
        fetched = _stack_rows.fetch_row(stack, jnp.minimum(index + 1, depth - 1))
        y, aux_loss = run_layer(weights, x, constants)
        return (y, fetched), kept(x, aux_loss)

    (x, _), rows = jax.lax.scan(
        body, (x, _stack_rows.fetch_row(stack, 0)), (jnp.arange(depth), per_layer)
    )
    return x, rows


def _start_walk(
    stack: Leaves, states: Leaves, dx: Any, squares: jax.Array, last: jax.Array
) -> _Walk:
    """The walk before its first layer, which is the `last` of the stack."""
    row = _stack_rows.read_row(stack, _stack_rows.fetch_row(stack, last), last)
    row = _stack_rows.keep_row_major(row)
    row_state = _stack_rows.read_row(states, _stack_rows.fetch_row(states, last), last)
    return _Walk(stack, states, row, row_state, dx, squares)


def _backward(
    model: _Model,
    optimizer: PartialOptimizer,
    walk: _Walk,
    rows: tuple[jax.Array, Any, Any],
) -> _Walk:
    """Walks from the last layer to the first: computes a layer again, takes its gradient, updates it."""

    # A row is read from the stack as the write of the next one has left it: of one that is read before
    # it is written in an iteration, XLA for CPU makes a copy, as fusions may read it again later.
    def body(walk: _Walk, row: tuple[jax.Array, Any, Any]) -> tuple[_Walk, None]:
        index, constants, x = row
        x = _stack_rows.move(x, jax.memory.Space.Device) if model.offload_inputs else x
        (_, aux_loss), vjp = jax.vjp(
            lambda weights, x: model.layer(weights, x, constants),
            dequantize(walk.row),
            x,
        )
        grads, dx = vjp((walk.dx, jax.tree.map(jnp.ones_like, aux_loss)))
        new = optimizer.update(walk.row, grads, walk.row_state, index)
        squares = walk.squares + _sum_of_squares(grads, walk.squares.dtype)

        before = jnp.maximum(index - 1, 0)
        fetched = _stack_rows.fetch_row_after(new.params, walk.stack, before)
        stack = _stack_rows.delay_until_fetched(walk.stack, fetched)
        stack = _stack_rows.write_row(stack, new.params, index)
        new_state = {path: new.state[path] for path in walk.states}
        states = _stack_rows.write_row(walk.states, new_state, index)
        next_row = _stack_rows.keep_row_major(
            _stack_rows.read_row(stack, fetched, before)
        )
        next_state = _stack_rows.fetch_row(states, before)
        next_state = _stack_rows.read_row(states, next_state, before)
        return _Walk(stack, states, next_row, next_state, dx, squares), None

    walk, _ = jax.lax.scan(body, walk, rows, reverse=True)
    return walk


def _under(leaves: Leaves, path: _tree.Path) -> Leaves:
    """The leaves whose paths start with `path`."""
    return {name: leaf for name, leaf in leaves.items() if name[: len(path)] == path}


def _subtree(tree: Any, path: _tree.Path) -> Any:
    for i, name in enumerate(path):
        if not isinstance(tree, Mapping) or name not in tree:
            there = (
                f"it has {sorted(map(str, tree))}"
                if isinstance(tree, Mapping)
                else f"it is {type(tree)}"
            )
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
        if is_quantized(leaf) and any(
            part.shape[:1] != leaf.shape[:1] for part in jax.tree.leaves(leaf)
        ):
            raise ValueError(
                f"'{_tree.show(path)}' is quantized along its axis of layers; give quantize another axis="
            )
    sizes = {path: leaf.shape[0] if leaf.ndim else None for path, leaf in stack.items()}
    if (
        not sizes
        or None in sizes.values()
        or len(set(sizes.values())) > 1
        or 0 in sizes.values()
    ):
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
    read = {id(var) for eqn in jaxpr.eqns for var in eqn.invars} | {
        id(var) for var in jaxpr.outvars
    }
    # As JAX flattens a dictionary.
    return [
        path
        for path, var in zip(sorted(leaves), jaxpr.invars, strict=True)
        if id(var) in read
    ]


def _sum_of_squares(grads: Any, dtype: Any) -> jax.Array:
    squares = (
        jnp.sum(jnp.square(grad.astype(dtype))) for grad in jax.tree.leaves(grads)
    )
    return sum(squares, jnp.zeros((), dtype))

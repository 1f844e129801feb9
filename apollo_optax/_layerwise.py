"""A training step that updates each layer as soon as its gradient is known.

The model is an embedding, a stack of identical layers and a head. The step runs the
stack forward and keeps each layer's input. Then it walks backward. For each layer it
computes the layer again, takes its gradient, updates its weights and optimizer state in
place, and drops the gradient. Gradients of two layers never exist at the same time, and
weights in host memory are copied to the device one layer at a time.

This module contains no optimizer. Every layer goes through ``tx.update`` as a tree of
the parameters' structure in which all other leaves are masked out, as by
:func:`optax.masked`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from apollo_optax import _check, _tree
from apollo_optax._layerwise_state import (
    Leaves,
    PartialOptimizer,
    depends_on,
    leaves_of,
    structure_of,
)
from apollo_optax._quantization import dequantize, is_quantized
from apollo_optax._stack_rows import (
    delay_until_fetched,
    fetch_row,
    fetch_row_after,
    keep_row_major,
    read_row,
    to_device,
    to_host,
    write_row,
)

# (rows of one layer, x, constants) -> (x, auxiliary loss or None)
RunLayer = Callable[[Leaves, Any, Any], tuple[Any, Any]]


class LayerwiseMetrics(NamedTuple):
    """Scalars that a layer-wise step returns besides the new parameters and state.

    Attributes:
      loss: the loss before the update, including the layers' auxiliary losses.
      grad_norm: the Euclidean norm of the gradients of all parameters. It is known only
        once all parameters are updated, so an optimizer can't clip by it.
    """

    loss: jax.Array
    grad_norm: jax.Array


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
    """Builds a training step that never stores the gradients of more than one layer.

    The step computes the same numbers as the ordinary step (gradients of the whole
    model, ``tx.update``, ``optax.apply_updates``), up to rounding, and exactly the same
    optimizer state tree. A run may therefore switch between the two at any step. Peak
    memory: the weights, the optimizer state, every layer's input, and the gradients and
    activations of a single layer.

    A model is three pure functions. Below, `params` are the parameters without the
    stack, and `layer_params` are one layer of the stack: its leaves without their
    leading axis. Activations `x` are a floating-point array or a tree of such arrays.
    Every layer returns the shapes and dtypes that it was given.

    Args:
      embed: ``(params, batch) -> x``.
      layer: ``(layer_params, x, batch, constants) -> x``, or ``-> (x, loss)`` with
        `has_aux_loss`. Wrapped in ``jax.checkpoint``, it keeps fewer activations while
        its gradient is taken. XLA may postpone the gradients of a layer's weights to
        their updates and keep the activations they need until then, which matters with
        large batches. A barrier on the gradients between the layer's parts keeps them
        in order (``gradient_barrier`` in ``examples/llama/model.py``).
      head: ``(params, x, batch) -> loss``, a scalar. A tied embedding is a parameter
        that both `embed` and `head` read. It is updated once, with the sum of both
        gradients.
      tx: any Optax transformation that treats leaves, and the layers of a stacked leaf,
        separately. The layers of a leaf come to its ``update`` one by one, as
        ``(1, ...)`` slices, with the layer's number as the extra argument
        `batch_index`. A transformation of this library is rejected if its dimension
        numbers make the layers' axis a part of a matrix, also for stacked vectors. Any
        other transformation that mixes layers is rejected if its state shows it:
        ``MultiSteps``, ``apply_if_finite``, the factored moments of
        ``optax.adafactor``. These others compute different updates
        **without an error**: ``clip_by_global_norm``, ``adaptive_grad_clip``,
        ``clip_by_block_rms``, ``scale_by_param_block_norm``,
        ``scale_by_param_block_rms``, ``scale_by_trust_ratio`` and
        ``normalize_by_update_norm``, which take norms over a whole leaf or tree;
        ``optax.contrib.muon``, unless its dimension numbers exclude the layers' axis
        from every matrix; ``add_noise``, which gives every layer the same noise. The
        norm-growth limiter of :func:`scale_by_apollo` replaces clipping and acts on
        each layer alone.
      layers: the path of the stack in the parameters, such as ``"layers"`` or
        ``"decoder/layers"``. The leading axis of every leaf in it is the number of
        layers.
      has_aux_loss: whether layers return a pair of the activations and an auxiliary
        loss, a scalar that is added to the head's loss.
      offload_inputs: whether to keep the layers' inputs in host memory between the
        forward and the backward walk.

    Returns:
      A pure function ``step(params, opt_state, batch, *, key=None, per_layer=None)``
      that returns the new parameters, the new state and :class:`LayerwiseMetrics`.
      Compile it with ``jax.jit`` and donate the first two arguments
      (``donate_argnums=(0, 1)``); without donation nothing is updated in place.

      * `params` are nested dictionaries. Any leaf may be a :class:`QuantizedArray`.
        Leaves of the stack that are in host memory (``memory_kind="pinned_host"``) stay
        there: each layer is fetched while the previous one is computed, and is written
        back.
      * `opt_state` is ``tx.init(dequantize(params))``.
      * `key` is a JAX key, a different one for each step. With it, bfloat16 weights are
        rounded stochastically (see :func:`apply_updates_stochastic`). Without it, they
        are rounded to nearest. Weights in int8 require it.
      * `per_layer` is a tree of arrays whose leading axis is the number of layers. Each
        layer gets its own row as `constants`. Use it for window sizes or dropout keys
        (``jax.random.split(key, L)``), for example.

    Raises:
      TypeError: if `layers` is not a string.
      ValueError: from the step, if there is no stack at `layers`, if the leading axes
        of its leaves or of those of `per_layer` differ, if `opt_state` is not the state
        of `tx` for these parameters, if the optimizer's state for a stacked leaf can't
        be split by layer, if dimension numbers make the layers' axis a part of a
        matrix, if the optimizer changes the dtype of its state, or if weights are in
        int8 and there is no `key`.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> from apollo_optax import ApolloDimensionNumbers, apollo_mini, layerwise_step
      >>> stacked = ApolloDimensionNumbers(1, 2)
      >>> numbers = {"embed": None, "layers": stacked, "head": None}
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
      >>> shapes = {"embed": (5, 8), "layers": (3, 8, 8), "head": (8, 1)}
      >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
      >>> opt_state = tx.init(params)
      >>> params, opt_state, metrics = step(params, opt_state, jnp.array([0, 3, 1]))
      >>> metrics.loss.shape
      ()

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited
      Resources <https://arxiv.org/abs/2306.09782>`_, 2023 (the fused update, for SGD)
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
        stack, rest = _split(optimizer.params, stack_path)

        def outside_stack(weights: Leaves) -> Any:
            return _without(optimizer.params_tree(weights), stack_path)

        model = _Model(
            embed=lambda weights: embed(outside_stack(weights), batch),
            layer=_on_rows(layer, structure, list(stack), batch, has_aux_loss),
            head=lambda weights, x: head(outside_stack(weights), x, batch),
            stack=stack,
            rest=rest,
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
    """Builds only the forward pass of :func:`layerwise_step`, for evaluation.

    Layers are dequantized, and fetched from host memory, one at a time.

    Args:
      embed: as in :func:`layerwise_step`.
      layer: as in :func:`layerwise_step`.
      head: as in :func:`layerwise_step`, but it may return any tree.
      layers: as in :func:`layerwise_step`.
      has_aux_loss: as in :func:`layerwise_step`; the auxiliary losses are dropped.

    Returns:
      A pure function ``apply(params, batch, *, per_layer=None)`` that returns what
      `head` returns.

    Raises:
      TypeError: if `layers` is not a string.
      ValueError: from ``apply``, if there is no stack at `layers`, or if the leading
        axes of its leaves or of those of `per_layer` differ.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> shapes = {"embed": (5, 8), "layers": (3, 8, 8), "head": (8, 1)}
      >>> params = {name: jnp.ones(shape) for name, shape in shapes.items()}
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
        stack, _ = _split(leaves, stack_path)
        _check_depth(stack, per_layer)
        run_layer = _on_rows(layer, structure, list(stack), batch, has_aux_loss)
        rest = dequantize(_without(params, stack_path))
        x = embed(rest, batch)
        x, _ = _walk_forward(run_layer, stack, x, per_layer, lambda x, aux_loss: None)
        return head(rest, x, batch)

    return apply


class _Model(NamedTuple):
    """The caller's functions bound to one batch, and the parameters they run on."""

    embed: Callable[[Leaves], Any]  # Takes `rest`, dequantized.
    layer: RunLayer
    head: Callable[[Leaves, Any], jax.Array]  # Takes `rest`, dequantized, and x.
    stack: Leaves  # The leaves of the stack, ``(L, ...)``.
    rest: Leaves  # All other leaves.
    per_layer: Any
    offload_inputs: bool


class _BackwardWalk(NamedTuple):
    """What one iteration of the backward walk passes to the next, the layer before."""

    stack: Leaves  # The parameters of all layers, ``(L, ...)``.
    states: Leaves  # The optimizer state of all layers, ``(L, ...)``.
    row: Leaves  # The parameters of this layer, ``(1, ...)``.
    row_state: Leaves  # The optimizer state of this layer, ``(1, ...)``.
    dx: Any  # The gradient with respect to this layer's output.
    squares: jax.Array  # The sum of squares of all gradients so far.


def _on_rows(
    layer: Callable[[Any, Any, Any, Any], Any],
    structure: Any,
    paths: list[_tree.Path],
    batch: Any,
    has_aux_loss: bool,
) -> RunLayer:
    """Turns `layer` into a function of rows ``(1, ...)`` of the stack, by path.

    JAX sorts the keys of dictionaries, so `paths` gives the leaves' order in
    `structure`.
    """

    def run(rows: Leaves, x: Any, constants: Any) -> tuple[Any, Any]:
        leaves = [jax.lax.squeeze(rows[path], (0,)) for path in paths]
        out = layer(structure.unflatten(leaves), x, batch, constants)
        _check.layer_output(out, x, has_aux_loss)
        return out if has_aux_loss else (out, None)

    return run


def _train_step(
    model: _Model, optimizer: PartialOptimizer
) -> tuple[Any, Any, LayerwiseMetrics]:
    """Runs the model forward, then backward, and updates each leaf on the way."""
    depth = _check_depth(model.stack, model.per_layer)
    states = optimizer.stacked_state(model.stack, depth)
    indices = jnp.arange(depth)
    weights = dequantize(model.rest)

    def keep(x: Any, aux_loss: Any) -> tuple[Any, Any]:
        return to_host(x) if model.offload_inputs else x, aux_loss

    x = model.embed(weights)
    x, kept = _walk_forward(model.layer, model.stack, x, model.per_layer, keep)
    inputs, aux_losses = kept
    loss, (grads, dx) = jax.value_and_grad(model.head, argnums=(0, 1))(weights, x)
    loss = sum((jnp.sum(losses) for losses in jax.tree.leaves(aux_losses)), loss)

    # Update the leaves that the embedding does not read, such as the head, before the
    # backward walk. Otherwise their gradients would be in memory during the walk.
    waiting = _read_by(model.embed, weights)
    ready = {path: grads.pop(path) for path in weights if path not in waiting}
    squares = _sum_of_squares(ready, optimizer.norm_dtype)
    done = optimizer.update({path: model.rest[path] for path in ready}, ready)
    dx, done, last = jax.lax.optimization_barrier((dx, done, indices[-1]))

    walk = _start_backward(model.stack, states, dx, squares, last)
    walk = _walk_backward(model, optimizer, walk, (indices, model.per_layer, inputs))

    # The embedding's own gradient is complete only now.
    read = {path: weights[path] for path in waiting}
    _, vjp = jax.vjp(lambda read: model.embed(weights | read), read)
    grads = {path: grads[path] + grad for path, grad in vjp(walk.dx)[0].items()}
    squares = walk.squares + _sum_of_squares(grads, walk.squares.dtype)
    final = optimizer.update({path: model.rest[path] for path in waiting}, grads)
    return (
        optimizer.params_tree(walk.stack | done.params | final.params),
        optimizer.state_tree(optimizer.state | done.state | final.state | walk.states),
        LayerwiseMetrics(loss, jnp.sqrt(squares)),
    )


def _walk_forward(
    run_layer: RunLayer,
    stack: Leaves,
    x: Any,
    per_layer: Any,
    keep: Callable[[Any, Any], Any],
) -> tuple[Any, Any]:
    """Runs all layers; returns x and, stacked, ``keep(input, aux_loss)`` of each."""
    depth = _check_depth(stack, per_layer)

    def body(carry: tuple[Any, Leaves], row: tuple[jax.Array, Any]) -> tuple[Any, Any]:
        (x, fetched), (index, constants) = carry, row
        weights = dequantize(read_row(stack, fetched, index))
        # Fetch the next layer now, so that the copy overlaps with this layer's work.
        fetched = fetch_row(stack, jnp.minimum(index + 1, depth - 1))
        y, aux_loss = run_layer(weights, x, constants)
        return (y, fetched), keep(x, aux_loss)

    start = (x, fetch_row(stack, 0))
    (x, _), kept = jax.lax.scan(body, start, (jnp.arange(depth), per_layer))
    return x, kept


def _start_backward(
    stack: Leaves, states: Leaves, dx: Any, squares: jax.Array, last: jax.Array
) -> _BackwardWalk:
    """The walk before its first iteration, which is for the `last` layer."""
    row = keep_row_major(read_row(stack, fetch_row(stack, last), last))
    row_state = read_row(states, fetch_row(states, last), last)
    return _BackwardWalk(stack, states, row, row_state, dx, squares)


def _walk_backward(
    model: _Model,
    optimizer: PartialOptimizer,
    walk: _BackwardWalk,
    rows: tuple[jax.Array, Any, Any],
) -> _BackwardWalk:
    """Takes the gradient of each layer and updates it, from the last to the first.

    Args:
      model: the model.
      optimizer: the optimizer of all parameters.
      walk: from :func:`_start_backward`.
      rows: for each layer its index, its row of `per_layer` and its input.
    """

    def body(
        walk: _BackwardWalk, row: tuple[jax.Array, Any, Any]
    ) -> tuple[_BackwardWalk, None]:
        index, constants, x = row
        x = to_device(x) if model.offload_inputs else x

        def run(weights: Leaves, x: Any) -> tuple[Any, Any]:
            return model.layer(weights, x, constants)

        (_, aux_loss), vjp = jax.vjp(run, dequantize(walk.row), x)
        grads, dx = vjp((walk.dx, jax.tree.map(jnp.ones_like, aux_loss)))
        new = optimizer.update(walk.row, grads, walk.row_state, index)
        squares = walk.squares + _sum_of_squares(grads, walk.squares.dtype)

        # Read the next row only after this write to the stack. If a row were read and
        # then written in the same iteration, XLA:CPU would copy the stack, because
        # fusions may read the row again later.
        before = jnp.maximum(index - 1, 0)
        fetched = fetch_row_after(new.params, walk.stack, before)
        stack = delay_until_fetched(walk.stack, fetched)
        stack = write_row(stack, new.params, index)
        new_states = {path: new.state[path] for path in walk.states}
        states = write_row(walk.states, new_states, index)
        row_before = keep_row_major(read_row(stack, fetched, before))
        state_before = read_row(states, fetch_row(states, before), before)
        walk = _BackwardWalk(stack, states, row_before, state_before, dx, squares)
        return walk, None

    walk, _ = jax.lax.scan(body, walk, rows, reverse=True)
    return walk


def _split(leaves: Leaves, stack_path: _tree.Path) -> tuple[Leaves, Leaves]:
    """Splits leaves into those under `stack_path` and all others."""
    size = len(stack_path)
    stack = {path: leaf for path, leaf in leaves.items() if path[:size] == stack_path}
    return stack, {path: leaf for path, leaf in leaves.items() if path not in stack}


def _subtree(tree: Any, path: _tree.Path) -> Any:
    for i, name in enumerate(path):
        is_mapping = isinstance(tree, Mapping)
        if not is_mapping or name not in tree:
            keys = sorted(map(str, tree)) if is_mapping else []
            found = f"it has {keys}" if is_mapping else f"it is {type(tree)}"
            raise ValueError(
                f"params have no '{name}' at '{_tree.show(path[:i])}' ({found}); give "
                "layers= the path of the stack in nested dictionaries, such as "
                "'decoder/layers'"
            )
        tree = tree[name]
    return tree


def _without(tree: Any, path: _tree.Path) -> Any:
    """Copies nested dictionaries, leaving out the subtree at `path`."""
    name, rest = path[0], path[1:]
    kept = {key: value for key, value in tree.items() if rest or key != name}
    return kept | ({name: _without(tree[name], rest)} if rest else {})


def _stack_path(layers: Any) -> _tree.Path:
    if not isinstance(layers, str):
        raise TypeError(
            f"layers must be a string such as 'decoder/layers', got {layers!r}"
        )
    return tuple(layers.split("/"))


def _check_depth(stack: Leaves, per_layer: Any) -> int:
    """Returns the number of layers, after checking that all leaves agree on it."""
    for path, leaf in stack.items():
        if is_quantized(leaf):
            parts = jax.tree.leaves(leaf)
            if any(part.shape[:1] != leaf.shape[:1] for part in parts):
                raise ValueError(
                    f"'{_tree.show(path)}' is quantized along its axis of layers; "
                    "give quantize another axis="
                )
    sizes = {leaf.shape[0] if leaf.ndim else 0 for leaf in stack.values()}
    if len(sizes) != 1 or 0 in sizes:
        shapes = {_tree.show(path): tuple(leaf.shape) for path, leaf in stack.items()}
        raise ValueError(
            "every leaf of the stack must have the number of layers as its leading "
            f"axis, got {shapes}"
        )
    (depth,) = sizes
    if any(jnp.shape(leaf)[:1] != (depth,) for leaf in jax.tree.leaves(per_layer)):
        raise ValueError(
            f"every leaf of per_layer must have the number of layers, {depth}, as its "
            f"leading axis, got {jax.tree.map(jnp.shape, per_layer)}"
        )
    return depth


def _read_by(function: Callable[[Leaves], Any], leaves: Leaves) -> list[_tree.Path]:
    """The paths of the leaves that the outputs of `function` depend on."""
    jaxpr = jax.make_jaxpr(function)(leaves).jaxpr
    # JAX flattens a dictionary in the order of its sorted keys.
    paths = sorted(leaves)
    return [
        path
        for path in paths
        if any(depends_on(jaxpr, [other == path for other in paths]))
    ]


def _sum_of_squares(grads: Any, dtype: Any) -> jax.Array:
    leaves = jax.tree.leaves(grads)
    squares = (jnp.sum(jnp.square(grad.astype(dtype))) for grad in leaves)
    return sum(squares, jnp.zeros((), dtype))

"""Models for the tests of the layer-wise step, and the ordinary step for comparison."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    LayerwiseMetrics,
    apply_updates_stochastic,
    dequantize,
    dimension_numbers_by_path,
    layerwise_apply,
    layerwise_step,
    quantize,
)

STACKED = ApolloDimensionNumbers(1, 2)
NUMBERS = dimension_numbers_by_path(
    [
        (r"layers/experts/", ApolloDimensionNumbers(2, 3)),  # (L, E, in, out)
        # (L, in, heads, head size)
        (r"layers/attention/", ApolloDimensionNumbers(1, (2, 3))),
        (r"layers/.*kernel$", STACKED),
    ]
)
# With a gap of two steps, a few steps draw several projections.
GAP = {"update_proj_gap": 2, "weight_dimension_numbers": NUMBERS}
V, D, F, L = 5, 4, 6, 3
# Largest error, relative to the largest element of a leaf. Rounding makes about 1e-15.
HIGHEST = 1e-10
KEY = jax.random.key(7)


class Model(NamedTuple):
    """The arguments of layerwise_step, and parameters for them."""

    embed: Callable[..., Any]
    layer: Callable[..., Any]
    head: Callable[..., Any]
    params: Any
    layers: str = "layers"
    has_aux_loss: bool = False
    per_layer: Any = None

    def step(self, tx, **settings):
        settings = {
            "layers": self.layers,
            "has_aux_loss": self.has_aux_loss,
            **settings,
        }
        return layerwise_step(self.embed, self.layer, self.head, tx, **settings)

    def apply(self):
        pieces = self.embed, self.layer, self.head
        return layerwise_apply(
            *pieces, layers=self.layers, has_aux_loss=self.has_aux_loss
        )


def normal(seed, *shape):
    """A normal array of NumPy: in float64 under x64, otherwise in float32.

    NumPy draws it, because JAX would compile a program for every parameter.
    """
    dtype = np.float64 if jax.config.values["jax_enable_x64"] else np.float32
    return (0.5 * np.random.default_rng(seed).standard_normal(shape)).astype(dtype)


def batches(steps=5):
    return np.random.default_rng(9).integers(0, V, (steps, 2, 4), dtype=np.int32)


def cross_entropy(logits, batch):
    logits = logits.astype(jnp.promote_types(logits.dtype, jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()


def embed(params, batch):
    return params["embed"]["embedding"][batch[:, :-1]]


def layer(params, x, batch, constants):
    del batch, constants
    kernel = params["block"]["kernel"]
    return x + jnp.tanh(x * params["scale"] @ kernel) @ kernel.T


def head(params, x, batch):
    return cross_entropy(
        x * params["norm"]["scale"] @ params["lm_head"]["kernel"], batch
    )


def toy(depth=L):
    """A model with a matrix and a vector in its stack, and others outside."""
    params = {
        "embed": {"embedding": normal(0, V, D)},
        "layers": {
            "block": {"kernel": normal(1, depth, D, F)},
            "scale": 1 + normal(3, depth, D),
        },
        "norm": {"scale": 1 + normal(4, D)},
        "lm_head": {"kernel": normal(5, D, V)},
    }
    return Model(embed, layer, head, params)


def of_dtype(model, dtype):
    return model._replace(params=jax.tree.map(lambda x: x.astype(dtype), model.params))


def in_int8(model):
    """The model with the kernels of its stack in int8."""
    layers = model.params["layers"]
    kernel = quantize(layers["block"]["kernel"], group_size=8)
    return model._replace(
        params={**model.params, "layers": {**layers, "block": {"kernel": kernel}}}
    )


def wide_toy(depth, width=32):
    """A toy model that is so wide that matrices are larger than activations."""
    shapes = {
        "embed": {"embedding": (V, width)},
        "layers": {
            "block": {"kernel": (depth, width, 2 * width)},
            "scale": (depth, width),
        },
        "norm": {"scale": (width,)},
        "lm_head": {"kernel": (width, V)},
    }
    params = jax.tree.map(
        lambda shape: normal(sum(shape), *shape),
        shapes,
        is_leaf=lambda x: type(x) is tuple,
    )
    return Model(embed, layer, head, params)


def without(tree, path):
    name, *rest = path
    return {
        key: without(tree[key], rest) if key == name else tree[key]
        for key in tree
        if rest or key != name
    }


def ordinary_step(model, tx):
    """The ordinary step: the whole model's gradient, then one update of all leaves."""
    path = model.layers.split("/")

    def loss_of(params, batch, per_layer):
        rest = without(params, path)
        stack = functools.reduce(lambda tree, name: tree[name], path, params)
        x, aux_losses = model.embed(rest, batch), 0.0
        for index in range(jax.tree.leaves(stack)[0].shape[0]):
            one, constants = jax.tree.map(
                lambda leaf, i=index: leaf[i], (stack, per_layer)
            )
            x = model.layer(one, x, batch, constants)
            if model.has_aux_loss:
                x, aux_loss = x
                aux_losses += aux_loss
        return model.head(rest, x, batch) + aux_losses

    def step(params, state, batch, *, key=None, per_layer=None):
        whole = dequantize(params)
        loss, grads = jax.value_and_grad(loss_of)(whole, batch, per_layer)
        updates, state = tx.update(grads, state, whole)
        metrics = LayerwiseMetrics(loss, optax.tree.norm(grads))
        if key is None:
            return optax.apply_updates(params, updates), state, metrics
        return apply_updates_stochastic(params, updates, key), state, metrics

    return step


def trainer(step, model, tx):
    """A compiled function that runs one step per batch, from given parameters.

    It returns the parameters and state after the last step, and every step's metrics.
    """

    @jax.jit
    def run(params, batches, keys=None):
        def body(carry, row):
            batch, key = row
            params, state, metrics = step(
                *carry, batch, key=key, per_layer=model.per_layer
            )
            return (params, state), metrics

        return jax.lax.scan(
            body, (params, tx.init(dequantize(params))), (batches, keys)
        )

    return run


def train(step, model, tx, steps=5, keys=None):
    return trainer(step, model, tx)(model.params, batches(steps), keys)


def assert_agree(actual, expected, highest=HIGHEST):
    """Asserts equal types, and errors up to `highest` times a leaf's largest value."""
    chex.assert_trees_all_equal_structs(actual, expected)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    leaves = jax.tree_util.tree_leaves_with_path(actual)
    for (path, a), b in zip(leaves, jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        error, name = np.abs(a - b).max(initial=0), jax.tree_util.keystr(path)
        assert error <= highest * np.abs(b).max(initial=0), (name, error)


apollo = functools.partial(apollo_optax.apollo, rank=2, **GAP)

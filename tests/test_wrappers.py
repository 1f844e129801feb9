"""Parameters inside nodes of one child, such as the named arrays of Haliax."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.core import freeze
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    dimension_numbers_by_path,
    scale_by_apollo,
)
from apollo_optax._dimension_numbers import resolve
from apollo_optax._tree import leaves_by_path, names_by_path
from tests.helpers import make_mesh, normal, put

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)


@jax.tree_util.register_pytree_node_class
class Named:
    """A node of one child whose key has no name, as Haliax's NamedArray is."""

    def __init__(self, array):
        self.array = array

    def tree_flatten(self):
        return (self.array,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Layer:
    """A node of one child whose key has a name, as an Equinox module may be."""

    weight: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    """A node of two children, whose keys tell them apart."""

    scale: jax.Array
    weight: jax.Array


WRAPPERS = [Named, Layer, lambda x: Named(Layer(x)), lambda x: Layer(Named(Named(x)))]
every_wrapper = pytest.mark.parametrize(
    "wrap", WRAPPERS, ids=["unnamed key", "named key", "two", "three"]
)


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


def names(tree):
    paths = names_by_path(tree)
    assert list(paths) == list(leaves_by_path(tree))
    return ["/".join(name) for name in paths.values()]


def matrices(params, weight_dimension_numbers=None):
    """Names of the leaves that are matrices, with their contracted axes."""
    axes, names = resolve(weight_dimension_numbers, params), names_by_path(params)
    return {
        "/".join(names[path]): found.contracted
        for path, found in axes.items()
        if found is not None
    }


@every_wrapper
def test_names_lack_the_keys_of_wrappers(wrap):
    x = leaf(4, 6)
    assert names({"a": {"bias": wrap(x)}, "b": [wrap(x), x]}) == [
        "a/bias",
        "b/0",
        "b/1",
    ]
    assert names(wrap({"a": wrap({"bias": x, "kernel": x})})) == ["a/bias", "a/kernel"]
    assert names(wrap(x)) == [""]
    assert names({"a": wrap(Pair(x, x))}) == ["a/scale", "a/weight"]
    assert names({"a": wrap(nnx.Param(jnp.ones(3)))}) == ["a"]
    assert names({"a": wrap(None), "b": wrap(optax.MaskedNode())}) == []


@pytest.mark.parametrize(
    "single",
    [
        lambda x: {"kernel": x},
        lambda x: freeze({"kernel": x}),
        lambda x: nnx.State({"kernel": x}),
        lambda x: nnx.State({"kernel": nnx.Param(jnp.ones(x.shape))}),
        lambda x: [x],
        lambda x: (x,),
        lambda x: nnx.List([nnx.Param(jnp.ones(x.shape))]),
    ],
    ids=["dict", "FrozenDict", "State", "State of boxes", "list", "tuple", "nnx.List"],
)
def test_mappings_and_sequences_of_one_child_are_no_wrappers(single):
    params = {"scale": single(leaf(4, 6))}
    (name,) = names(params)
    assert name in ("scale/kernel", "scale/0")
    assert matrices(params) == {name: (0,)}


def test_a_mask_does_not_change_names():
    params = {"norm": Pair(leaf(3, 8), optax.MaskedNode())}
    assert names(params) == ["norm/scale"]


@every_wrapper
def test_default_rule_sees_the_name_above(wrap):
    params = {
        "bias": leaf(3, 64),
        "kernel": leaf(4, 6),
        "norm": {"scale": leaf(3, 64)},
        "embed": {"weight": leaf(9, 4)},
        "lm_head": leaf(4, 9),
    }
    wrapped = jax.tree.map(wrap, params)
    assert matrices(wrapped) == matrices(params) == {"kernel": (0,)}
    # A wrapper around a subtree hides none of the names in it.
    assert matrices({"a": wrap(wrapped)}) == {"a/kernel": (0,)}
    # The key of the last child counts as well.
    assert matrices({"norm": Pair(leaf(3, 8), leaf(4, 6))}) == {"norm/weight": (0,)}


@every_wrapper
def test_no_warning_of_wrapped_vectors(wrap):
    tx = scale_by_apollo(2)
    tx.init({"x": {"bias": wrap(jnp.ones((2, 3, 4)))}})
    with pytest.warns(UserWarning, match="Adam trains 1 leaf of three or more axes"):
        tx.init({"x": {"kernel": wrap(jnp.ones((2, 3, 4)))}})


@every_wrapper
def test_rules_match_with_and_without_the_keys_of_wrappers(wrap):
    params = {"layers": {"kernel": wrap(leaf(3, 4, 6)), "bias": wrap(leaf(3, 6))}}
    expected = {"layers/kernel": (1,)}
    for rule in (r"^layers/kernel$", r"kernel"):
        assert (
            matrices(params, dimension_numbers_by_path([(rule, STACKED)])) == expected
        )
    (path, _) = leaves_by_path({"kernel": wrap(leaf(1))}).popitem()
    full = dimension_numbers_by_path([(rf"layers/{'/'.join(path)}$", STACKED)])
    assert matrices(params, full) == expected
    # The first rule counts, whichever form of the path it matches.
    first = dimension_numbers_by_path([(r"kernel/", None), (r"kernel$", STACKED)])
    assert matrices(params, first) == {}


@every_wrapper
def test_plain_trees_of_dimension_numbers_match(wrap):
    given = {"layers": {"kernel": STACKED, "bias": None}}
    kernel, bias = leaf(3, 4, 6), leaf(3, 6)
    of_leaves = {"layers": {"kernel": wrap(kernel), "bias": wrap(bias)}}
    of_subtree = {"layers": wrap({"kernel": kernel, "bias": bias})}
    for params in (of_leaves, of_subtree, wrap(of_leaves)):
        assert matrices(params, given) == {"layers/kernel": (1,)}


@every_wrapper
def test_tabulate_sees_the_name_above(wrap):
    params = {"bias": wrap(leaf(3, 64)), "kernel": wrap(leaf(4, 64))}
    tx = apollo(0.1, rank=2)
    _, bias, kernel, *_ = apollo_optax.tabulate(tx, params).splitlines()
    assert "Adam" in bias
    assert "APOLLO rank 2, 4 contracted" in kernel
    plain = {"bias": leaf(3, 64), "kernel": leaf(4, 64)}
    assert apollo_optax.state_bytes(tx, params) == apollo_optax.state_bytes(tx, plain)


@every_wrapper
def test_updates_are_those_of_plain_arrays(wrap):
    # Draws depend on the path of a leaf, so this projection is not drawn.
    tx = apollo(0.1, rank=2, projection=lambda key, shape: jnp.eye(*shape))
    params = {"bias": normal(0, (3, 8)), "kernel": normal(1, (4, 6))}
    grads = {"bias": normal(2, (3, 8)), "kernel": normal(3, (4, 6))}
    wrapped, wrapped_grads = (jax.tree.map(wrap, tree) for tree in (params, grads))
    expected, _ = tx.update(grads, tx.init(params), params)
    updates, state = tx.update(wrapped_grads, tx.init(wrapped), wrapped)
    chex.assert_trees_all_equal(updates, jax.tree.map(wrap, expected))
    chex.assert_trees_all_equal_structs(state[0].mu, wrapped)


@every_wrapper
def test_state_sharding_sees_the_name_above(wrap):
    mesh = make_mesh()
    params = {
        "bias": wrap(put(mesh, jnp.ones((2, 16)), P("data", "model"))),
        "kernel": wrap(put(mesh, jnp.ones((8, 16)), P("data", "model"))),
    }
    tx = scale_by_apollo(4)
    state = jax.eval_shape(tx.init, params)
    shardings = apollo_optax.state_sharding(state, params)
    specs = jax.tree.map(lambda sharding: sharding.spec, shardings.mu)
    expected = {"bias": P("data", "model"), "kernel": P(None, ("model", "data"))}
    assert jax.tree.leaves(specs) == list(expected.values())


def embed(params, tokens):
    return jax.tree.leaves(params["embed"])[0][tokens]


def layer(weights, x, tokens, constants):
    (kernel,), (bias,) = (jax.tree.leaves(weights[name]) for name in ("kernel", "bias"))
    return x + jnp.tanh(x @ kernel + bias)


def head(params, x, tokens):
    return jnp.mean((x @ jax.tree.leaves(params["lm_head"])[0]) ** 2)


@every_wrapper
def test_layerwise_step_sees_the_name_above(wrap):
    depth, width = 3, 4
    shapes = {
        "embed": (5, width),
        "layers": {"kernel": (depth, width, width), "bias": (depth, width)},
        "lm_head": (width, 2),
    }
    params = jax.tree.map(
        lambda shape: wrap(normal(len(shape), shape)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    numbers = dimension_numbers_by_path([(r"layers/kernel$", STACKED)])
    tx = apollo(0.1, rank=2, update_proj_gap=2, weight_dimension_numbers=numbers)
    step = jax.jit(apollo_optax.layerwise_step(embed, layer, head, tx))
    tokens = jnp.asarray(np.arange(4))

    def loss(params):
        x = embed(params, tokens)
        for i in range(depth):
            row = jax.tree.map(lambda leaf, i=i: leaf[i], params["layers"])
            x = layer(row, x, tokens, None)
        return head(params, x, tokens)

    layerwise, state = params, tx.init(params)
    ordinary, ordinary_state = params, tx.init(params)
    bias = jax.tree.leaves(state[0].mu["layers"]["bias"])[0]
    assert bias.shape == (depth, width)
    for _ in range(3):
        layerwise, state, _ = step(layerwise, state, tokens)
        grads = jax.grad(loss)(ordinary)
        updates, ordinary_state = tx.update(grads, ordinary_state, ordinary)
        ordinary = optax.apply_updates(ordinary, updates)
    chex.assert_trees_all_close(layerwise, ordinary, rtol=1e-4, atol=1e-5)

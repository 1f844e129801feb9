"""Parameters in trees of every kind, with leaves that are no arrays."""

import collections
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from tests.helpers import (
    OPTIMIZERS,
    every_optimizer,
    every_projection,
    make_mesh,
    normal,
    run,
    small_apollo,
    small_gradients,
    small_params,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@every_optimizer
def test_init_on_shapes(name):
    tx = OPTIMIZERS[name](0.1)
    params = small_params()
    state = tx.init(jax.eval_shape(lambda: params))
    chex.assert_trees_all_equal(state, tx.init(params))
    from_shapes, expected = (
        run(tx, small_gradients(3), params, state=state) for state in (state, None)
    )
    chex.assert_trees_all_equal(from_shapes, expected)


def test_init_on_shapes_with_shardings():
    mesh = make_mesh()
    sharding = NamedSharding(mesh, P("data", "model"))
    kernel = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=sharding)
    tx: Any = apollo_optax.scale_by_apollo(4)
    state = tx.init({"kernel": kernel})
    assert state.mu["kernel"].sharding.spec == P(None, ("model", "data"))
    assert state.count.sharding.is_equivalent_to(NamedSharding(mesh, P()), 0)


@every_optimizer
def test_empty_tree(name):
    tx = OPTIMIZERS[name](0.1)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert int(state[0].count) == 1


@every_projection
def test_none_masked_and_python_float_leaves(projection):
    tx = small_apollo(0.1, projection=projection)
    plain = {
        "kernel": normal(0, (4, 6)),
        "number": jnp.float32(0.5),
        "scalar": jnp.float32(2.0),
    }
    params = plain | {"number": 0.5, "none": None, "masked": optax.MaskedNode()}
    state, plain_state = tx.init(params), tx.init(plain)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        expected, plain_state = tx.update(plain, plain_state, plain)
        assert updates["none"] is None
        assert updates["masked"] == optax.MaskedNode()
        of_arrays = {name: updates[name] for name in plain}
        chex.assert_trees_all_equal(of_arrays, expected)
        for leaf in jax.tree.leaves((updates, state)):
            assert isinstance(leaf, jax.Array)
            assert not leaf.weak_type


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


Record = collections.namedtuple("Record", ["kernel", "bias"])


@pytest.mark.filterwarnings("ignore:the parameters are one vector")
@pytest.mark.parametrize(
    "make",
    [
        lambda kernel, bias: (kernel, bias),
        lambda kernel, bias: [kernel, bias],
        Pair,
        Record,
        lambda kernel, bias: ({"a": [kernel]}, (bias, ())),
        lambda kernel, bias: collections.OrderedDict(z=kernel, a=bias),
        lambda kernel, bias: kernel,
        lambda kernel, bias: bias,
    ],
    ids=[
        "tuple",
        "list",
        "NamedTuple",
        "namedtuple",
        "nested",
        "OrderedDict",
        "matrix",
        "vector",
    ],
)
def test_containers(make):
    # A drawn projection depends on the path of its leaf, so this one is not drawn.
    tx = small_apollo(0.1, projection=lambda key, shape: jnp.eye(*shape))
    kernel, bias = normal(0, (4, 6)), normal(1, (6,))
    kernel_grad, bias_grad = normal(2, (4, 6)), normal(3, (6,))
    params, grads = make(kernel, bias), make(kernel_grad, bias_grad)
    updates, state = tx.update(grads, tx.init(params), params)
    in_dict = {"kernel": kernel, "bias": bias}
    expected, _ = tx.update(
        {"kernel": kernel_grad, "bias": bias_grad}, tx.init(in_dict), in_dict
    )
    chex.assert_trees_all_equal(updates, make(expected["kernel"], expected["bias"]))
    moments = (state[0].mu, state[0].nu, state[0].norm)
    chex.assert_trees_all_equal_structs(updates, params, *moments)

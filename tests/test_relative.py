"""Updates in proportion to the weights of each matrix."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    ApolloDimensionNumbers,
    apollo_zero,
    quantize,
    scale_by_param_matrix_rms,
)
from benchmarks.hlo import collectives
from tests.helpers import assert_close, every_axis_type, make_mesh, normal, put, rms

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)


def scaled(tx, updates, params):
    return tx.update(updates, tx.init(params), params)[0]


def test_each_matrix_of_a_stack_has_a_factor_and_other_leaves_have_none():
    sizes = jnp.array([0.01, 0.02, 0.05])[:, None, None]
    params = {
        "kernel": normal(0, (3, 8, 16)) * sizes,
        "embedding": normal(1, (32, 8)),
        "bias": normal(2, 16),
        "scalar": jnp.array(7.0),
    }
    updates = jax.tree.map(lambda x: normal(x.size, x.shape), params)
    numbers = {"kernel": STACKED, "embedding": None, "bias": None, "scalar": None}
    tx = scale_by_param_matrix_rms(weight_dimension_numbers=numbers)
    new = scaled(tx, updates, params)
    for update, before, weights in zip(
        new["kernel"], updates["kernel"], params["kernel"], strict=True
    ):
        np.testing.assert_allclose(update, before * rms(weights) / 0.02, rtol=1e-5)
    for name in ("embedding", "bias", "scalar"):
        np.testing.assert_array_equal(new[name], updates[name])


def test_it_is_that_of_optax_for_a_single_matrix():
    weights, update = 0.3 * normal(0, (8, 16)), normal(1, (8, 16))
    ours = scale_by_param_matrix_rms(1.0, max_rms=jnp.inf)
    expected = scaled(optax.scale_by_param_block_rms(), update, weights)
    np.testing.assert_allclose(scaled(ours, update, weights), expected, rtol=1e-6)


@pytest.mark.parametrize(("size", "factor"), [(0.0, 0.05), (1e-4, 0.05), (9.0, 5.0)])
def test_the_factor_is_bounded(size, factor):
    """A matrix of zeros is trained, and weights can't grow exponentially."""
    weights = jnp.full((4, 6), size)
    new = scaled(scale_by_param_matrix_rms(), jnp.ones((4, 6)), weights)
    np.testing.assert_allclose(new, factor, rtol=1e-6)


def test_weights_grow_linearly_at_most():
    """The bound holds even if all updates have the direction of the weights."""
    tx = apollo_zero(0.1, relative=True)
    params = jnp.full((4, 6), 0.02)
    state = tx.init(params)
    for _ in range(100):
        updates, state = tx.update(-params, state, params)
        params = optax.apply_updates(params, updates)
    assert rms(params) < 0.02 + 100 * 0.1 * 5


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float64])
@pytest.mark.usefixtures("x64")
def test_updates_keep_their_dtype(dtype):
    """The squares of 300 overflow float16, and are summed in float32."""
    tx = scale_by_param_matrix_rms(150.0, max_rms=jnp.inf)
    params, update = jnp.full((8, 16), 300, dtype), jnp.full((8, 16), 0.5, dtype)
    new = scaled(tx, update, params)
    assert new.dtype == dtype
    np.testing.assert_allclose(np.asarray(new, float), 1.0, rtol=1e-3)


def test_arguments_may_be_injected():
    tx = optax.inject_hyperparams(
        scale_by_param_matrix_rms,
        static_args="weight_dimension_numbers",
        hyperparam_dtype=jnp.float32,
    )(reference_rms=optax.constant_schedule(0.01))
    params = {"kernel": jnp.full((4, 6), 0.04, jnp.bfloat16)}
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    assert updates["kernel"].dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(updates["kernel"], float), 0.16, rtol=1e-2)


def masked(tx):
    return optax.masked(tx, {"first": True, "second": False})


def partitioned(tx):
    labels = {"first": "scaled", "second": "kept"}
    return optax.partition({"scaled": tx, "kept": optax.identity()}, labels)


@pytest.mark.parametrize("wrap", [masked, partitioned])
def test_masked_leaves_keep_their_updates(wrap):
    params = {"first": jnp.full((4, 6), 0.04), "second": jnp.full((4, 6), 0.04)}
    updates = jax.tree.map(jnp.ones_like, params)
    new = scaled(wrap(scale_by_param_matrix_rms()), updates, params)
    np.testing.assert_allclose(new["first"], 2.0, rtol=1e-6)
    np.testing.assert_array_equal(new["second"], 1.0)


def test_vmap():
    tx = scale_by_param_matrix_rms()
    params = jnp.array([0.02, 0.06])[:, None, None] * jnp.ones((2, 4, 6))
    new = jax.vmap(lambda update, p: scaled(tx, update, p))(jnp.ones((2, 4, 6)), params)
    np.testing.assert_allclose(new[:, 0, 0], [1.0, 3.0], rtol=1e-6)


def test_linen_boxes():
    boxed = nn.Partitioned(jnp.full((4, 6), 0.04), names=("in", "out"))
    params, tx = {"kernel": boxed}, scale_by_param_matrix_rms()
    new = scaled(tx, jax.tree.map(jnp.ones_like, params), params)
    assert isinstance(new["kernel"], nn.Partitioned)
    np.testing.assert_allclose(new["kernel"].value, 2.0, rtol=1e-6)


def test_nnx_optimizer():
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, apollo_zero(0.1, relative=True), wrt=nnx.Param)
    before = model.kernel[...]
    grads = nnx.grad(lambda model: jnp.sum(model(jnp.eye(8)) ** 2))(model)
    optimizer.update(model, grads)
    moved = rms(model.kernel[...] - before)
    np.testing.assert_allclose(moved, 0.1 * 0.1 / 0.02, rtol=1e-4)


@every_axis_type
def test_a_mesh_sends_one_number_per_matrix(axis_type):
    mesh = make_mesh(axis_type)
    numbers = {"kernel": STACKED}
    tx = scale_by_param_matrix_rms(weight_dimension_numbers=numbers)
    weights, update = 0.05 * normal(0, (4, 32, 64)), normal(1, (4, 32, 64))
    expected = scaled(tx, {"kernel": update}, {"kernel": weights})
    with jax.set_mesh(mesh):
        spec = P(None, *mesh.axis_names)
        arguments = ({"kernel": put(mesh, x, spec)} for x in (update, weights))
        compiled = jax.jit(functools.partial(scaled, tx)).lower(*arguments).compile()
        arguments = ({"kernel": put(mesh, x, spec)} for x in (update, weights))
        new = compiled(*arguments)
    assert_close(new, expected)
    assert new["kernel"].sharding.spec == spec
    sent = collectives(compiled.as_text())
    assert sent
    assert sum(x.size * x.times for x in sent) <= 4 * len(mesh.axis_names)


def test_it_needs_the_parameters():
    tx = scale_by_param_matrix_rms()
    with pytest.raises(ValueError, match=r"update\(updates, state, params\)"):
        tx.update(jnp.ones((4, 6)), tx.init(jnp.ones((4, 6))))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"other": jnp.ones((4, 6))}, "lacks leaves: 'kernel'"),
        ({"kernel": jnp.ones((6, 4))}, r"'kernel' has shape \(6, 4\).*\(4, 6\)"),
    ],
)
def test_rejects_other_parameters(params, message):
    tx = scale_by_param_matrix_rms()
    updates = {"kernel": jnp.ones((4, 6))}
    with pytest.raises(ValueError, match=message):
        tx.update(updates, tx.init(updates), params)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reference_rms": 0.0}, ValueError, "greater than 0, got 0.0"),
        ({"reference_rms": "0.02"}, TypeError, "must be a number"),
        ({"reference_rms": jnp.ones(1)}, TypeError, "must be one real number"),
        ({"min_rms": -1.0}, ValueError, "min_rms must be finite and at least 0"),
        ({"max_rms": 0.0}, ValueError, "max_rms must be greater than 0, got 0.0"),
        ({"min_rms": 0.2}, ValueError, "max_rms is 0.1, below min_rms, which is 0.2"),
    ],
)
def test_rejects_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        scale_by_param_matrix_rms(**arguments)


def test_warns_of_leaves_that_may_be_matrices():
    tx, stack = scale_by_param_matrix_rms(), jnp.ones((2, 4, 6))
    with pytest.warns(UserWarning, match="the updates of 1 leaf of three or more axes"):
        tx.init({"kernel": stack})
    with pytest.warns(UserWarning, match="which is not scaled by its weights"):
        tx.init(jnp.ones(6))
    numbers = ApolloDimensionNumbers(1, 2)
    scale_by_param_matrix_rms(weight_dimension_numbers=numbers).init({"kernel": stack})


@pytest.mark.parametrize("relative", [1, 0.02, None])
def test_rejects_relative_that_is_not_boolean(relative):
    with pytest.raises(TypeError, match="relative must be True or False"):
        apollo_zero(1e-3, relative=relative)


def test_rejects_a_leaf_that_is_not_floating_point():
    tx, params = scale_by_param_matrix_rms(), {"kernel": jnp.ones((4, 6), jnp.int8)}
    with pytest.raises(ValueError, match="'kernel' has dtype int8"):
        tx.init(params)
    with pytest.raises(ValueError, match="'kernel' has dtype int8"):
        tx.update(params, optax.EmptyState(), params)


def test_rejects_int8_weights():
    tx, update = scale_by_param_matrix_rms(), jnp.ones((4, 128))
    with pytest.raises(ValueError, match=r"dequantize\(params\)"):
        tx.update({"kernel": update}, optax.EmptyState(), {"kernel": quantize(update)})


def test_rejects_dimension_numbers_that_do_not_fit():
    tx = scale_by_param_matrix_rms(weight_dimension_numbers={"kernel": STACKED})
    with pytest.raises(ValueError, match="does not fit 'kernel'"):
        tx.init({"kernel": jnp.ones((4, 6))})


@pytest.mark.parametrize(
    ("sharded", "remedy"),
    [(0, "average the gradient first"), (1, "each device; update outside shard_map")],
)
def test_rejects_matrices_that_vary_inside_shard_map(sharded, remedy):
    tx, mesh = scale_by_param_matrix_rms(), make_mesh()
    specs, trees = [P(), P()], [jnp.ones((4, 6)), jnp.ones((4, 6))]
    specs[sharded], trees[sharded] = P("data"), jnp.ones((8, 6))
    update = jax.shard_map(
        functools.partial(scaled, tx), mesh=mesh, in_specs=tuple(specs), out_specs=P()
    )
    with pytest.raises(ValueError, match=f"varies over the manual axes.*{remedy}"):
        update(*trees)

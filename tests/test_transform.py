"""What scale_by_apollo does to tensors of every kind, size and magnitude."""

import dataclasses
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy import stats

from apollo_optax import ApolloDimensionNumbers, _keys, scale_by_apollo

PAPER_SHAPES = {  # hidden, intermediate, layers, rank
    "60m": (512, 1376, 8, 128),
    "1b": (2048, 5461, 24, 512),
    "7b": (4096, 11008, 32, 256),
}


def normal(shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def run(tx, gradients, params=None):
    """Updates and states of a sequence of gradients."""
    state, updates = tx.init(gradients[0] if params is None else params), []
    update = jax.jit(tx.update)
    for gradient in gradients:
        direction, state = update(gradient, state)
        updates.append(direction)
    return updates, state


# ---------------------------------------------------------------- which tensors, which axes


def test_vectors_and_named_leaves_get_adam():
    def gradient(seed):
        return {
            "norm": {"scale": normal(6, seed), "stacked_scale": {"scale": normal((3, 6), seed)}},
            "dense": {"bias": normal((2, 3), seed)},
            "embed": {"embedding": normal((10, 6), seed)},
            "lm_head": {"kernel": normal((6, 10), seed)},
            "temperature": normal((), seed),
        }

    gradients = [gradient(seed) for seed in range(5)]
    actual, state = run(scale_by_apollo(2), gradients)
    expected, adam = run(optax.scale_by_adam(eps=1e-6), gradients)
    for got, wanted in zip(actual, expected, strict=True):
        chex.assert_trees_all_close(got, wanted, rtol=1e-7, atol=1e-7)
    chex.assert_trees_all_close(state.mu, adam.mu, rtol=1e-7, atol=1e-7)
    chex.assert_trees_all_close(state.nu, adam.nu, rtol=1e-7, atol=1e-7)


def test_adam_in_float64():
    with jax.enable_x64(True):
        gradients = [normal(6, seed, jnp.float64) for seed in range(5)]
        actual, state = run(scale_by_apollo(2), gradients)
        expected, _ = run(optax.scale_by_adam(eps=1e-6), gradients)
        assert state.mu.dtype == state.nu.dtype == state.norm.dtype == jnp.float64
        chex.assert_trees_all_close(actual, expected, rtol=1e-7)


@pytest.mark.parametrize(
    ("shape", "numbers", "moment_shape"),
    [
        ((6, 10), ApolloDimensionNumbers(), (2, 10)),
        ((10, 6), ApolloDimensionNumbers(), (2, 10)),
        ((6, 6), ApolloDimensionNumbers(), (2, 6)),
        ((3, 6, 10), ApolloDimensionNumbers(1, 2), (3, 2, 10)),
        ((6, 3, 10), ApolloDimensionNumbers(0, 2), (3, 2, 10)),  # MaxText scans over axis 1.
        ((6, 10, 3), ApolloDimensionNumbers(0, 1), (3, 2, 10)),
        ((2, 3, 6, 10), ApolloDimensionNumbers(-2, -1), (2, 3, 2, 10)),
        ((6, 4, 3), ApolloDimensionNumbers(0, (1, 2)), (2, 4, 3)),  # DenseGeneral: query
        ((4, 3, 6), ApolloDimensionNumbers((0, 1), 2), (2, 4, 3)),  # DenseGeneral: out
        ((2, 2, 10), ApolloDimensionNumbers((0, 1), 2), (2, 10)),
        ((5, 6, 4, 3), ApolloDimensionNumbers(1, (2, 3)), (5, 2, 4, 3)),
        ((5, 4, 3, 6), ApolloDimensionNumbers((2, 1), 3), (5, 2, 3, 4)),
    ],
)
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_any_axes_are_the_matrices_they_stand_for(shape, numbers, moment_shape, scale_type):
    """Each matrix of a tensor is updated as it would be alone and two-dimensional."""
    gradients = [normal(shape, seed) for seed in range(4)]
    tx = scale_by_apollo(2, scale_type=scale_type, weight_dimension_numbers={"w": numbers})
    updates, state = run(tx, [{"w": gradient} for gradient in gradients])
    assert state.mu["w"].shape == state.nu["w"].shape == moment_shape

    def axes(side):
        side = (side,) if isinstance(side, int) else side
        return [axis % len(shape) for axis in side]

    reduction, output = axes(numbers.reduction_axis), axes(numbers.output_axis)
    batch = [axis for axis in range(len(shape)) if axis not in reduction + output]
    m, n = (int(np.prod([shape[a] for a in side])) for side in (reduction, output))

    def matrices(tensor):
        return np.transpose(np.asarray(tensor), batch + reduction + output).reshape(-1, m, n)

    leaf = _keys.leaf_id(("w",))
    for b in range(len(matrices(gradients[0]))):

        def own_draw(key, shape, b=b):
            drawn = jax.random.fold_in(jax.random.fold_in(jax.random.key(0), leaf), 0)
            return jax.random.normal(jax.random.fold_in(drawn, b), shape) / np.sqrt(shape[0])

        alone = scale_by_apollo(2, scale_type=scale_type, projection=own_draw)
        expected, alone_state = run(alone, [jnp.asarray(matrices(g)[b]) for g in gradients])
        for got, wanted in zip(updates, expected, strict=True):
            np.testing.assert_allclose(matrices(got["w"])[b], wanted, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(state.norm["w"].ravel()[b], alone_state.norm, rtol=1e-5)


def test_rank_is_clipped():
    state = scale_by_apollo(256).init({"kernel": jnp.ones((4, 9))})
    assert state.mu["kernel"].shape == (4, 9)


def test_a_stack_is_many_leaves_in_distribution():
    """Factors of a stack of equal layers spread as those of separate leaves of the same gradient."""
    layers, gradient = 100, normal((8, 12))
    stacked = jnp.broadcast_to(gradient, (layers, 8, 12))
    tx = scale_by_apollo(2, weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    update, _ = tx.update(stacked, tx.init(stacked))
    separate = {f"layer_{i}": gradient for i in range(layers)}
    tx = scale_by_apollo(2)
    updates, _ = tx.update(separate, tx.init(separate))
    # One channel of each: the channels of a matrix share its projection.
    in_stack = np.asarray(update[:, 0, 0] / gradient[0, 0])
    apart = np.array([float(u[0, 0] / gradient[0, 0]) for u in updates.values()])
    assert len(np.unique(in_stack)) == layers
    assert stats.ks_2samp(in_stack, apart).pvalue > 1e-3


# ---------------------------------------------------------------- what the state costs


@pytest.mark.parametrize("model", PAPER_SHAPES)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mini", [False, True])
def test_state_bytes_are_exactly_the_moments(model, stacked, moment_dtype, mini):
    hidden, intermediate, layers, rank = PAPER_SHAPES[model]
    rank = 1 if mini else rank
    kernels = dict.fromkeys("qkvo", (hidden, hidden))
    kernels |= {"gate": (hidden, intermediate), "up": (hidden, intermediate)}
    kernels["down"] = (intermediate, hidden)

    def leaf(shape):
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16)

    if stacked:
        params = {name: leaf((layers, *shape)) for name, shape in kernels.items()}
        numbers = ApolloDimensionNumbers(1, 2)
    else:
        params = {f"{i}_{name}": leaf(s) for i in range(layers) for name, s in kernels.items()}
        numbers = None
    tx = scale_by_apollo(
        rank,
        scale_type="tensor" if mini else "channel",
        moment_dtype=moment_dtype,
        weight_dimension_numbers=numbers,
    )
    state = jax.eval_shape(tx.init, params)

    def nbytes(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    channels = layers * (4 * hidden + 3 * intermediate)
    assert nbytes((state.mu, state.nu)) == 2 * channels * rank * jnp.dtype(moment_dtype).itemsize
    assert nbytes(state.norm) == 4 * layers * len(kernels)  # One remembered norm for each matrix.
    assert nbytes((state.count, state.key)) == 4 + 8
    assert state.projection is None


def test_svd_keeps_its_projections():
    params = {"stack": jnp.ones((3, 6, 10)), "bias": jnp.ones(4)}
    numbers = {"stack": ApolloDimensionNumbers(1, 2), "bias": None}
    state = scale_by_apollo(2, projection="svd", weight_dimension_numbers=numbers).init(params)
    chex.assert_trees_all_equal_shapes(state.projection, {"stack": jnp.ones((3, 2, 6)), "bias": jnp.ones(())})


# ---------------------------------------------------------------- magnitudes


@pytest.mark.parametrize("projection", ["random", "rademacher", "svd"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize(
    ("dtype", "magnitudes"),
    [
        ("float32", [1e-30, 1e15, 1e-15, 1.0, 1e15, 1e-30, 0.0, 1e15]),
        ("bfloat16", [1e-30, 1e15, 1e-15, 1.0, 1e15, 1e-30, 0.0, 1e15]),
        ("float16", [6e-8, 15000.0, 1e-4, 0.0, 15000.0, 6e-8]),
    ],
)
def test_extreme_gradients_give_finite_updates_and_state(dtype, magnitudes, scale_type, projection):
    def gradient(seed, magnitude):
        return {
            "kernel": (normal((16, 24), seed) * magnitude).astype(dtype),
            "bias": (normal(8, seed) * magnitude).astype(dtype),
        }

    gradients = [gradient(seed, magnitude) for seed, magnitude in enumerate(magnitudes)]
    tx = scale_by_apollo(4, scale_type=scale_type, scale=128.0, projection=projection)
    chex.assert_tree_all_finite(gradients)
    for order in (gradients, gradients[::-1]):
        updates, state = run(tx, order)
        chex.assert_tree_all_finite((updates, state))
        chex.assert_trees_all_equal_dtypes(*updates, gradients[0])


def test_float16_updates_saturate():
    # One huge entry met by a small entry of P: the factor is huge, and 65504 is where float16 ends.
    gradient = jnp.zeros((2, 4), jnp.float16).at[0, 0].set(60000.0)
    tx = scale_by_apollo(1, scale_type="tensor", projection=lambda key, shape: jnp.array([[1e-7, 1.0]]))
    (update,), state = run(tx, [gradient])
    assert update[0, 0] == jnp.finfo(jnp.float16).max
    assert state.norm > 65504


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16", "float16"])
def test_infinite_gradients_stay_visible_in_the_moments(moment_dtype):
    tx = scale_by_apollo(2, moment_dtype=moment_dtype)
    params = {"matrix": jnp.ones((4, 6)), "vector": jnp.ones(4)}
    _, state = tx.update(jax.tree.map(lambda x: x * jnp.inf, params), tx.init(params))
    updates, _ = tx.update(params, state)
    assert all(jnp.isnan(update).all() for update in updates.values())


def test_float16_moments_saturate():
    _, state = run(scale_by_apollo(2, moment_dtype="float16"), [jnp.full((4, 6), 1e5)] * 3)
    chex.assert_tree_all_finite(state)


def test_projections_are_told_apart_by_identity():
    """Not by an ``==`` of their own, which may compare arrays, or say that unlike things are alike."""

    @dataclasses.dataclass
    class Fixed:
        value: jax.Array

        def __call__(self, key, shape):
            return self.value

    gradient = normal((4, 6))
    one, other = (scale_by_apollo(2, projection=Fixed(normal((2, 4), seed))) for seed in (1, 2))
    (_, first), (_, second) = (tx.update(gradient, tx.init(gradient)) for tx in (one, other))
    np.testing.assert_allclose(first.mu, 0.1 * normal((2, 4), 1) @ gradient, rtol=1e-4)
    np.testing.assert_allclose(second.mu, 0.1 * normal((2, 4), 2) @ gradient, rtol=1e-4)


def test_leaves_of_one_shape_share_a_trace():
    calls = []

    def projection(key, shape):
        calls.append(shape)
        return jnp.ones(shape)

    params = {str(i): normal((4, 6), i) for i in range(5)} | {"wide": normal((4, 7))}
    tx = scale_by_apollo(2, projection=projection)
    state = tx.init(params)
    calls.clear()
    jax.jit(tx.update)(params, state)
    assert len(calls) == 2


def test_a_gap_beyond_all_counts():
    tx = scale_by_apollo(2, update_proj_gap=sys.maxsize)
    gradient = normal((4, 6))
    expected, _ = scale_by_apollo(2).update(gradient, scale_by_apollo(2).init(gradient))
    chex.assert_trees_all_equal(tx.update(gradient, tx.init(gradient))[0], expected)


def test_bfloat16_gradients_are_not_lost_in_the_moments():
    # 0.001 R^2 added to nu is below half of a bfloat16's last digit: it would stay what it was.
    gradients = [jnp.ones((4, 4), jnp.bfloat16)] * 20
    _, state = run(scale_by_apollo(2), gradients)
    _, wide = run(scale_by_apollo(2), [g.astype(jnp.float32) for g in gradients])
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.nu, wide.nu, rtol=1e-6)


def test_a_nan_stays_in_its_leaf():
    gradient = {"a": normal((4, 6)), "b": normal((4, 6), 1), "bias": normal(3)}
    broken = gradient | {"a": gradient["a"].at[0, 0].set(jnp.nan)}
    tx = scale_by_apollo(2)
    updates, state = run(tx, [gradient, broken, gradient])
    expected, whole = run(tx, [gradient] * 3)
    assert jnp.isnan(updates[1]["a"]).any()
    for name in ("b", "bias"):
        for got, wanted in zip(updates, expected, strict=True):
            chex.assert_trees_all_equal(got[name], wanted[name])
        for field in ("mu", "nu", "norm"):
            chex.assert_trees_all_equal(getattr(state, field)[name], getattr(whole, field)[name])


def test_a_zero_gradient_does_not_hold_back_what_follows():
    """An expert that saw no token, or a zero-initialised network's first steps."""
    zero, gradient = jnp.zeros((4, 6)), normal((4, 6))
    updates, state = run(scale_by_apollo(2), [zero, zero, gradient])
    assert (updates[0] == 0).all()
    assert (updates[1] == 0).all()
    assert jnp.linalg.norm(updates[2]) > 0.5  # Not limited by the zeros before it.
    updates, state = run(scale_by_apollo(2), [gradient, zero, gradient])
    _, before = run(scale_by_apollo(2), [gradient])
    np.testing.assert_allclose(state.norm, before.norm * 1.01, rtol=1e-5)
    assert state.norm > 0


def test_scale_front_changes_what_is_remembered_not_the_first_update():
    gradient = normal((4, 6))
    front, front_state = run(scale_by_apollo(2, scale=9.0, scale_front=True), [gradient])
    back, back_state = run(scale_by_apollo(2, scale=9.0), [gradient])
    np.testing.assert_allclose(front[0], back[0], rtol=1e-6)
    np.testing.assert_allclose(front_state.norm, 3 * back_state.norm, rtol=1e-6)


# ---------------------------------------------------------------- inside shard_map


def test_replicated_leaves_work_inside_shard_map():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, split = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    params = {"kernel": normal((4, 6)), "bias": normal(3)}
    tx = scale_by_apollo(2)
    state = tx.init(params)

    @jax.jit
    @jax.shard_map(mesh=mesh, in_specs=(replicated, replicated, split), out_specs=replicated)
    def step(params, state, weights):
        local = jax.tree.map(lambda p: p * weights.sum(), params)
        return tx.update(jax.lax.pmean(local, "data"), state)

    actual = step(params, state, jnp.arange(8.0))
    expected = tx.update(jax.tree.map(lambda p: p * 3.5, params), state)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)

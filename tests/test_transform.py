"""scale_by_apollo on tensors of every shape, dtype and magnitude."""

import dataclasses
import functools
import itertools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify
from scipy import stats

from apollo_optax import (
    ApolloDimensionNumbers,
    _keys,
    apollo,
    apollo_mini,
    scale_by_apollo,
)
from tests import helpers
from tests.helpers import combinations_of, normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

# Hidden size, intermediate size, layers and rank of the paper's models.
PAPER_MODELS = {
    "60m": (512, 1376, 8, 128),
    "1b": (2048, 5461, 24, 512),
    "7b": (4096, 11008, 32, 256),
}


run = functools.partial(helpers.run, jit=True)


def sparse_projection(key, shape):
    return jax.random.choice(key, jnp.array([-1.0, 0.0, 1.0]), shape)


# Which tensors are matrices, and along which axes.


def test_vectors_and_leaves_of_certain_names_get_adam():
    def gradient(seed):
        return {
            "norm": {"scale": normal(seed, 6)},
            "stacked_norm": {"scale": normal(seed, (3, 6))},
            "dense": {"bias": normal(seed, (2, 3))},
            "embed": {"embedding": normal(seed, (10, 6))},
            "lm_head": {"kernel": normal(seed, (6, 10))},
            "temperature": normal(seed, ()),
        }

    gradients = [gradient(seed) for seed in range(5)]
    actual, states = run(scale_by_apollo(2), gradients)
    expected, adams = run(optax.scale_by_adam(eps=1e-6), gradients)
    moments, adam_moments = ([(s.mu, s.nu) for s in each] for each in (states, adams))
    chex.assert_trees_all_close(
        (actual, moments), (expected, adam_moments), rtol=1e-7, atol=1e-7
    )


def test_adam_in_float64():
    with jax.enable_x64(True):
        gradients = [{"bias": normal(seed, 6, jnp.float64)} for seed in range(5)]
        actual, (*_, state) = run(scale_by_apollo(2), gradients)
        expected, _ = run(optax.scale_by_adam(eps=1e-6), gradients)
        for field in (state.mu, state.nu, state.norm):
            assert field["bias"].dtype == jnp.float64
        chex.assert_trees_all_close(actual, expected, rtol=1e-7)


@combinations_of(
    "shape, numbers, moment_shape, scale_type",
    [
        ((6, 10), ApolloDimensionNumbers(), (2, 10)),
        ((10, 6), ApolloDimensionNumbers(), (2, 10)),
        ((6, 6), ApolloDimensionNumbers(), (2, 6)),
        ((3, 6, 10), ApolloDimensionNumbers(1, 2), (3, 2, 10)),
        # MaxText stacks layers along axis 1.
        ((6, 3, 10), ApolloDimensionNumbers(0, 2), (3, 2, 10)),
        ((6, 10, 3), ApolloDimensionNumbers(0, 1), (3, 2, 10)),
        ((2, 3, 6, 10), ApolloDimensionNumbers(-2, -1), (2, 3, 2, 10)),
        # Flax's DenseGeneral: the query, and the output.
        ((6, 4, 3), ApolloDimensionNumbers(0, (1, 2)), (2, 4, 3)),
        ((4, 3, 6), ApolloDimensionNumbers((0, 1), 2), (2, 4, 3)),
        ((2, 2, 10), ApolloDimensionNumbers((0, 1), 2), (2, 10)),
        ((5, 6, 4, 3), ApolloDimensionNumbers(1, (2, 3)), (5, 2, 4, 3)),
        ((5, 4, 3, 6), ApolloDimensionNumbers((2, 1), 3), (5, 2, 3, 4)),
    ],
    ["channel", "tensor"],
)
def test_matrices_in_a_tensor_get_their_own_updates(
    shape, numbers, moment_shape, scale_type
):
    """Each gets the update that it would get alone, as a leaf of two axes."""
    gradients = [normal(seed, shape) for seed in range(4)]
    numbers_by_path = {"w": numbers}
    tx = scale_by_apollo(
        2,
        scale_type=scale_type,
        projection="random",
        weight_dimension_numbers=numbers_by_path,
    )
    updates, (*_, state) = run(tx, [{"w": gradient} for gradient in gradients])
    assert state.mu["w"].shape == state.nu["w"].shape == moment_shape

    def axes(side):
        side = (side,) if isinstance(side, int) else side
        return [axis % len(shape) for axis in side]

    reduction, output = axes(numbers.reduction_axis), axes(numbers.output_axis)
    batch = [axis for axis in range(len(shape)) if axis not in reduction + output]
    m, n = (int(np.prod([shape[a] for a in side])) for side in (reduction, output))

    def matrices(tensor):
        ordered = np.transpose(np.asarray(tensor), batch + reduction + output)
        return ordered.reshape(-1, m, n)

    # The index b is traced, so all matrices share one compilation.
    @jax.jit
    def update_alone(b, gradient, state, params=None):
        """Updates a matrix with the projection of the b-th matrix of the tensor."""

        def own_draw(key, shape):
            drawn = jax.random.fold_in(jax.random.key(0), _keys.leaf_id(("w",)))
            key = jax.random.fold_in(jax.random.fold_in(drawn, 0), b)
            return jax.random.normal(key, shape) / np.sqrt(shape[0])

        tx = scale_by_apollo(2, scale_type=scale_type, projection=own_draw)
        return tx.update(gradient, state)

    init = scale_by_apollo(2, scale_type=scale_type).init
    for b in range(len(matrices(gradients[0]))):
        alone = optax.GradientTransformation(init, functools.partial(update_alone, b))
        own_gradients = [jnp.asarray(matrices(g)[b]) for g in gradients]
        expected, (*_, own_state) = helpers.run(alone, own_gradients)
        actual = [matrices(each["w"])[b] for each in updates]
        np.testing.assert_allclose(actual, expected, rtol=2e-5, atol=1e-6)
        norm = state.norm["w"].ravel()[b]
        np.testing.assert_allclose(norm, own_state.norm, rtol=1e-5)


def test_rank_is_at_most_the_smaller_side():
    state = scale_by_apollo(256).init({"kernel": jnp.ones((4, 9))})
    assert state.mu["kernel"].shape == (4, 9)


def first_update_rms(tx_of_seed, shape, seeds=40):
    """RMS of the first update per seed of the projection. Adam's is 1."""
    params, gradient = {"w": jnp.zeros(shape)}, {"w": normal(1, shape)}

    def rms(seed):
        tx = tx_of_seed(seed)
        update, _ = tx.update(gradient, tx.init(params), params)
        return jnp.sqrt(jnp.mean(jnp.square(update["w"])))

    return jax.jit(jax.vmap(rms))(jnp.arange(seeds))


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(2, 64), (64, 4), (4, 4)])
def test_updates_at_full_rank_do_not_depend_on_the_seed(shape, scale_type):
    def make(seed):
        return scale_by_apollo(4, scale_type=scale_type, key=seed)

    rms = first_update_rms(make, shape)
    np.testing.assert_allclose(rms, rms[0], rtol=1e-6)
    np.testing.assert_allclose(rms, 1, rtol=0.35)


@pytest.mark.parametrize("shape", [(1, 64), (64, 1)])
def test_a_matrix_with_a_side_of_one_gets_adam(shape):
    tx, adam = scale_by_apollo(1, scale=128.0), optax.scale_by_adam(eps=1e-6)
    params = {"w": jnp.zeros(shape)}
    states = [tx.init(params), adam.init(params)]
    for seed in range(3):
        gradient = {"w": normal(seed, shape)}
        actual, states[0] = tx.update(gradient, states[0])
        expected, states[1] = adam.update(gradient, states[1])
        chex.assert_trees_all_close(actual, expected, rtol=1e-6)


def test_stacked_vectors_get_adam():
    tx = scale_by_apollo(2, weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    state = tx.init({"w": jnp.zeros((3, 1, 8)), "v": jnp.zeros((3, 2, 8))})
    assert state.mu["w"].shape == (3, 1, 8)
    assert state.norm["w"].shape == ()
    assert state.norm["v"].shape == (3,)


@pytest.mark.parametrize("projection", ["random", "rademacher", sparse_projection])
@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ((3, 6, 8), ApolloDimensionNumbers(1, 2)),
        ((2, 3, 8), ApolloDimensionNumbers((0, 1), 2)),
    ],
)
def test_moments_at_full_rank_are_those_of_the_gradient(projection, shape, numbers):
    tx = scale_by_apollo(9, projection=projection, weight_dimension_numbers=numbers)
    gradient = normal(0, shape)
    _, state = tx.update(gradient, tx.init(gradient))
    expected = 0.1 * gradient.reshape(*state.mu.shape)
    np.testing.assert_allclose(state.mu, expected, rtol=1e-6)


def test_warns_of_small_matrices_at_rank_one():
    params = {"small": jnp.zeros((31, 64)), "large": jnp.zeros((32, 64))}
    with pytest.warns(UserWarning, match=r"below 32.*: 'small' \(1 in all\)") as caught:
        apollo_mini(1e-2).init(params)
    assert len(caught) == 1


@pytest.mark.filterwarnings("error:at rank 1")
def test_does_not_warn_of_small_matrices_that_get_no_large_updates():
    params = {"small": jnp.zeros((31, 64)), "vector": jnp.zeros((1, 64))}
    apollo(1e-2, rank=4).init(params)
    apollo_mini(1e-2, scale=31.0).init(params)
    apollo_mini(1e-2, weight_dimension_numbers={"small": None, "vector": None}).init(
        params
    )
    jax.jit(lambda scale: apollo_mini(1e-2, scale=scale).init(params))(128.0)


def test_factors_of_stacked_and_separate_layers_have_one_distribution():
    """All layers have the same gradient, and projections of their own."""
    layers, gradient = 100, normal(0, (8, 12))
    stacked = jnp.broadcast_to(gradient, (layers, 8, 12))
    make = functools.partial(scale_by_apollo, 2, projection="random")
    tx = make(weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    update, _ = tx.update(stacked, tx.init(stacked))
    separate = {f"layer_{i}": gradient for i in range(layers)}
    tx = make()
    updates, _ = tx.update(separate, tx.init(separate))
    # One channel of each layer, because all channels of a matrix share its projection.
    of_stack = np.asarray(update[:, 0, 0] / gradient[0, 0])
    of_leaves = np.array([float(u[0, 0] / gradient[0, 0]) for u in updates.values()])
    assert len(np.unique(of_stack)) == layers
    assert stats.ks_2samp(of_stack, of_leaves).pvalue > 1e-3


# The memory of the state.


@pytest.mark.parametrize("model", PAPER_MODELS)
@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("mini", [False, True])
def test_state_has_moments_one_norm_per_matrix_a_count_and_a_key(
    model, stacked, moment_dtype, mini
):
    hidden, intermediate, layers, rank = PAPER_MODELS[model]
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
        pairs = itertools.product(range(layers), kernels.items())
        params = {f"{i}_{name}": leaf(shape) for i, (name, shape) in pairs}
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
    bytes_per_number = jnp.dtype(moment_dtype).itemsize
    assert nbytes((state.mu, state.nu)) == 2 * channels * rank * bytes_per_number
    assert nbytes(state.norm) == 4 * layers * len(kernels)
    assert nbytes((state.count, state.key)) == 4 + 8
    assert state.projection is None


def test_state_stores_the_projections_of_an_svd():
    params = {"stack": jnp.ones((3, 6, 10)), "bias": jnp.ones(4)}
    numbers = {"stack": ApolloDimensionNumbers(1, 2), "bias": None}
    tx = scale_by_apollo(2, projection="svd", weight_dimension_numbers=numbers)
    shapes = jax.tree.map(jnp.shape, tx.init(params).projection)
    assert shapes == {"stack": (3, 2, 6), "bias": ()}


# Gradients of any magnitude.


@combinations_of(
    "dtype, magnitudes, scale_type, projection",
    [
        ("float32", [1e-30, 1e15, 1e-15, 1.0, 1e15, 1e-30, 0.0, 1e15]),
        ("bfloat16", [1e-30, 1e15, 1e-15, 1.0, 1e15, 1e-30, 0.0, 1e15]),
        ("float16", [6e-8, 15000.0, 1e-4, 0.0, 15000.0, 6e-8]),
    ],
    ["channel", "tensor"],
    ["random", "rademacher", "svd"],
)
def test_extreme_gradients_give_finite_updates_and_state(
    dtype, magnitudes, scale_type, projection
):
    def gradient(seed, magnitude):
        return {
            "kernel": (normal(seed, (16, 24)) * magnitude).astype(dtype),
            "bias": (normal(seed, 8) * magnitude).astype(dtype),
        }

    gradients = [gradient(seed, magnitude) for seed, magnitude in enumerate(magnitudes)]
    tx = scale_by_apollo(4, scale_type=scale_type, scale=128.0, projection=projection)
    chex.assert_tree_all_finite(gradients)
    for order in (gradients, gradients[::-1]):
        updates, states = run(tx, order)
        chex.assert_tree_all_finite((updates, states))
        chex.assert_trees_all_equal_dtypes(*updates, gradients[0])


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_updates_are_zero_where_random_signs_cancel(scale_type):
    """Rounding leaves about 1e-8 of the gradient, which is no estimate of its norm."""
    gradient = jnp.broadcast_to(normal(0, (1, 32)), (16, 32))

    def two_steps(key):
        tx = scale_by_apollo(
            1, scale_type=scale_type, scale=16.0, update_proj_gap=1, key=key
        )
        first, state = tx.update(gradient, tx.init(gradient))
        remembered = state.norm
        second, _ = tx.update(gradient, state)
        return jnp.stack([jnp.linalg.norm(x) for x in (first, second)]), remembered

    norms, remembered = jax.jit(jax.vmap(two_steps))(jnp.arange(100))
    first, second = np.asarray(norms).T
    cancelled = first == 0
    # A fifth of the draws has as many positive signs as negative ones.
    assert 5 < cancelled.sum() < 40
    np.testing.assert_array_equal(remembered == 0, cancelled)
    # Adam's first update has an RMS of 1. Normal draws may leave a small |R| too.
    rms_one = np.linalg.norm(np.ones((16, 32)))
    assert first.max() < 20 * rms_one
    # The second draw may cancel after one that did not.
    assert ((second == 0) & ~cancelled).any()
    assert second.max() < 20 * rms_one


def test_float16_updates_saturate():
    # The only gradient entry is large, and the entry of P that multiplies it is small.
    # The scaling factor is large, and the update exceeds 65504, the largest float16.
    gradient = jnp.zeros((2, 4), jnp.float16).at[0, 0].set(60000.0)

    def small_first_entry(key, shape):
        return jnp.array([[1e-5, 1.0]])

    tx = scale_by_apollo(1, scale_type="tensor", projection=small_first_entry)
    (update,), (state,) = run(tx, [gradient])
    assert update[0, 0] == jnp.finfo(jnp.float16).max
    assert state.norm > 65504


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
def test_infinite_gradients_stay_visible_in_the_moments(moment_dtype):
    tx = scale_by_apollo(2, moment_dtype=moment_dtype)
    params = {"matrix": jnp.ones((4, 6)), "vector": jnp.ones(4)}
    _, state = tx.update(jax.tree.map(lambda x: x * jnp.inf, params), tx.init(params))
    updates, _ = tx.update(params, state)
    assert all(jnp.isnan(update).all() for update in updates.values())


def test_projections_are_compared_by_identity():
    """Their own ``==`` may compare arrays, or call different projections equal."""

    @dataclasses.dataclass
    class Fixed:
        value: jax.Array

        def __call__(self, key, shape):
            return self.value

    gradient = normal(0, (4, 6))
    projections = [normal(seed, (2, 4)) for seed in (1, 2)]
    optimizers = [scale_by_apollo(2, projection=Fixed(p)) for p in projections]
    states = [tx.update(gradient, tx.init(gradient))[1] for tx in optimizers]
    for projection, state in zip(projections, states, strict=True):
        np.testing.assert_allclose(state.mu, 0.1 * projection @ gradient, rtol=1e-4)


def test_leaves_whose_projections_have_one_shape_share_a_trace():
    calls = []

    def projection(key, shape):
        calls.append(shape)
        return jnp.ones(shape)

    params = {str(i): normal(i, (4, 6)) for i in range(5)} | {"wide": normal(0, (4, 7))}
    tx = scale_by_apollo(2, projection=projection)
    state = tx.init(params)
    calls.clear()
    jax.jit(tx.update)(params, state)
    assert calls == [(2, 4)]


def test_projection_gap_may_exceed_the_largest_count():
    gradient = normal(0, (4, 6))
    actual, expected = (
        tx.update(gradient, tx.init(gradient))[0]
        for tx in (scale_by_apollo(2, update_proj_gap=sys.maxsize), scale_by_apollo(2))
    )
    chex.assert_trees_all_equal(actual, expected)


def test_moments_accumulate_bfloat16_gradients_in_float32():
    # In bfloat16, adding 0.001 R^2 to nu would not change nu, because that is less than
    # half of the last digit.
    gradients = [jnp.ones((4, 4), jnp.bfloat16)] * 20
    _, (*_, state) = run(scale_by_apollo(2), gradients)
    in_float32 = [g.astype(jnp.float32) for g in gradients]
    _, (*_, wide) = run(scale_by_apollo(2), in_float32)
    assert state.nu.dtype == jnp.float32
    np.testing.assert_allclose(state.nu, wide.nu, rtol=1e-6)


def test_channels_without_a_gradient_divide_nothing_by_zero():
    gradient = normal(0, (8, 16)).at[:, 3].set(0.0)
    tx = scale_by_apollo(2)
    update = checkify.checkify(jax.jit(tx.update), errors=checkify.nan_checks)
    error, (updates, _) = update(gradient, tx.init(gradient))
    error.throw()
    assert (updates[:, 3] == 0).all()
    # The check sees a gradient of NaN.
    error, _ = update(gradient.at[0, 0].set(jnp.nan), tx.init(gradient))
    with pytest.raises(checkify.JaxRuntimeError, match="nan"):
        error.throw()


def test_nan_stays_in_its_leaf():
    gradient = {"a": normal(0, (4, 6)), "b": normal(1, (4, 6)), "bias": normal(0, 3)}
    broken = gradient | {"a": gradient["a"].at[0, 0].set(jnp.nan)}
    tx = scale_by_apollo(2)
    updates, states = run(tx, [gradient, broken, gradient])
    expected, expected_states = run(tx, [gradient] * 3)
    assert jnp.isnan(updates[1]["a"]).any()

    def of_leaf(name, updates, states):
        fields = [(state.mu, state.nu, state.norm) for state in states]
        return [[tree[name] for tree in trees] for trees in (updates, *fields)]

    for name in ("b", "bias"):
        chex.assert_trees_all_equal(
            of_leaf(name, updates, states), of_leaf(name, expected, expected_states)
        )


def test_limiter_allows_growth_after_zero_gradients():
    """An expert without tokens, or zero weights after it, give such gradients."""
    zero, gradient = jnp.zeros((4, 6)), normal(0, (4, 6))
    updates, _ = run(scale_by_apollo(2), [zero, zero, gradient])
    assert (updates[0] == 0).all()
    assert (updates[1] == 0).all()
    assert jnp.linalg.norm(updates[2]) > 0.5
    _, (before, _, state) = run(scale_by_apollo(2), [gradient, zero, gradient])
    np.testing.assert_allclose(state.norm, before.norm * 1.01, rtol=1e-5)
    assert state.norm > 0


def test_scale_front_changes_the_stored_norm_but_not_the_first_update():
    gradient = normal(0, (4, 6))
    (front,), (front_state,) = run(
        scale_by_apollo(2, scale=9.0, scale_front=True), [gradient]
    )
    (back,), (back_state,) = run(scale_by_apollo(2, scale=9.0), [gradient])
    np.testing.assert_allclose(front, back, rtol=1e-6)
    np.testing.assert_allclose(front_state.norm, 3 * back_state.norm, rtol=1e-6)


def test_shard_map_takes_replicated_leaves():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    replicated, sharded = jax.P(), jax.P("data")
    params = {"kernel": normal(0, (4, 6)), "bias": normal(0, 3)}
    tx = scale_by_apollo(2)
    state = tx.init(params)

    @jax.jit
    @jax.shard_map(
        mesh=mesh,
        in_specs=(replicated, replicated, sharded),
        out_specs=replicated,
    )
    def step(params, state, weights):
        local = jax.tree.map(lambda p: p * weights.sum(), params)
        return tx.update(jax.lax.pmean(local, "data"), state)

    actual = step(params, state, jnp.arange(8.0))
    expected = tx.update(jax.tree.map(lambda p: p * 3.5, params), state)
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shape", [(8, 16), (3, 8, 16)])
@pytest.mark.parametrize("gap", [1, 4])
def test_a_gradient_of_zero_makes_no_singular_vectors(shape, gap):
    """LoRA's A has such gradients at first, and an expert that sees no token."""
    numbers = ApolloDimensionNumbers(-2, -1)
    tx = scale_by_apollo(
        2, projection="svd", update_proj_gap=gap, weight_dimension_numbers=numbers
    )
    zero = np.zeros(shape, np.float32)
    # The first rows are dead. They are what an SVD of zero would choose.
    gradient = normal(0, shape).at[..., :2, :].set(0)
    _, states = run(tx, [zero, gradient, zero, zero])
    assert not np.asarray(states[0].projection).any()
    expected = np.linalg.svd(gradient, full_matrices=False)[0][..., :2]
    agreement = np.sum(expected.swapaxes(-1, -2) * states[1].projection, axis=-1)
    np.testing.assert_allclose(np.abs(agreement), 1, atol=1e-4)
    # Neither a step between refreshes nor a refresh replaces it by that of zero.
    for later in states[2:]:
        np.testing.assert_array_equal(later.projection, states[1].projection)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("shape", [(8, 16), (64, 128)])
def test_a_gradient_that_is_not_finite_makes_no_singular_vectors(shape, bad):
    """XLA for CPUs leaves NaN out of maxima over larger arrays."""
    tx = scale_by_apollo(2, projection="svd", update_proj_gap=1)
    gradient = normal(0, shape)
    broken = gradient.at[1, 2].set(bad)
    _, states = run(tx, [broken, gradient, broken])
    assert not np.asarray(states[0].projection).any()
    assert np.asarray(states[1].projection).any()
    np.testing.assert_array_equal(states[2].projection, states[1].projection)


def test_one_layer_without_a_gradient_gets_its_singular_vectors_later():
    numbers = ApolloDimensionNumbers(1, 2)
    tx = scale_by_apollo(2, projection="svd", weight_dimension_numbers=numbers)
    gradients = normal(0, (3, 2, 8, 16))
    first = gradients[0].at[1].set(0)
    _, states = run(tx, [first, gradients[1], gradients[2]])
    assert not np.asarray(states[0].projection[1]).any()
    # The other layer keeps its own until the next refresh.
    for later in states[1:]:
        np.testing.assert_array_equal(later.projection[0], states[0].projection[0])
    expected = np.linalg.svd(gradients[1, 1], full_matrices=False)[0][:, :2].T
    agreement = np.sum(expected * states[1].projection[1], axis=-1)
    np.testing.assert_allclose(np.abs(agreement), 1, atol=1e-4)
    np.testing.assert_array_equal(states[2].projection[1], states[1].projection[1])


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int64])
def test_a_narrow_batch_index_does_not_overflow(dtype):
    numbers = ApolloDimensionNumbers(2, 3)
    tx = scale_by_apollo(1, weight_dimension_numbers=numbers)
    gradient = normal(0, (4, 128, 4, 8))
    updates, _ = tx.update(gradient, tx.init(gradient))
    one = gradient[3:]
    update, _ = tx.update(one, tx.init(one), batch_index=dtype(3))
    np.testing.assert_allclose(update, updates[3:], rtol=1e-5)

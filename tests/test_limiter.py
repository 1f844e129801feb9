"""The norm-growth limiter: on norms, as a transformation, and inside APOLLO."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

from apollo_optax import (
    ApolloDimensionNumbers,
    LimitNormGrowthState,
    apollo,
    limit_norm_growth,
    scale_by_apollo,
)
from apollo_optax._limiter import limit_norm
from tests.helpers import normal, run

pytestmark = pytest.mark.usefixtures("quick_compilation")

LIMIT = 1.01


def test_limit_norm_limits_growth_only():
    norm, remembered = jnp.array([2.0, 1.005, 0.5]), jnp.ones(3)
    factor, new = limit_norm(norm, remembered, LIMIT)
    np.testing.assert_allclose(norm * factor, [LIMIT, 1.005, 0.5], rtol=1e-6)
    np.testing.assert_allclose(new, norm * factor)


def test_zero_norm_is_not_remembered():
    # Nothing is limited before the first non-zero norm. A later zero changes nothing.
    factor, remembered = limit_norm(jnp.array(0.0), jnp.array(0.0), LIMIT)
    assert (factor, remembered) == (1, 0)
    factor, remembered = limit_norm(jnp.array(3.0), remembered, LIMIT)
    assert (factor, remembered) == (1, 3)
    factor, remembered = limit_norm(jnp.array(0.0), remembered, LIMIT)
    assert remembered == 3


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_norm_that_is_not_finite_is_not_remembered(bad):
    for before in (0.0, 2.0):
        _, remembered = limit_norm(jnp.array(bad), jnp.array(before), LIMIT)
        assert remembered == before


def test_infinite_limit_limits_nothing():
    # A schedule can't return None, so infinity is its way to switch the limiter off.
    sizes = jnp.array([1, 50, 2, 9])[:, None, None]
    grads = jax.random.normal(jax.random.key(0), (4, 6, 8)) * sizes
    free = scale_by_apollo(2, norm_growth_limit=None)
    infinite = scale_by_apollo(2, norm_growth_limit=jnp.inf)
    states = [tx.init(grads[0]) for tx in (free, infinite)]
    for gradient in grads:
        expected, states[0] = free.update(gradient, states[0])
        actual, states[1] = infinite.update(gradient, states[1])
        np.testing.assert_allclose(actual, expected, rtol=1e-6)


def test_transformation_limits_each_leaf_by_itself():
    tx = limit_norm_growth(LIMIT)
    first = {
        "kernel": jnp.full((2, 2), 0.5),
        "bias": jnp.full(4, 2.0),
        "scalar": jnp.array(3.0),
    }
    state = tx.init(first)
    zeros = jax.tree.map(lambda _: jnp.array(0.0), first)
    chex.assert_trees_all_equal(state, LimitNormGrowthState(zeros))
    updates, state = tx.update(first, state)
    chex.assert_trees_all_equal(updates, first)
    chex.assert_trees_all_close(state.norm, {"kernel": 1.0, "bias": 4.0, "scalar": 3.0})
    larger = {
        "kernel": first["kernel"] * 10,
        "bias": first["bias"],
        "scalar": first["scalar"] / 2,
    }
    updates, state = jax.jit(tx.update)(larger, state)
    chex.assert_trees_all_close(
        state.norm, {"kernel": LIMIT, "bias": 4.0, "scalar": 1.5}
    )
    chex.assert_trees_all_close(updates["kernel"], first["kernel"] * LIMIT)


def test_norms_keep_the_dtype_that_they_began_with():
    with jax.enable_x64(True):
        tx = limit_norm_growth()
        state = tx.init(jnp.zeros(3, jnp.float64))
        _, after = tx.update(jnp.ones(3, jnp.float32), state)
        assert after.norm.dtype == state.norm.dtype == jnp.float64


def test_batch_elements_are_limited_separately():
    # The batch axis is the last one, as in MaxText's scanned layers.
    numbers = ApolloDimensionNumbers(0, 1)
    tx = limit_norm_growth(LIMIT, weight_dimension_numbers=numbers)
    gradient = jnp.ones((2, 2, 3))
    _, state = tx.update(gradient, tx.init(gradient))
    updates, state = tx.update(gradient * jnp.array([1.0, 5.0, 0.1]), state)
    np.testing.assert_allclose(state.norm, [2.0, 2 * LIMIT, 0.2], rtol=1e-6)
    np.testing.assert_allclose(updates[0, 0], [1.0, LIMIT, 0.1], rtol=1e-6)


def test_matches_the_limiter_inside_scale_by_apollo():
    sizes = jnp.array([1, 9, 2, 0.1, 30])[:, None, None]
    grads = sizes * jax.random.normal(jax.random.key(0), (5, 8, 16))
    whole = scale_by_apollo(4, norm_growth_limit=LIMIT)
    unlimited = scale_by_apollo(4, norm_growth_limit=None)
    alone = limit_norm_growth(LIMIT)
    states = [tx.init(grads[0]) for tx in (whole, unlimited, alone)]
    for t, gradient in enumerate(grads, start=1):
        expected, states[0] = whole.update(gradient, states[0])
        direction, states[1] = unlimited.update(gradient, states[1])
        # scale_by_apollo corrects the bias after its limiter, so the limiter outside
        # gets updates without the correction.
        correction = np.sqrt(1 - 0.999**t) / (1 - 0.9**t)
        limited, states[2] = alone.update(direction / correction, states[2])
        np.testing.assert_allclose(limited * correction, expected, rtol=1e-5)
        np.testing.assert_allclose(states[2].norm, states[0].norm, rtol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_updates_keep_their_dtype_and_norms_are_float32(dtype):
    tx = limit_norm_growth(LIMIT)
    gradient = jnp.ones((4, 4), dtype)
    state = tx.init(gradient)
    updates, new = tx.update(gradient, state, params=None, value=1.0)
    assert updates.dtype == dtype
    assert state.norm.dtype == new.norm.dtype == jnp.float32


# The limiter does not remember norms that depend on `eps` or the 1e-8, rather than on
# the gradient.


def update_norms(scales, **options):
    """Norms of APOLLO's updates, of gradients with the given sizes: ``(runs, steps)``.

    All runs have the same gradients but for their sizes. The norms are means over 16
    matrices, and the correction for bias, which comes after the limiter, is undone.
    """
    tx = scale_by_apollo(
        key=3,
        projection="random",
        weight_dimension_numbers=ApolloDimensionNumbers(1, 2),
        **options,
    )
    steps = jnp.arange(1, scales.shape[1] + 1)
    corrections = jnp.sqrt(1 - 0.999**steps) / (1 - 0.9**steps)
    gradients = normal(0, (scales.shape[1], 16, 12, 20))

    def step(state, inputs):
        update, state = tx.update(jnp.multiply(*inputs), state)
        return state, jnp.mean(jnp.linalg.norm(update, axis=(1, 2)))

    def run(scale):
        return jax.lax.scan(step, tx.init(gradients[0]), (gradients, scale))[1]

    return jax.jit(jax.vmap(run))(scales) / corrections


every_scale_type = pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "scale_type": "channel"},
        {"rank": 1, "scale_type": "tensor", "scale": 128.0},
        {"rank": 4, "scale_type": "tensor", "scale": 4.0, "scale_front": True},
    ],
    ids=["channel", "tensor", "scale_front"],
)


@every_scale_type
def test_vanishing_gradients_do_not_hold_later_updates_down(options):
    sizes, odd = jnp.array([1, 1e-3, 1e-5]), 10.0 ** jnp.arange(-12.0, 0.0)
    at = np.array([0, 40])
    steps = jnp.arange(51)
    # One gradient is odd, of 12 sizes at 2 steps, where the others have 3 sizes.
    is_odd = steps == at[:, None, None, None]
    runs = sizes[:, None, None] * odd[:, None] ** is_odd
    # LoRA's A starts with vanishing gradients, since B is zero. So does a kernel behind
    # a head of zeros.
    start = jnp.minimum(jnp.geomspace(1e-9, 1e9, steps.size), 1.0)
    usual = sizes[:, None] * jnp.ones(steps.size)

    norms = update_norms(
        jnp.concatenate([runs.reshape(-1, steps.size), usual, start[None]]), **options
    )
    usual_norms = norms[-4:-1]
    for index, step in enumerate(at):
        after = norms[:-4].reshape(*runs.shape)[index, :, :, step + 10]
        expected = jnp.broadcast_to(usual_norms[:, step + 10, None], after.shape)
        np.testing.assert_allclose(after, expected, rtol=0.05)
    assert norms[-1, -1] > 0.95 * usual_norms[0, -1]


def test_the_limiter_limits_growth_that_eps_does_not_decide():
    scales = jnp.ones((2, 21)).at[1, 20].set(1e3)
    limited = update_norms(scales, rank=4)
    assert float((limited[:, 1:] / limited[:, :-1]).max()) < 1.01001
    free = update_norms(scales, rank=4, norm_growth_limit=None)
    assert free[1, 20] > 2 * free[1, 19]


# The squares of a gradient underflow in float32 with a factor of 1e-25.
@pytest.mark.parametrize("factor", [0.0, 1e-25])
@pytest.mark.parametrize(
    "tx",
    [
        scale_by_apollo(2),
        scale_by_apollo(1, scale_type="tensor", scale=128.0),
        scale_by_apollo(4),
    ],
    ids=["channel", "tensor", "full rank"],
)
def test_a_few_vanishing_gradients_do_not_switch_the_limiter_off(tx, factor):
    gradient = normal(1, (4, 6)).at[:, 2].multiply(factor).at[1].multiply(factor)
    state = tx.init(gradient)
    for _ in range(3):
        _, state = tx.update(gradient, state)
        assert state.norm > 0


def test_a_gradient_of_nan_is_not_remembered():
    tx = scale_by_apollo(2)
    gradient = normal(1, (4, 6))
    _, state = tx.update(gradient, tx.init(gradient))
    _, after_nan = tx.update(gradient.at[0, 0].set(jnp.nan), state)
    assert after_nan.norm == state.norm > 0


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_a_matrix_without_a_gradient_computes_no_nan(scale_type):
    tx = scale_by_apollo(2, scale_type=scale_type)
    gradient = jnp.zeros((4, 6))
    checked = checkify.checkify(tx.update, errors=checkify.nan_checks)
    error, _ = checked(gradient, tx.init(gradient))
    error.throw()


def test_a_norm_that_will_pass_is_not_remembered():
    norm, remembered = jnp.array([2.0, 2.0, 1.0]), jnp.array([5.0, 5.0, 0.0])
    is_transient = jnp.array([True, False, True])
    factor, new = limit_norm(norm, remembered, LIMIT, is_transient=is_transient)
    np.testing.assert_allclose(factor, 1)
    np.testing.assert_allclose(new, [5.0, 2.0, 0.0])


def train_behind_a_zero_head(tx, steps=300):
    """The loss, and how far the kernel between moved, of two layers and a zero head."""
    inputs, hidden = normal(0, (128, 16)), normal(1, (16, 24)) / 4
    targets = jnp.tanh(inputs @ hidden) @ normal(2, (24, 4))
    params = {
        "first": normal(3, (16, 24)) / 4,
        "second": normal(4, (24, 24)) / 5,
        "lm_head": jnp.zeros((24, 4)),
    }

    def loss(params):
        first = jnp.tanh(inputs @ params["first"])
        outputs = jnp.tanh(first @ params["second"]) @ params["lm_head"]
        return jnp.mean((outputs - targets) ** 2)

    def step(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    @jax.jit
    def train(params):
        (new, _), _ = jax.lax.scan(step, (params, tx.init(params)), None, length=steps)
        return loss(new), jnp.linalg.norm(new["second"] - params["second"])

    return train(params)


def test_kernels_behind_a_zero_head_move_as_without_the_limiter():
    rate = optax.warmup_cosine_decay_schedule(0.0, 1e-3, 30, 300, 1e-4)
    loss, moved = train_behind_a_zero_head(apollo(rate, rank=4))
    free, free_moved = train_behind_a_zero_head(
        apollo(rate, rank=4, norm_growth_limit=None)
    )
    assert loss < 1.05 * free
    assert moved > 0.9 * free_moved


def test_norms_after_a_pause_are_remembered():
    """The first moment has decayed, so the limiter begins again at a small norm."""
    gradients = [normal(seed, (16, 24)) for seed in range(100)]
    zeros = [jnp.zeros((16, 24))] * 50
    steps = [*gradients, *zeros, *gradients]

    def sizes(limit):
        tx = scale_by_apollo(4, norm_growth_limit=limit)
        return [float(jnp.linalg.norm(u)) for u in run(tx, steps, jit=True)[0]]

    limited, free = sizes(1.01), sizes(None)
    # The limit is 1.01 per step. The bias correction grows by another 3%.
    assert limited[160] < 1.04 * 1.01**10 * limited[150]
    assert limited[160] < 0.6 * limited[99] < free[160]

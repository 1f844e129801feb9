"""A momentum in int8: its numbers, state, shardings and arguments."""

import functools
import math
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    Int8TraceState,
    apollo_zero,
    int8_trace,
    scale_by_apollo,
    scale_by_flattening,
    state_sharding,
)
from benchmarks.hlo import collectives
from tests.helpers import AXIS_TYPES, combinations_of, make_mesh, normal, put, run
from tests.test_traffic import CASES

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)
PARAMS = {"kernel": normal(0, (16, 24)), "bias": normal(1, (24,))}


def stored(M):
    """The momentum of one matrix as int8 holds it, and half a step of each code."""
    sizes = np.abs(M)
    largest = np.minimum(sizes.max(1, keepdims=True), sizes.max(0, keepdims=True))
    step = largest / 127
    return step * np.round(M / np.where(step == 0, 1, step)), step / 2


# Numbers.


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("batch_axis", [0, 1, 2])
def test_is_a_momentum_that_is_rounded(batch_axis, nesterov):
    sides = [axis for axis in range(3) if axis != batch_axis]
    shape = np.insert([16, 24], batch_axis, 2)
    # Rows, columns and matrices of very different sizes.
    sizes = np.exp(3 * np.asarray(normal(9, shape)).max(2, keepdims=True))
    gradients = [sizes * np.asarray(normal(k, shape)) for k in range(4)]
    numbers = ApolloDimensionNumbers(*sides)
    tx = int8_trace(0.9, nesterov, weight_dimension_numbers=numbers)
    updates, states = run(tx, [jnp.asarray(g, jnp.float32) for g in gradients])
    for index in range(2):
        M = kept = error = np.zeros((16, 24))
        for gradient, update in zip(gradients, updates, strict=True):
            G = np.take(gradient, index, batch_axis)
            M = 0.9 * kept + G
            expected = G + 0.9 * M if nesterov else M
            actual = np.take(np.asarray(update), index, batch_axis)
            kept, error = stored(M)
            # A value near the middle of two codes may be rounded either way.
            bound = 1e-5 * np.abs(expected) + 1e-3 * error
            assert (np.abs(actual - expected) <= bound).mean() > 0.99
            np.testing.assert_array_less(np.abs(actual - expected), 3 * error + bound)
        assert (np.abs(kept - M) <= error * (1 + 1e-6)).all()
    assert states[-1].codes.shape == tuple(shape)
    assert states[-1].row.shape == (2, 16)
    assert states[-1].column.shape == (2, 24)


def test_stays_near_the_momentum_in_float32():
    gradients = normal(0, (200, 32, 48))
    numbers = ApolloDimensionNumbers()

    def last(tx):
        def step(state, gradient):
            update, state = tx.update(gradient, state)
            return state, update

        return jax.lax.scan(step, tx.init(gradients[0]), gradients)[1][-1]

    exact = last(optax.trace(0.9))
    actual = last(int8_trace(0.9, weight_dimension_numbers=numbers))
    error = np.linalg.norm(actual - exact) / np.linalg.norm(exact)
    assert 0 < error < 0.02


def test_a_large_entry_leaves_other_rows_and_columns_precise():
    gradient = normal(0, (16, 24)).at[3, 5].set(1e6)
    tx = int8_trace(1 / 2)
    _, state = tx.update(gradient, tx.init(gradient))
    zero = jnp.zeros_like(gradient)
    kept, _ = tx.update(zero, state)
    np.testing.assert_allclose(2 * kept, gradient, rtol=1e-3, atol=0.02)


def test_other_leaves_pass_through_without_a_state():
    params = PARAMS | {"embedding": normal(2, (8, 4)), "scalar": jnp.ones(())}
    tx = int8_trace(0.9)
    state: Any = tx.init(params)
    others = {name: optax.MaskedNode() for name in params if name != "kernel"}
    for tree in state:
        assert {name: tree[name] for name in others} == others
    _, state = tx.update(params, state)
    updates, _ = tx.update(params, state)
    for name in others:
        assert updates[name] is params[name]
    assert jnp.abs(updates["kernel"] - 1.9 * params["kernel"]).max() < 0.05


def test_warns_of_leaves_that_may_be_matrices():
    with pytest.warns(UserWarning, match="there is no momentum for 1 leaf of three"):
        int8_trace(0.9).init(PARAMS | {"stack": normal(2, (2, 8, 12))})
    with pytest.warns(UserWarning, match=r"of shape \(24,\), which has no momentum"):
        int8_trace(0.9).init(PARAMS["bias"])


@pytest.mark.parametrize("relative", [False, True])
@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9, "int8_momentum": True}])
def test_apollo_zero_warns_once_of_leaves_that_may_be_matrices(momentum, relative):
    params = PARAMS | {"stack": normal(2, (2, 8, 12))}
    with pytest.warns(UserWarning, match="Adam trains 1 leaf of three or") as warned:
        apollo_zero(0.1, relative=relative, **momentum).init(params)
    assert len(warned) == 1


@pytest.mark.parametrize("stored", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("computed", ["float32", "float64"])
def test_the_state_keeps_its_dtypes(stored, computed):
    """A checkpoint may restore rows and columns in a dtype other than a gradient's."""
    with jax.enable_x64(True):
        gradient = normal(0, (8, 12), computed)
        tx = int8_trace(0.9)
        state: Any = tx.init(gradient)
        narrow = state._replace(
            row=state.row.astype(stored), column=state.column.astype(stored)
        )
        _, state = tx.update(gradient, narrow)
        assert [x.dtype for x in state] == ["int8", stored, stored]
        kept, _ = tx.update(jnp.zeros_like(gradient), state)
        # Rounding the largest entry down to bfloat16 may clip it by half a percent.
        share = 1 / 250 + (1 / 250 if stored == "bfloat16" else 0)
        error = np.abs(np.asarray(kept) / 0.9 - np.asarray(gradient))
        assert error.max() <= share * np.abs(gradient).max()


@pytest.mark.parametrize("decay", [0.9, 0.99])
def test_errors_of_rounding_add_up_to_a_bound(decay):
    """An entry without a gradient, which optax.trace forgets, keeps a small code."""
    gradient = normal(5, (16, 24))
    gradients = [gradient] * 100 + [gradient.at[::4, ::4].set(0)] * 200
    found = run(int8_trace(decay), gradients, jit=True)[0][-1]
    expected = np.asarray(run(optax.trace(decay), gradients, jit=True)[0][-1])
    _, half_a_step = stored(expected)
    error = np.abs(np.asarray(found) - expected) / (2 * half_a_step)
    assert error.max() <= 1.05 / (2 * (1 - decay))
    assert error[::4, ::4].max() > 0.5


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("shape", [(4, 6), (64, 128)])
def test_zeros_stay_and_what_is_not_finite_is_seen(shape, bad):
    """XLA for CPUs leaves NaN out of maxima over larger arrays."""
    zero = jnp.zeros(shape)
    tx = int8_trace(0.9, nesterov=True)
    update, state = tx.update(zero, tx.init(zero))
    chex.assert_trees_all_equal((update, state), (zero, tx.init(zero)))
    _, state = tx.update(zero.at[1, 2].set(bad), state)
    only = np.zeros(shape, bool)
    only[1, 2] = True
    for _ in range(3):
        update, state = tx.update(zero + 1, state)
        np.testing.assert_array_equal(~np.isfinite(update), only)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_updates_keep_their_dtype(dtype):
    gradient = normal(0, (4, 6), dtype)
    tx = int8_trace(0.9)
    update, state = tx.update(gradient, tx.init(gradient))
    assert update.dtype == dtype
    assert [x.dtype for x in jax.tree.leaves(state)] == ["int8", "float32", "float32"]


def test_magnitudes_of_float32_stay_in_range():
    for magnitude in (1e-30, 1e30):
        gradient = normal(0, (4, 6)) * magnitude
        tx = int8_trace(0.5)
        _, state = tx.update(gradient, tx.init(gradient))
        kept, _ = tx.update(jnp.zeros_like(gradient), state)
        np.testing.assert_allclose(
            2 * kept / magnitude, gradient / magnitude, atol=0.02
        )


# APOLLO-Zero with this momentum.


@pytest.mark.parametrize("momentum", [{}, {"momentum": 0.9}])
def test_relative_updates_change_no_structure_of_the_state(momentum):
    states = [
        jax.tree.structure(apollo_zero(0.1, relative=relative, **momentum).init(PARAMS))
        for relative in (False, True)
    ]
    assert states[0] == states[1]


def test_apollo_zero_with_a_momentum_in_int8():
    gradients = [PARAMS, jax.tree.map(lambda x: -x[::-1], PARAMS), PARAMS]
    settings: Any = {"rank": 2, "key": 3}
    chained = optax.chain(
        int8_trace(0.9, nesterov=True),
        scale_by_flattening(**settings),
        optax.scale_by_learning_rate(0.1),
    )
    expected, _ = run(chained, gradients, PARAMS)
    tx = apollo_zero(0.1, momentum=0.9, int8_momentum=True, **settings)
    actual, _ = run(tx, gradients, PARAMS)
    chex.assert_trees_all_close(actual, expected, atol=1e-6)
    # It is nearly that of a momentum in float32.
    wide, _ = run(apollo_zero(0.1, momentum=0.9, **settings), gradients, PARAMS)
    chex.assert_trees_all_close(actual, wide, atol=0.02)
    params = {"kernel": jnp.ones((64, 96)), "bias": jnp.ones(96)}
    assert apollo_optax.state_bytes(tx, params).kernels == 64 * 96 + 4 * (64 + 96)
    assert "momentum in int8" in apollo_optax.tabulate(tx, params)


# Meshes.


def sharded(case, mesh) -> Any:
    """The transformation, an abstract gradient, and the state with its shardings."""
    tx = int8_trace(0.9, weight_dimension_numbers=case.numbers)
    sharding = NamedSharding(mesh, case.spec)
    gradient = jax.ShapeDtypeStruct(case.shape, jnp.float32, sharding=sharding)
    state = jax.eval_shape(tx.init, gradient)
    places = state_sharding(state, gradient, weight_dimension_numbers=case.numbers)
    return tx, gradient, jax.tree.map(lambda x, s: x.update(sharding=s), state, places)


@combinations_of("name, axis_type", CASES, AXIS_TYPES)
def test_is_sharded_like_its_parameter_and_sends_maxima_only(name, axis_type):
    case, mesh = CASES[name], make_mesh(axis_type)
    tx, gradient, state = sharded(case, mesh)
    assert state.codes.sharding.is_equivalent_to(gradient.sharding, gradient.ndim)
    found = collectives(jax.jit(tx.update).lower(gradient, state).compile().as_text())
    assert {each.kind for each in found} <= {"all-reduce"}
    vectors = max(state.row.size, state.column.size)
    assert max((each.size for each in found), default=0) <= vectors


SMALL = [
    ((32, 64), P("data", "model"), ApolloDimensionNumbers()),
    ((8, 32, 40), P(None, "model", "data"), STACKED),
    ((4, 8, 64), P("model", "data"), ApolloDimensionNumbers((0, 1), 2)),
]


@combinations_of("shape, spec, numbers, axis_type", SMALL, AXIS_TYPES)
def test_eight_devices_compute_what_one_does(shape, spec, numbers, axis_type):
    mesh = make_mesh(axis_type)
    gradients = [normal(step, shape) for step in range(3)]
    tx = int8_trace(0.9, weight_dimension_numbers=numbers)
    expected = run(tx, gradients, jit=True)
    on_mesh = [put(mesh, gradient, spec) for gradient in gradients]
    updates, states = run(tx, on_mesh, jit=True)
    chex.assert_trees_all_equal(jax.device_get((updates, states)), expected)
    assert states[-1].codes.sharding.is_equivalent_to(on_mesh[0].sharding, len(shape))


def test_init_on_a_mesh():
    mesh = make_mesh(AxisType.Auto)
    params = {"kernel": put(mesh, normal(0, (16, 24)), P("data", "model"))}
    state: Any = int8_trace(0.9).init(params)
    assert isinstance(state, Int8TraceState)
    assert state.codes["kernel"].sharding.spec == P("data", "model")
    assert state.row["kernel"].sharding.spec == P("data")
    assert state.column["kernel"].sharding.spec == P("model")
    assert math.prod(state.codes["kernel"].sharding.shard_shape((16, 24))) == 48


# Arguments and states that do not fit.


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: int8_trace(1.0), ValueError, r"decay must be in \[0, 1\), got 1.0"),
        (lambda: int8_trace("0.9"), TypeError, "decay must be a number"),
        (lambda: int8_trace(0.9, 1), TypeError, "nesterov must be True or False"),
        (
            lambda: apollo_zero(0.1, int8_momentum=True),
            ValueError,
            "int8_momentum=True needs a momentum",
        ),
        (
            lambda: apollo_zero(0.1, momentum=0.9, int8_momentum="int8"),
            TypeError,
            "int8_momentum must be True or False, got 'int8'",
        ),
        (
            lambda: apollo_zero(0.1, momentum=1.5, int8_momentum=True),
            ValueError,
            r"momentum must be in \[0, 1\), got 1.5",
        ),
    ],
)
def test_rejects_arguments(make, kind, message):
    with pytest.raises(kind, match=message):
        make()


def test_rejects_states_that_do_not_fit():
    tx = int8_trace(0.9)
    with pytest.raises(ValueError, match="ScaleByApolloState without codes, row, col"):
        tx.update(PARAMS, scale_by_apollo(2).init(PARAMS))
    state = tx.init(PARAMS | {"kernel": jnp.ones((16, 23))})
    with pytest.raises(ValueError, match="'kernel'"):
        tx.update(PARAMS, state)
    with pytest.raises(ValueError, match="integer"):
        tx.init({"kernel": jnp.ones((4, 6), jnp.int32)})


def test_a_traced_decay():
    gradients = [PARAMS, PARAMS]

    @functools.partial(jax.jit, static_argnums=0)
    def last(traced, decay):
        tx = int8_trace(decay if traced else 0.9, nesterov=True)
        return run(tx, gradients)[0][-1]

    chex.assert_trees_all_close(last(True, 0.9), last(False, 0.9), atol=1e-5)

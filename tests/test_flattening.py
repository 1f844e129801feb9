"""scale_by_flattening and apollo_zero: updates, state, arguments, meshes."""

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
    ScaleByFlatteningState,
    apollo_zero,
    scale_by_apollo,
    scale_by_flattening,
    state_sharding,
)
from benchmarks.hlo import collectives, drawn_words
from tests import layerwise_models
from tests.helpers import AXIS_TYPES, combinations_of, make_mesh, normal, put, rms, run
from tests.test_spectrum import error, flattened
from tests.test_traffic import CASES, matrix_axes

METHODS = ["low_rank", "newton_schulz", "exact"]
every_method = pytest.mark.parametrize("method", METHODS)
pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)
PARAMS = {"kernel": normal(0, (16, 24)), "bias": normal(1, (24,))}


def update(tx, gradient, state=None, **extra) -> Any:
    state = tx.init(gradient) if state is None else state
    return jax.jit(tx.update)(gradient, state, **extra)[0]


# Updates.


@pytest.mark.parametrize("shape", [(16, 24), (24, 16)])
def test_update_is_the_flattened_gradient(shape):
    """Rows, which are inputs, are divided first, whichever side is smaller."""
    gradient = normal(0, shape) * np.exp(normal(1, (shape[0], 1)))
    G = np.asarray(gradient, np.float64)
    X = G / np.sqrt(np.mean(G**2, axis=1, keepdims=True))
    X = X / np.sqrt(np.mean(X**2, axis=0, keepdims=True))
    F = flattened(X, 0.5)
    actual = update(scale_by_flattening(method="exact"), gradient)
    np.testing.assert_allclose(actual, F / rms(F), rtol=1e-3, atol=1e-3)


@every_method
def test_input_and_output_axes_are_those_of_the_dimension_numbers(method):
    gradient = normal(0, (16, 24)) * np.exp(normal(1, (16, 1)))
    settings = {"method": method, "key": 3}
    expected = update(scale_by_flattening(**settings), gradient)
    numbers = ApolloDimensionNumbers(1, 0)
    tx = scale_by_flattening(**settings, weight_dimension_numbers=numbers)
    np.testing.assert_allclose(update(tx, gradient.T), expected.T, atol=1e-5)
    # Several axes form one side.
    numbers = ApolloDimensionNumbers(0, (1, 2))
    tx = scale_by_flattening(**settings, weight_dimension_numbers=numbers)
    split = update(tx, gradient.reshape(16, 4, 6))
    np.testing.assert_allclose(split.reshape(16, 24), expected, atol=1e-5)


@combinations_of("method, batch_axis", METHODS, [0, 1, 2])
def test_batch_elements_are_matrices_of_their_own(method, batch_axis):
    sizes = np.insert([16, 24], batch_axis, 3)
    sides = [axis for axis in range(3) if axis != batch_axis]
    numbers = ApolloDimensionNumbers(*sides)
    gradient = normal(0, tuple(sizes)) * 10 ** np.expand_dims(
        np.arange(3.0), [axis for axis in range(3) if axis != batch_axis]
    )
    tx = scale_by_flattening(method=method, weight_dimension_numbers=numbers)
    updates = np.moveaxis(update(tx, gradient), batch_axis, 0)
    assert np.asarray([rms(one) for one in updates]) == pytest.approx(1, rel=1e-4)
    # A slice with an index has its batch axis in front.
    numbers = ApolloDimensionNumbers(1, 2)
    tx = scale_by_flattening(method=method, weight_dimension_numbers=numbers)
    for i, (actual, one) in enumerate(
        zip(updates, np.moveaxis(gradient, batch_axis, 0), strict=True)
    ):
        own = update(tx, one[None], batch_index=i)
        np.testing.assert_allclose(actual, own[0], atol=1e-4)


@every_method
def test_other_leaves_get_adam(method):
    settings = {"b1": 0.8, "b2": 0.95, "eps": 1e-5}
    tx: Any = scale_by_flattening(method=method, **settings)
    adam = optax.scale_by_adam(**settings)
    gradients = [jax.tree.map(lambda x, k=k: k * x, PARAMS) for k in (1.0, -0.3)]
    updates, states = run(tx, gradients)
    expected, adam_states = run(adam, [g["bias"] for g in gradients])
    chex.assert_trees_all_close([u["bias"] for u in updates], expected, rtol=1e-6)
    assert int(states[-1].count) == 2
    for field in ("mu", "nu"):
        stored = getattr(states[-1], field)
        np.testing.assert_allclose(stored["bias"], getattr(adam_states[-1], field))
        assert stored["kernel"] == optax.MaskedNode()


def test_methods_agree():
    """The gradient has fewer large directions than the rank."""
    rng = np.random.default_rng(0)
    low = rng.normal(size=(64, 2)) @ rng.normal(size=(2, 96))
    gradient = jnp.asarray(low + 0.1 * rng.normal(size=(64, 96)), jnp.float32)
    exact = update(scale_by_flattening(method="exact"), gradient)
    for method in ("newton_schulz", "low_rank"):
        other = update(scale_by_flattening(method=method), gradient)
        assert error(other, exact) < 0.5 * error(gradient, exact)


def test_default_rank_is_an_eighth_of_the_smaller_side():
    gradient = normal(0, (96, 64))
    expected = update(scale_by_flattening(rank=8), gradient)
    np.testing.assert_array_equal(update(scale_by_flattening(), gradient), expected)
    small = normal(0, (5, 4))
    expected = update(scale_by_flattening(rank=1), small)
    np.testing.assert_array_equal(update(scale_by_flattening(), small), expected)
    # A rank above the matrix is no error.
    expected = update(scale_by_flattening(method="exact"), small)
    np.testing.assert_allclose(
        update(scale_by_flattening(rank=99), small), expected, atol=1e-6
    )


@pytest.mark.parametrize("rank", [8, 9, 16, 99])
def test_low_rank_of_half_the_side_or_more_is_exact(rank):
    gradient = normal(0, (16, 24))
    expected = update(scale_by_flattening(method="exact"), gradient)
    tx = scale_by_flattening(rank=rank)
    np.testing.assert_array_equal(update(tx, gradient), expected)
    # Nothing is drawn for it.
    jaxpr = jax.make_jaxpr(tx.update)(gradient, tx.init(gradient))
    assert "random_bits" not in str(jaxpr)


@every_method
def test_zero_and_nan_stay_in_their_leaf(method):
    shape = (16, 24)
    gradient = {
        "zero": jnp.zeros(shape),
        "nan": normal(0, shape).at[3, 4].set(jnp.nan),
        "inf": normal(0, shape).at[3, 4].set(jnp.inf),
        "other": normal(1, shape),
    }
    updates = update(scale_by_flattening(method=method), gradient)
    np.testing.assert_array_equal(updates["zero"], 0)
    assert jnp.isnan(updates["nan"]).any()
    assert not jnp.isfinite(updates["inf"]).all()
    alone = update(scale_by_flattening(method=method), {"other": gradient["other"]})
    np.testing.assert_allclose(updates["other"], alone["other"], atol=1e-6)


@combinations_of(
    "method, dtype", METHODS, ["float16", "bfloat16", "float32", "float64"]
)
def test_dtypes(method, dtype):
    with jax.enable_x64(dtype == "float64"):
        gradient = normal(0, (16, 24), dtype)
        tx = scale_by_flattening(method=method)
        actual = update(tx, gradient)
        assert actual.dtype == dtype
        assert rms(actual) == pytest.approx(1, rel=2e-3)
        wide = gradient.astype(jnp.promote_types(dtype, jnp.float32))
        assert error(actual, update(tx, wide)) < 2e-2


@combinations_of(
    "method, magnitude, dtype", METHODS, [1e-30, 1e15], [jnp.float32, jnp.bfloat16]
)
def test_any_magnitude(method, magnitude, dtype):
    gradient = normal(0, (16, 24), dtype)
    tx = scale_by_flattening(method=method)
    scaled = (magnitude * gradient.astype(jnp.float32)).astype(dtype)
    assert error(update(tx, scaled), update(tx, gradient)) < 0.02


# Random numbers.


def test_projections_differ_by_step_leaf_and_batch_element_only():
    gradient = normal(0, (16, 24))
    numbers = dict.fromkeys("ab", ApolloDimensionNumbers()) | {"c": STACKED}
    tx: Any = scale_by_flattening(key=5, weight_dimension_numbers=numbers)
    tree = {"a": gradient, "b": gradient, "c": jnp.stack([gradient, gradient])}
    updates, states = run(tx, [tree, tree], jit=True)
    different = [updates[0]["a"], updates[0]["b"], *updates[0]["c"], updates[1]["a"]]
    for i, one in enumerate(different):
        for other in different[:i]:
            assert jnp.abs(one - other).max() > 1e-3
    # The key stays, and the count alone says what is drawn.
    np.testing.assert_array_equal(states[1].key, states[0].key)
    again, _ = jax.jit(tx.update)(tree, states[0])
    chex.assert_trees_all_equal(again, updates[1])


def test_the_state_serves_every_method():
    gradient = normal(0, (16, 24))
    states = [scale_by_flattening(method=m).init(gradient) for m in METHODS]
    chex.assert_trees_all_equal(*states)


@pytest.mark.usefixtures("x64")
def test_resumes_with_a_traced_seed_and_power():
    gradients = [normal(step, (16, 24)) for step in range(3)]
    expected, _ = run(scale_by_flattening(0.25, key=7), gradients)

    @jax.jit
    def train(key, power):
        tx = scale_by_flattening(power, key=key)
        return run(tx, gradients)[0]

    chex.assert_trees_all_close(train(7, 0.25), expected, atol=1e-5)


# Momentum.


@pytest.mark.parametrize("moment_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("batch_axis", [0, 1, 2])
def test_momentum_is_nesterovs(batch_axis, moment_dtype):
    """Nesterov's momentum takes the gradient's place, for matrices only."""
    sides = [axis for axis in range(3) if axis != batch_axis]
    numbers = {"kernel": ApolloDimensionNumbers(*sides), "bias": None}
    shape = np.insert([16, 24], batch_axis, 2)
    gradients = [{"kernel": normal(k, shape), "bias": normal(k, 5)} for k in range(3)]
    arguments = {"weight_dimension_numbers": numbers, "moment_dtype": moment_dtype}
    stored, in_its_place = jnp.zeros(shape, moment_dtype), []
    for gradient in gradients:
        new = 0.9 * stored.astype(jnp.float32) + gradient["kernel"]
        in_its_place.append(gradient | {"kernel": gradient["kernel"] + 0.9 * new})
        stored = new.astype(moment_dtype)
    expected, _ = run(scale_by_flattening(**arguments), in_its_place)
    actual, states = run(scale_by_flattening(momentum=0.9, **arguments), gradients)
    chex.assert_trees_all_close(
        [updates["kernel"] for updates in actual],
        [updates["kernel"] for updates in expected],
        atol=1e-5,
    )
    momentum = states[-1].momentum["kernel"]
    chex.assert_trees_all_close(jnp.moveaxis(momentum, 0, batch_axis), stored)
    assert (momentum.shape, momentum.dtype) == ((2, 16, 24), moment_dtype)
    assert states[-1].momentum["bias"] == optax.MaskedNode()


def test_a_momentum_of_zero_is_the_gradient():
    gradients = [PARAMS, jax.tree.map(jnp.negative, PARAMS)]
    expected, _ = run(scale_by_flattening(), gradients)
    actual, _ = run(scale_by_flattening(momentum=0.0), gradients)
    chex.assert_trees_all_close(actual, expected, atol=1e-5)


@combinations_of("name, axis_type", CASES, AXIS_TYPES)
def test_a_momentum_is_sharded_like_its_parameter_and_sends_nothing(name, axis_type):
    case, mesh = CASES[name], make_mesh(axis_type)
    sent = [
        sorted(
            (each.kind, each.size)
            for each in collectives(compiled(case, mesh, "low_rank", decay).as_text())
        )
        for decay in (0.9, None)
    ]
    assert sent[0] == sent[1]
    sharding = NamedSharding(mesh, case.spec)
    gradient = jax.ShapeDtypeStruct(case.shape, jnp.float32, sharding=sharding)
    tx = scale_by_flattening(momentum=0.9, weight_dimension_numbers=case.numbers)
    state: Any = jax.eval_shape(tx.init, gradient)
    places = state_sharding(state, gradient, weight_dimension_numbers=case.numbers)
    shard = places.momentum.shard_shape(state.momentum.shape)
    assert math.prod(shard) == math.prod(sharding.shard_shape(case.shape))


def test_rejects_states_with_and_without_momentum():
    with_momentum, without = scale_by_flattening(momentum=0.9), scale_by_flattening()
    message = "lacks a momentum, which these arguments store; .*call init again"
    with pytest.raises(ValueError, match=message):
        with_momentum.update(PARAMS, without.init(PARAMS))
    message = "has a momentum, which these arguments do not store; .*call init again"
    with pytest.raises(ValueError, match=message):
        without.update(PARAMS, with_momentum.init(PARAMS))


# Arguments and states that do not fit.


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"power": 1.0}, ValueError, r"power must be in \[0, 1\), got 1.0"),
        ({"power": -0.5}, ValueError, r"power must be in \[0, 1\), got -0.5"),
        ({"power": "half"}, TypeError, "power must be a number"),
        ({"method": "svd"}, ValueError, "method must be .*low_rank.*got 'svd'"),
        ({"method": "exact", "rank": 4}, ValueError, "has no rank, got rank=4"),
        ({"method": "newton_schulz", "rank": 4}, ValueError, "has no rank"),
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": jnp.array(4)}, TypeError, "rank must be a Python int.*static_args"),
        ({"momentum": 1.0}, ValueError, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": "0.9"}, TypeError, "momentum must be a number"),
        ({"b1": 1.0}, ValueError, r"b1 must be in \[0, 1\)"),
        ({"eps": -1.0}, ValueError, "eps must be"),
        ({"key": 0.5}, TypeError, "key must be an int seed"),
        ({"moment_dtype": jnp.int8}, TypeError, "moment_dtype must be"),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [scale_by_flattening, functools.partial(apollo_zero, 0.1)]
)
def test_rejects_arguments(make, arguments, kind, message):
    with pytest.raises(kind, match=message):
        make(**arguments)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_rejects_untrainable_leaves(dtype):
    params = {"layer": {"steps": jnp.ones((2, 3), dtype)}}
    with pytest.raises(ValueError, match=f"'layer/steps' has dtype {dtype}.*masked"):
        scale_by_flattening().init(params)


def test_rejects_foreign_states():
    tx, wrong = scale_by_flattening(), scale_by_apollo(4).init(PARAMS)
    with pytest.raises(ValueError, match="ScaleByApolloState without momentum"):
        tx.update(PARAMS, wrong)
    as_vector = scale_by_flattening(
        weight_dimension_numbers={"kernel": None, "bias": None}
    )
    with pytest.raises(ValueError, match="mu for 'kernel'.*call init again"):
        tx.update(PARAMS, as_vector.init(PARAMS))
    other_key = scale_by_flattening(key=jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match="the state's key has shape"):
        tx.update(PARAMS, other_key.init(PARAMS))


def test_rejects_leaves_that_vary_in_shard_map():
    mesh, tx = make_mesh(), scale_by_flattening()

    def step(gradient, state):
        return tx.update(gradient, state)[0]

    gradient = put(mesh, normal(0, (16, 24)), P("data"))
    state = tx.init(gradient)
    for spec in (P("data"), P()):
        sharded = jax.shard_map(step, mesh=mesh, in_specs=(spec, P()), out_specs=spec)
        if spec == P():
            assert sharded(gradient, state).shape == (16, 24)
        else:
            with pytest.raises(ValueError, match="varies over the manual axes"):
                sharded(gradient, state)


# Wrappers and the other parts of the library.


def test_masks_multi_steps_and_weight_decay():
    gradients = [jax.tree.map(lambda x, k=k: k * x, PARAMS) for k in (1.0, 2.0)]
    mean = jax.tree.map(lambda *x: sum(x) / 2, *gradients)
    tx = optax.MultiSteps(apollo_zero(0.1), 2)
    updates, _ = run(tx, gradients, PARAMS)
    expected, _ = run(apollo_zero(0.1), [mean], PARAMS)
    chex.assert_trees_all_close(updates[-1], expected[0], atol=1e-5)

    tx = apollo_zero(0.1, weight_decay=0.5, mask={"kernel": True, "bias": False})
    decayed, _ = run(tx, [mean], PARAMS)
    difference = jax.tree.map(jnp.subtract, decayed[0], expected[0])
    np.testing.assert_allclose(
        difference["kernel"], -0.05 * PARAMS["kernel"], atol=1e-5
    )
    np.testing.assert_allclose(difference["bias"], 0, atol=1e-6)

    tx = optax.masked(apollo_zero(0.1), {"kernel": True, "bias": False})
    masked, states = run(tx, [mean], PARAMS)
    np.testing.assert_allclose(masked[0]["kernel"], expected[0]["kernel"], atol=1e-6)
    assert states[0].inner_state[0].mu == dict.fromkeys(PARAMS, optax.MaskedNode())


def test_state_bytes():
    params = {"kernel": jnp.ones((64, 96)), "bias": jnp.ones(96)}
    size = apollo_optax.state_bytes(apollo_zero(0.1), params)
    # A count of 4 bytes, a key of 8, and two moments of the bias.
    assert size == (0, 0, 4 + 8 + 2 * 4 * 96)


@pytest.mark.usefixtures("x64")
def test_layerwise_int8_step_is_the_ordinary_one():
    model = layerwise_models.in_int8(layerwise_models.toy())
    numbers = layerwise_models.NUMBERS
    tx = apollo_zero(0.1, weight_dimension_numbers=numbers)
    keys = jax.random.split(layerwise_models.KEY, 3)
    expected, _ = layerwise_models.train(
        layerwise_models.ordinary_step(model, tx), model, tx, 3, keys
    )
    actual, _ = layerwise_models.train(model.step(tx), model, tx, 3, keys)
    chex.assert_trees_all_equal_structs(actual, expected)
    kernels = [
        apollo_optax.dequantize(params["layers"]["block"]["kernel"])
        for params, _ in (actual, expected)
    ]
    # Weights that lie between two values of int8 may be rounded either way.
    assert np.abs(kernels[0] - kernels[1]).max() < 0.05


# Meshes.

RANK = 4


def compiled(case, mesh, method, momentum=None):
    tx = scale_by_flattening(
        method=method,
        rank=RANK if method == "low_rank" else None,
        momentum=momentum,
        weight_dimension_numbers=case.numbers,
    )
    sharding = NamedSharding(mesh, case.spec)
    gradient = jax.ShapeDtypeStruct(case.shape, jnp.float32, sharding=sharding)
    state = jax.eval_shape(tx.init, gradient)
    places = state_sharding(state, gradient, weight_dimension_numbers=case.numbers)
    state = jax.tree.map(lambda x, s: x.update(sharding=s), state, places)
    return jax.jit(tx.update).lower(gradient, state).compile()


@combinations_of("name, axis_type", CASES, AXIS_TYPES)
def test_low_rank_never_sends_a_gradient(name, axis_type):
    case, mesh = CASES[name], make_mesh(axis_type)
    program = compiled(case, mesh, "low_rank").as_text()
    size = math.prod(case.shape)
    matrices = size // math.prod(case.shape[axis] for axis in matrix_axes(case))
    # The larger side is that of the channels: n r numbers per matrix, or fewer.
    projected = RANK * case.channels
    found = collectives(program)
    assert {each.kind for each in found} <= {"all-reduce", "reduce-scatter"}
    # Only the passes that make a basis orthonormal are a loop.
    in_loops = [each for each in found if each.times > 1]
    assert all(each.size <= matrices * RANK**2 for each in in_loops)
    assert max((each.size for each in found), default=0) <= projected
    vectors = max(case.channels, size // case.channels * matrices)
    assert sum(each.size > vectors for each in found) <= 4
    # Each device draws the shard of Omega that it multiplies with.
    shard = math.prod(NamedSharding(mesh, case.spec).shard_shape(case.shape))
    contracted = math.prod(case.shape[axis] for axis in case.contracted)
    drawn = RANK * case.channels * contracted // (contracted * size // shard)
    assert drawn_words(program) <= max(contracted * drawn, 2 * 16)


@combinations_of("method, axis_type", ["exact", "newton_schulz"], AXIS_TYPES)
def test_other_methods_send_a_gram_matrix_where_channels_are_sharded(method, axis_type):
    case, mesh = CASES["channels"], make_mesh(axis_type)
    found = collectives(compiled(case, mesh, method).as_text())
    assert {each.kind for each in found} == {"all-reduce"}
    assert sorted(each.size for each in found)[-1] == 256 * 256
    assert sum(each.size > 1024 for each in found) == 1


# The matrices are small, since eight simulated devices take long for eigenvectors.
SMALL = [
    ((32, 64), P("data", "model"), ApolloDimensionNumbers()),
    ((64, 32), P("data", "model"), ApolloDimensionNumbers()),
    ((8, 32, 40), P(None, "model", "data"), STACKED),
    ((4, 8, 64), P("model", "data"), ApolloDimensionNumbers((0, 1), 2)),
]


@combinations_of("shape, spec, numbers, method, axis_type", SMALL, METHODS, AXIS_TYPES)
@pytest.mark.parametrize("momentum", [None, 0.9])
def test_eight_devices_compute_what_one_does(
    shape, spec, numbers, method, axis_type, momentum
):
    mesh = make_mesh(axis_type)
    # The first momentum is a multiple of the gradient, which has the same update.
    gradients = [normal(step, shape) for step in range(1 if momentum is None else 2)]
    tx = scale_by_flattening(
        method=method, momentum=momentum, weight_dimension_numbers=numbers
    )
    expected, _ = run(tx, gradients, jit=True)
    sharded = [put(mesh, gradient, spec) for gradient in gradients]
    actual, _ = run(tx, sharded, jit=True)
    np.testing.assert_allclose(actual[-1], expected[-1], atol=3e-5)


def test_state_sharding_of_a_state_without_matrices():
    mesh = make_mesh(AxisType.Explicit)
    params = {
        "kernel": put(mesh, PARAMS["kernel"], P("data", "model")),
        "bias": put(mesh, PARAMS["bias"], P("model")),
    }
    tx: Any = scale_by_flattening()
    state = tx.init(params)
    assert isinstance(state, ScaleByFlatteningState)
    shardings = state_sharding(state, params)
    assert shardings.mu["bias"].spec == P("model")
    assert shardings.mu["kernel"] == optax.MaskedNode()
    assert shardings.count.spec == shardings.key.spec == P()
    updates, _ = jax.jit(tx.update)(params, state)
    assert updates["kernel"].sharding == params["kernel"].sharding

"""RACS against its equations, at the extremes of gradients, and on meshes."""

import functools
import math
from typing import Any

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    racs,
    scale_by_racs,
    state_owners,
    state_sharding,
    tabulate,
)
from apollo_optax._dimension_numbers import matrix_axes
from benchmarks.hlo import collectives
from tests.helpers import (
    AXIS_TYPES,
    assert_close,
    combinations_of,
    every_axis_type,
    make_mesh,
    normal,
    put,
    rms,
    run,
    small_params,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)

# The floor of the factors over the largest one, as documented.
LEAST_SHARE = 1e-8


def reference(gradients, b=0.9, iterations=1, norm_growth_limit=1.01):
    """Algorithm 1 of the paper in float64, for gradients of one matrix.

    The first `q`, averages, scale, floors and clipping are those that scale_by_racs
    documents.

    Returns:
      The updates, and the factors, with the root of ``s``, and the norm at the end.
    """
    q = s = remembered = None
    updates = []
    for gradient in gradients:
        G = np.asarray(gradient, np.float64)
        H = G**2
        if H.any():
            new_q = np.ones(len(G)) if q is None else q
            new_q = np.maximum(new_q / new_q.max(), LEAST_SHARE)
            new_s = np.zeros(0)
            for _ in range(iterations):
                new_s = H.T @ new_q / (new_q @ new_q)
                new_q = H @ new_s / (new_s @ new_s)
                mean = new_q.mean()
                new_q, new_s = new_q / mean, new_s * mean
            q = new_q if q is None else b * q + (1 - b) * new_q
            s = new_s if s is None else b * s + (1 - b) * new_s
        if q is None:
            updates.append(np.zeros_like(G))
            continue
        rows, columns = (np.maximum(x, LEAST_SHARE * x.max()) for x in (q, s))
        U = G / np.sqrt(rows)[:, None] / np.sqrt(columns)
        U /= max(1, np.sqrt(np.mean(U**2)))
        if norm_growth_limit is not None:
            if remembered is not None:
                growth = np.linalg.norm(U) / (remembered + 1e-8)
                U /= max(growth, norm_growth_limit) / norm_growth_limit
            norm = np.linalg.norm(U)
            if norm > 0 and (remembered is None or norm >= remembered / 2):
                remembered = norm
        updates.append(U)
    return updates, (q, None if s is None else np.sqrt(s), remembered)


def assert_is_reference(gradients, rtol=2e-6, **arguments):
    updates, states = run(scale_by_racs(**arguments), gradients, jit=True)
    expected, factors = reference(gradients, **arguments)
    for update, wanted in zip(updates, expected, strict=True):
        largest = np.abs(wanted).max()
        np.testing.assert_allclose(update, wanted, rtol=rtol, atol=rtol * largest)
    state: Any = states[-1]
    for actual, wanted in zip((state.row, state.column), factors[:2], strict=True):
        np.testing.assert_allclose(actual, wanted, rtol=rtol)
    np.testing.assert_allclose(state.norm, factors[2] or 0, rtol=rtol)
    return updates, states


def sequence(steps=4, shape=(6, 10), seed=0):
    """Gradients whose rows, columns and steps differ in size."""
    sizes = np.random.default_rng(seed).lognormal(sigma=1.5, size=(steps, sum(shape)))
    return [
        normal(seed + i, shape)
        * np.float32(size[: shape[0], None])
        * np.float32(size[shape[0] :])
        for i, size in enumerate(sizes)
    ]


# The equations.


@pytest.mark.parametrize(
    "arguments",
    [{}, {"b": 0.0}, {"b": 0.99}, {"iterations": 5}, {"norm_growth_limit": None}],
    ids=str,
)
def test_updates_are_those_of_the_equations(arguments):
    assert_is_reference(sequence(), **arguments)


@pytest.mark.usefixtures("x64")
def test_float64_is_computed_in_float64():
    gradients = [jnp.asarray(g, jnp.float64) for g in sequence()]
    _, states = assert_is_reference(gradients, rtol=1e-12)
    assert {x.dtype for x in jax.tree.leaves(states[-1])[1:]} == {np.dtype("float64")}


def test_the_first_update_of_a_rank_1_matrix_is_its_sign():
    gradient = jnp.outer(normal(0, (6,)), normal(1, (10,)))
    update, _ = scale_by_racs().update(gradient, scale_by_racs().init(gradient))
    np.testing.assert_allclose(update, np.sign(gradient), rtol=1e-5)


def test_other_leaves_get_adam():
    tx, adam = scale_by_racs(), optax.scale_by_adam(eps=1e-6)
    gradients = [small_params(step) for step in range(3)]
    ours, _ = run(tx, gradients)
    theirs, _ = run(adam, gradients)
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our["scale"], their["scale"])
        assert_close(our["dense"]["bias"], their["dense"]["bias"])


@pytest.mark.parametrize(
    ("shape", "numbers", "order"),
    [
        ((10, 6), None, (1, 0)),
        ((2, 6, 10), STACKED, (0, 1, 2)),
        ((6, 2, 10), ApolloDimensionNumbers(0, 2), (1, 0, 2)),
        ((6, 5, 2), ApolloDimensionNumbers(0, (1, 2)), (0, 1, 2)),
        ((3, 2, 10), ApolloDimensionNumbers((1, 0), 2), (1, 0, 2)),
        ((2, 5, 6, 2), ApolloDimensionNumbers(2, (3, 1)), (0, 2, 3, 1)),
    ],
)
def test_each_element_of_the_batch_axes_is_a_matrix(shape, numbers, order):
    """Sides may have several axes, in any order, as ``DenseGeneral`` kernels have."""
    gradients = [normal(i, shape) * np.float32(10.0**i) for i in range(3)]
    tx = scale_by_racs(weight_dimension_numbers=numbers)
    updates, states = run(tx, gradients, jit=True)
    axes = matrix_axes(("w",), shape, numbers or ApolloDimensionNumbers())
    assert axes.order == order

    def matrices(tensor):
        return np.transpose(np.asarray(tensor), order).reshape(-1, 6, 10)

    state: Any = states[-1]
    rows = np.reshape(state.row, (-1, 6))
    for index, row in enumerate(rows):
        expected, (q, _, _) = reference([matrices(g)[index] for g in gradients])
        for update, wanted in zip(updates, expected, strict=True):
            np.testing.assert_allclose(
                matrices(update)[index], wanted, rtol=1e-5, atol=1e-6
            )
        np.testing.assert_allclose(row, q, rtol=1e-5)
    assert state.row.shape == axes.sizes((*axes.batch, *axes.contracted))
    assert state.column.shape == axes.sizes((*axes.batch, *axes.channel))
    assert state.norm.shape == axes.sizes(axes.batch)


def test_updates_of_a_dtype_are_those_of_float32_rounded():
    wide = [normal(i, (6, 10)).astype(jnp.bfloat16) for i in range(3)]
    expected, _ = run(scale_by_racs(), [g.astype(jnp.float32) for g in wide], jit=True)
    updates, states = run(scale_by_racs(), wide, jit=True)
    for update, wanted in zip(updates, expected, strict=True):
        chex.assert_trees_all_equal(update, wanted.astype(jnp.bfloat16))
    assert {x.dtype for x in jax.tree.leaves(states[-1])[1:]} == {np.dtype("float32")}


# Extremes.


@pytest.mark.parametrize("size", [1e-35, 1e-30, 1e-20, 1e-10, 1e10, 1e15, 1e25])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_any_size_of_gradients_gives_the_same_updates(dtype, size):
    # A power of two changes no digit of a floating-point number.
    size = np.float32(2.0 ** np.round(np.log2(size)))
    gradients = [normal(i, (6, 10)).astype(dtype) for i in range(3)]
    scaled = [(g.astype(jnp.float32) * size).astype(dtype) for g in gradients]
    expected, _ = run(scale_by_racs(), gradients, jit=True)
    updates, states = run(scale_by_racs(), scaled, jit=True)
    chex.assert_tree_all_finite((updates, states))
    for update, wanted in zip(updates, expected, strict=True):
        assert update.dtype == dtype
        chex.assert_trees_all_close(update, wanted, rtol=1e-2 if size < 1e-34 else 1e-5)


def test_sizes_may_jump():
    """Small gradients after large ones give small updates, and no overflow."""
    for sizes in ([1e-30, 1e15], [1e15, 1e-30], [1e-5, 1e5, 1e-5]):
        gradients = [normal(0, (6, 10)) * np.float32(size) for size in sizes]
        updates, states = run(scale_by_racs(), gradients, jit=True)
        chex.assert_tree_all_finite((updates, states))
        assert max(map(rms, updates)) < 1 + 1e-6


def test_zero_gradients_change_nothing():
    zero, gradients = jnp.zeros((6, 10)), sequence()
    mixed = [zero, zero, *gradients[:2], zero, *gradients[2:], zero]
    updates, states = assert_is_reference(mixed)
    for step in (0, 1, 4, 7):
        assert not np.any(updates[step])
        before = scale_by_racs().init(zero) if step == 0 else states[step - 1]
        changed = states[step]._replace(count=before.count)
        chex.assert_trees_all_equal(changed, before)
    # The first gradient that is not zero is taken whole.
    first, _ = run(scale_by_racs(), gradients[:1], jit=True)
    chex.assert_trees_all_equal(updates[2], first[0])


@pytest.mark.parametrize(
    "alive", [(0, 1, 2, 4, 5), (3,)], ids=["one row is zero", "one row is alive"]
)
def test_zero_rows_get_zero_updates(alive):
    mask = np.isin(np.arange(6), alive)[:, None]
    for transposed in (False, True):
        gradients = [jnp.where(mask, g, 0) for g in sequence()]
        if transposed:  # Then the zeros are columns, along the channel side.
            gradients = [jnp.pad(g[:, :6], ((0, 0), (0, 6))) for g in gradients]
            gradients = [jnp.roll(g, 3, axis=1) for g in gradients]
        updates, states = assert_is_reference(gradients)
        chex.assert_tree_all_finite((updates, states))
        for update, gradient in zip(updates, gradients, strict=True):
            assert not np.any(np.asarray(update)[np.asarray(gradient) == 0])
            assert np.any(update)


def test_rows_may_take_turns():
    """Rows that had no gradient until now get factors of their own at once."""
    first = normal(0, (6, 10)) * (np.arange(6) < 3)[:, None]
    second = normal(1, (6, 10)) * (np.arange(6) >= 3)[:, None]
    updates, states = assert_is_reference([first, second, first, second])
    assert states[1].row.min() > 0
    for update in updates:
        assert 0.5 < rms(update[np.any(update, axis=1)]) < np.sqrt(2) * 1.01


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("shape", [(6, 10), (64, 128)])
def test_a_gradient_that_is_not_finite_changes_no_factor(shape, bad):
    """XLA for CPUs leaves NaN out of maxima over larger arrays."""
    gradients = {"good": normal(0, shape), "bad": normal(1, shape)}
    tx: Any = scale_by_racs()
    _, state = tx.update(gradients, tx.init(gradients))
    broken = gradients | {"bad": gradients["bad"].at[1, 2].set(bad)}
    updates, after = tx.update(broken, state)
    for field in ("row", "column", "norm"):
        before = getattr(state, field)["bad"]
        chex.assert_trees_all_equal(getattr(after, field)["bad"], before)
    # The update shows it, as optax.apply_if_finite asks for.
    assert not np.isfinite(updates["bad"]).all()
    expected, _ = tx.update(gradients, state)
    chex.assert_trees_all_equal(updates["good"], expected["good"])


def test_an_outlier_does_not_make_a_large_update():
    gradient = normal(0, (64, 96)).at[3, 4].set(1000.0)
    updates, _ = assert_is_reference([gradient, normal(1, (64, 96))])
    assert rms(updates[0]) < 1 + 1e-6
    # The factors that fit the outlier are no measure of the other entries.
    assert np.abs(updates[0]).max() < 50
    assert rms(updates[1]) < 1.01 + 1e-6


@pytest.mark.parametrize("size", [1e-8, 1e-4, 1e4, 1e8])
def test_recovers_from_a_gradient_far_from_the_others(size):
    """The averages decay by 0.9 per step. The limiter adds no more than 70 steps."""
    tx: Any = scale_by_racs()
    gradients = normal(0, (500, 8, 12)).at[20].multiply(size)

    def step(state, gradient):
        update, state = tx.update(gradient, state)
        return state, jnp.sqrt(jnp.mean(update**2))

    _, rms = jax.lax.scan(step, tx.init(gradients[0]), gradients)
    assert rms.max() <= 1 + 1e-5
    steps = max(0, math.log(size**2) / math.log(1 / 0.9)) + 70
    recovered = rms[21 + math.ceil(steps) :]
    assert recovered.size > 50
    assert recovered.min() > 0.7  # The least RMS without the odd gradient is 0.76.


def test_heavy_tailed_noise_leaves_factors_in_range():
    """20,000 steps of Cauchy noise."""
    tx: Any = scale_by_racs()

    def step(state, key):
        # A ratio of normal numbers; the largest of all steps is about 1e7.
        above, below = jax.random.normal(key, (2, 8, 12))
        update, state = tx.update(above / below, state)
        seen = (state.row, state.column, jnp.sqrt(jnp.mean(update**2)))
        extremes = [(jnp.min(x), jnp.max(x)) for x in seen]
        return state, (extremes, jnp.mean(state.row))

    keys = jax.random.split(jax.random.key(0), 20_000)
    _, (extremes, means) = jax.jit(lambda s: jax.lax.scan(step, s, keys))(
        tx.init(jnp.zeros((8, 12)))
    )
    (row_min, row_max), (column_min, column_max), (rms_min, rms_max) = extremes
    chex.assert_tree_all_finite((extremes, means))
    np.testing.assert_allclose(means, 1, rtol=1e-5)
    assert row_min.min() > 0
    assert row_max.max() <= 8 * (1 + 1e-5)
    assert column_min.min() > 0
    assert column_max.max() < 1e10
    assert rms_min.min() > 0
    assert rms_max.max() <= 1 + 1e-5


# The state.


def test_a_field_is_there_only_for_leaves_that_have_it():
    params = small_params()
    state: Any = scale_by_racs(moment_dtype=jnp.bfloat16).init(params)
    masked = optax.MaskedNode()
    assert state.mu["dense"]["kernel"] == state.nu["dense"]["kernel"] == masked
    for field in (state.row, state.column, state.norm):
        assert field["dense"]["bias"] == field["scale"] == masked
    assert state.mu["dense"]["bias"].dtype == jnp.bfloat16
    assert state.row["dense"]["kernel"].dtype == jnp.float32
    size = sum(leaf.size for leaf in jax.tree.leaves(state))
    assert size == 1 + 2 * (6 + 1) + (4 + 6 + 1)


@pytest.mark.parametrize("kept", ["all", "matrices", "others"])
def test_owners_are_found_by_names(kept):
    """Also where a field has no leaves, and beside Adam's state."""
    params: Any = {"mu": {"w": normal(0, (4, 6))}, "row": normal(1, (5,))}
    if kept != "all":
        params = {
            key: params[key] for key in (["mu"] if kept == "matrices" else ["row"])
        }
    tx = optax.chain(scale_by_racs(), optax.scale_by_adam())
    ours, adams = state_owners(tx.init(params), params)
    for field in ours[1:]:
        for path, owner in jax.tree_util.tree_leaves_with_path(field):
            assert owner == jax.tree_util.keystr(path, simple=True, separator="/")
    assert ours.count == adams.count == ""
    assert (
        adams.mu
        == adams.nu
        == jax.tree.map_with_path(
            lambda path, _: jax.tree_util.keystr(path, simple=True, separator="/"),
            params,
        )
    )
    table = tabulate(scale_by_racs(), params)
    assert ("RACS" in table) == (kept != "others")


def test_the_table_has_the_factors():
    params = {"kernel": normal(0, (4, 6)), "bias": normal(1, (6,))}
    lines = tabulate(racs(0.1), params).splitlines()
    kernel = next(line for line in lines if line.startswith("kernel"))
    assert "RACS" in kernel
    assert "(4,) x 1, (6,) x 1" in kernel
    assert f" {4 * (4 + 6 + 1)} " in kernel


def test_checkpoints_continue_bit_for_bit(tmp_path):
    tx = racs(0.1)
    params = small_params()
    gradients = [small_params(step) for step in range(1, 5)]
    _, (*_, state) = run(tx, gradients[:2], params)
    saved = flax.serialization.to_bytes(state)
    restored = [flax.serialization.from_bytes(tx.init(params), saved)]
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        restored.append(checkpointer.restore(tmp_path / "state", tx.init(params)))
    expected = run(tx, gradients[2:], params, state=state)
    for each in restored:
        chex.assert_trees_all_equal_structs(each, state)
        continued = run(tx, gradients[2:], params, state=each)
        chex.assert_trees_all_equal(continued, expected)


class Model(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(16, 32, rngs=rngs)


def test_trains_in_nnx():
    """An optimizer of NNX keeps the places of fields that a leaf lacks."""
    mesh = make_mesh()
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, racs(0.1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean(jnp.square(model.up(x) - 1))  # noqa: E731
        value, grads = nnx.value_and_grad(loss)(model)
        optimizer.update(model, grads)
        return value

    losses = [step(model, optimizer, normal(0, (8, 16))) for _ in range(5)]
    assert losses[-1] < losses[0]
    state = nnx.state(optimizer)
    places = {"kernel": P("data", "model"), "bias": P("model")}
    params = {
        "up": {
            name: put(mesh, getattr(model.up, name)[...], spec)
            for name, spec in places.items()
        }
    }
    shardings = nnx.to_pure_dict(state_sharding(state, params))
    found = shardings["opt_state"][0]
    assert found["row"]["up"]["kernel"].spec == P("data")
    assert found["column"]["up"]["kernel"].spec == P("model")
    assert found["mu"]["up"]["bias"].spec == P("model")
    # Without types, the state is found by the names of its fields.
    owners = nnx.to_pure_dict(state_owners(state, params))["opt_state"][0]
    assert owners["norm"]["up"]["kernel"] == "up/kernel"
    assert owners["count"] == ""


# Meshes.

CASES: dict[str, tuple[tuple[int, ...], P, Any]] = {
    "rows": ((256, 1024), P("data"), None),
    "columns": ((256, 1024), P(None, "model"), None),
    "both": ((256, 1024), P("data", "model"), None),
    "tall": ((1024, 256), P("data", "model"), None),
    "stacked": ((8, 256, 1024), P(None, "model", "data"), STACKED),
    "layers": ((16, 256, 1024), P("model", "data"), STACKED),
    "heads": ((256, 16, 64), P("data", "model"), ApolloDimensionNumbers(0, (1, 2))),
}


@combinations_of("name, axis_type", CASES, AXIS_TYPES)
def test_devices_exchange_vectors_only(name, axis_type):
    shape, spec, numbers = CASES[name]
    mesh = make_mesh(axis_type)
    tx = scale_by_racs(weight_dimension_numbers=numbers)
    sharding = NamedSharding(mesh, spec)
    param = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    state = jax.eval_shape(tx.init, param)
    shardings = state_sharding(state, param, weight_dimension_numbers=numbers)
    state = jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings)

    def step(param, gradient, state):
        updates, state = tx.update(gradient, state, param)
        return optax.apply_updates(param, updates), state

    program = jax.jit(step).lower(param, param, state).compile()
    axes = matrix_axes(("w",), shape, numbers or ApolloDimensionNumbers())
    matrices = int(np.prod(axes.sizes(axes.batch)))
    channels = int(np.prod(axes.sizes(axes.channel)))
    for each in collectives(program.as_text()):
        assert each.kind in ("all-reduce", "reduce-scatter", "all-gather"), each
        assert each.size <= matrices * channels, each
    # The step has no out_shardings, and yet the new state is sharded like the old one.
    pairs = zip(
        *map(jax.tree.leaves, (state, program.output_shardings[1])), strict=True
    )
    for leaf, placed in pairs:
        assert placed.is_equivalent_to(leaf.sharding, leaf.ndim), (leaf, placed)


@every_axis_type
def test_eight_devices_compute_the_numbers_of_one(axis_type):
    mesh = make_mesh(axis_type)
    specs = {
        "kernel": P("data", "model"),
        "stack": P(None, "model"),
        "bias": P("model"),
    }
    numbers = {"kernel": ApolloDimensionNumbers(), "stack": STACKED, "bias": None}
    tx = racs(0.1, weight_dimension_numbers=numbers)

    def gradients(seed):
        shapes = {"kernel": (8, 16), "stack": (3, 8, 16), "bias": (16,)}
        return {name: normal(seed, shape) for name, shape in shapes.items()}

    on_one = [gradients(seed) for seed in range(3)]
    on_mesh = [{k: put(mesh, v, specs[k]) for k, v in g.items()} for g in on_one]
    expected = run(tx, on_one, on_one[0], jit=True)
    with jax.set_mesh(mesh):
        actual = run(tx, on_mesh, on_mesh[0], jit=True)
        eager = run(tx, on_mesh, on_mesh[0])
    row = actual[1][-1][0].row["stack"]
    assert row.sharding.is_equivalent_to(NamedSharding(mesh, P(None, "model")), 2)
    for found in (actual, eager):
        chex.assert_trees_all_close(
            jax.device_get(found), jax.device_get(expected), rtol=2e-5, atol=1e-6
        )


def test_shardings_are_those_of_the_sides():
    mesh = make_mesh()
    params = {
        "w": jax.ShapeDtypeStruct(
            (4, 8, 16), jnp.float32, sharding=NamedSharding(mesh, P("model", "data"))
        )
    }
    tx = racs(0.1, weight_dimension_numbers=STACKED)
    state = jax.eval_shape(tx.init, params)
    shardings = state_sharding(state, params, weight_dimension_numbers=STACKED)[0]
    assert shardings.row["w"].spec == P("model", "data")
    assert shardings.column["w"].spec == P("model", None)
    assert shardings.norm["w"].spec == P("model")


# Bad input.


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"b": 1.0}, ValueError, r"b must be in \[0, 1\), got 1.0"),
        ({"b": -0.1}, ValueError, r"b must be in \[0, 1\), got -0.1"),
        ({"b": "0.9"}, TypeError, "b must be a number"),
        ({"iterations": 0}, ValueError, "iterations must be at least 1, got 0"),
        ({"iterations": 2.5}, TypeError, "iterations must be an int.*got 2.5"),
        ({"iterations": jnp.array(5)}, TypeError, r"static_args\(factory\)"),
        (
            {"norm_growth_limit": 0.5},
            ValueError,
            "norm_growth_limit must be at least 1",
        ),
        ({"b1": 1.0}, ValueError, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b2": 1.0}, ValueError, r"b2 must be in \[0, 1\), got 1.0"),
        ({"eps": -1e-8}, ValueError, "eps must be .*got -1e-08"),
        ({"moment_dtype": jnp.int8}, TypeError, "moment_dtype must be a real"),
    ],
    ids=str,
)
@pytest.mark.parametrize("make", [scale_by_racs, functools.partial(racs, 0.1)])
def test_rejects_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


@pytest.mark.parametrize("dtype", ["int32", "complex64"])
def test_rejects_untrainable_leaves(dtype):
    params = {"layer": {"steps": jnp.ones((2, 3), dtype)}}
    message = f"'layer/steps' has dtype {dtype}.*optax.masked"
    with pytest.raises(ValueError, match=message):
        scale_by_racs().init(params)


def test_rejects_a_state_of_other_dimension_numbers():
    params = {"layer": {"kernel": normal(0, (3, 4, 6))}}

    def make(numbers):
        given = {"layer": numbers, "extra": None}
        return scale_by_racs(weight_dimension_numbers=given)

    state = make(STACKED).init(params)
    others = {
        r"row for 'layer/kernel' has shape \(3, 4\).*give \(4, 3\)": (0, 2),
        r"mu for 'layer/kernel' has no array.*give \(3, 4, 6\)": None,
    }
    for message, numbers in others.items():
        given = numbers and ApolloDimensionNumbers(*numbers)
        with pytest.raises(ValueError, match=message + ".*call init again"):
            make(given).update(params, state)
    with pytest.raises(ValueError, match=r"mu for 'layer/kernel' has shape.*no array"):
        make(STACKED).update(params, make(None).init(params))
    with pytest.raises(ValueError, match="another structure"):
        make(STACKED).update(params | {"extra": jnp.ones(3)}, state)


def test_rejects_a_leaf_that_varies_over_a_manual_axis():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    tx = scale_by_racs()
    gradient, state = {"w": jnp.ones((16, 12))}, tx.init({"w": jnp.ones((2, 12))})
    mapped = jax.shard_map(
        lambda g: tx.update(g, state)[0],
        mesh=mesh,
        in_specs=P("data"),
        out_specs=P("data"),
    )
    with pytest.raises(ValueError, match="'w' varies over the manual axes.*pmean"):
        jax.jit(mapped)(gradient)


def test_trains_in_int8_a_layer_at_a_time():
    numbers = apollo_optax.dimension_numbers_by_path([("layers", STACKED)])
    tx = racs(0.01, weight_dimension_numbers=numbers)
    layers = {"kernel": apollo_optax.quantize(normal(0, (3, 16, 16)), group_size=8)}
    params = {"layers": layers, "embed": {"embedding": normal(1, (5, 16))}}
    step = apollo_optax.layerwise_step(
        lambda params, batch: params["embed"]["embedding"][batch],
        lambda params, x, *_: x + jnp.tanh(x @ params["kernel"]),
        lambda params, x, batch: jnp.mean(x**2),
        tx,
    )
    state, losses = tx.init(apollo_optax.dequantize(params)), []
    jitted = jax.jit(step)
    for i in range(20):
        key = jax.random.key(i)
        params, state, metrics = jitted(params, state, jnp.arange(4), key=key)
        losses.append(float(metrics.loss))
    assert losses[-1] < 0.8 * losses[0]
    assert isinstance(params["layers"]["kernel"], apollo_optax.QuantizedArray)

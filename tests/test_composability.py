"""The optimizer inside what people put around it: JAX, Optax, Flax, checkpoints, odd trees."""

import collections
import functools
import inspect
from typing import Any, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
import pytest
from flax import linen as nn
from flax import nnx
from flax.training.train_state import TrainState
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import ApolloDimensionNumbers

apollo: Any = functools.partial(apollo_optax.apollo, rank=2, update_proj_gap=2)
OPTIMIZERS: dict[str, Any] = {
    "apollo": apollo,
    "apollo_mini": functools.partial(apollo_optax.apollo_mini, update_proj_gap=2),
    "svd": functools.partial(apollo, projection="svd"),
}
every_optimizer = pytest.mark.parametrize("name", OPTIMIZERS)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def normal(seed, shape, dtype: Any = jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_params(seed=0, dtype: Any = jnp.float32) -> Any:
    return {
        "dense": {"kernel": normal(seed, (4, 6), dtype), "bias": normal(seed + 1, (6,), dtype)},
        "scale": normal(seed + 2, (), dtype),
    }


def make_grads(step, dtype: Any = jnp.float32) -> Any:
    return make_params(100 + 10 * step, dtype)


def run(tx: Any, params, steps=3, update=None, state=None, first=0) -> Any:
    """The updates of some steps, with the state after them."""
    state = tx.init(params) if state is None else state
    history = []
    for step in range(first, first + steps):
        updates, state = (update or tx.update)(make_grads(step), state, params)
        params = optax.apply_updates(params, updates)
        history.append(updates)
    return history, state


def stack(trees):
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def assert_close(actual, expected):
    """Equal but for the order of a few float32 operations, which is the compiler's to choose."""
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


# JAX's transformations.


@every_optimizer
def test_jit_equals_eager(name):
    tx = OPTIMIZERS[name](0.1, weight_decay=0.1)
    assert_close(run(tx, make_params(), update=jax.jit(tx.update)), run(tx, make_params()))


@every_optimizer
def test_state_is_a_carry_of_scan(name):
    tx = OPTIMIZERS[name](0.1)
    params = make_params()

    def step(carry, grads):
        params, state = carry
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), updates

    grads = stack([make_grads(step) for step in range(4)])
    (_, state), updates = jax.jit(lambda: jax.lax.scan(step, (params, tx.init(params)), grads))()
    expected_updates, expected_state = run(tx, params, steps=4)
    assert_close(updates, stack(expected_updates))
    assert_close(state, expected_state)


def test_vmap_over_seeds():
    params = make_params()

    def two_steps(seed):
        history, state = run(apollo(0.1, update_proj_gap=1, key=seed), params, steps=2)
        return stack(history), state

    updates, state = jax.vmap(two_steps)(jnp.arange(3))
    for seed in range(3):
        lane = jax.tree.map(lambda x: x[seed], (updates, state))  # noqa: B023
        assert_close(lane, two_steps(seed))
        chex.assert_trees_all_equal(lane[1][0].key, jax.random.key_data(jax.random.key(seed)))
    # Projections enter by way of the moments, and only for matrices.
    kernels, biases = state[0].mu["dense"]["kernel"], state[0].mu["dense"]["bias"]
    assert np.abs(kernels[0] - kernels[1]).max() > 1e-3
    chex.assert_trees_all_equal(biases[0], biases[1])


def test_vmap_over_an_ensemble():
    tx = apollo(0.1)
    scales = jnp.array([1.0, 2.0, -1.0])
    params, grads = (
        jax.tree.map(lambda x: jax.vmap(jnp.multiply, (0, None))(scales, x), tree)
        for tree in (make_params(), make_grads(0))
    )
    updates, state = jax.vmap(tx.update)(grads, jax.vmap(tx.init)(params), params)
    for member in range(3):
        own_params, own_grads = jax.tree.map(lambda x: x[member], (params, grads))  # noqa: B023
        expected = tx.update(own_grads, tx.init(own_params), own_params)
        assert_close(jax.tree.map(lambda x: x[member], (updates, state)), expected)  # noqa: B023


@pytest.mark.parametrize(
    "make_key",
    [lambda: 1, lambda: jax.random.PRNGKey(1), lambda: jax.random.key(1)],
    ids=["seed", "raw key", "typed key"],
)
def test_state_can_be_donated_and_init_called_again(make_key):
    tx = apollo(0.1, key=make_key())
    params = make_params()
    expected, _ = run(tx, params, steps=2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    # Twice, for a second run of the same optimizer, as in a sweep.
    for _ in range(2):
        donated, state = jax.tree.map(jnp.copy, params), tx.init(params)
        moments = state[0].mu["dense"]["kernel"]
        for number in range(2):
            donated, state, updates = step(donated, state, make_grads(number))
            assert_close(updates, expected[number])
        assert moments.is_deleted(), "nothing was donated"


@pytest.mark.parametrize("make_key", [jax.random.PRNGKey, jax.random.key], ids=["raw key", "typed key"])
def test_states_made_with_one_key_can_be_donated_together(make_key):
    key = make_key(1)
    tx: Any = optax.partition(
        {"kernel": apollo(0.1, key=key), "rest": apollo(0.01, key=key)},
        {"dense": {"kernel": "kernel", "bias": "rest"}, "scale": "rest"},
    )
    params = make_params()
    update = jax.jit(tx.update, donate_argnums=1)
    assert_close(update(make_grads(0), tx.init(params), params)[0], run(tx, params, steps=1)[0][0])
    # The caller's key is still the caller's.
    chex.assert_trees_all_equal(jax.random.bits(key), jax.random.bits(make_key(1)))


# Optax's combinators.


def test_chain():
    clip: Any = optax.clip_by_global_norm(1.0)
    alone = apollo(0.1)
    chained: Any = optax.chain(clip, alone)
    params = make_params()
    state, state_alone = chained.init(params), alone.init(params)
    for step in range(2):
        clipped, _ = clip.update(make_grads(step), clip.init(params))
        assert not np.allclose(clipped["scale"], make_grads(step)["scale"])
        updates, state = chained.update(make_grads(step), state, params)
        expected, state_alone = alone.update(clipped, state_alone, params)
        chex.assert_trees_all_equal(updates, expected)
    chex.assert_trees_all_equal(optax.tree.get(state, "nu"), state_alone[0].nu)


def test_apollo_is_its_parts():
    parts: Any = optax.chain(
        apollo_optax.scale_by_apollo(2, update_proj_gap=2),
        optax.add_decayed_weights(0.1),
        optax.scale_by_learning_rate(0.01),
    )
    chex.assert_trees_all_equal(run(apollo(0.01, weight_decay=0.1), make_params()), run(parts, make_params()))


def test_partition():
    labels = {"dense": {"kernel": "apollo", "bias": "sgd"}, "scale": "sgd"}
    tx: Any = optax.partition({"apollo": apollo(0.1), "sgd": optax.sgd(0.5)}, labels)
    updates, state = run(tx, make_params())
    expected, _ = run(apollo(0.1), make_params())
    for step in range(3):
        kernel, bias = (updates[step]["dense"][name] for name in ("kernel", "bias"))
        chex.assert_trees_all_equal(kernel, expected[step]["dense"]["kernel"])
        chex.assert_trees_all_close(bias, -0.5 * make_grads(step)["dense"]["bias"])
    held = jax.tree.leaves(state.inner_states["apollo"].inner_state[0].mu)
    assert [x.shape for x in held] == [(2, 6)]


@pytest.mark.parametrize(
    "numbers",
    [
        None,
        {"dense": {"kernel": ApolloDimensionNumbers(), "bias": None}, "scale": None},
        lambda tree: jax.tree.map(lambda x: ApolloDimensionNumbers() if x.ndim == 2 else None, tree),
    ],
    ids=["default", "dict", "callable"],
)
def test_masked(numbers):
    mask = {"dense": {"kernel": True, "bias": False}, "scale": True}
    tx: Any = optax.masked(apollo(0.1, weight_dimension_numbers=numbers), mask)
    updates, state = run(tx, make_params())
    expected, _ = run(apollo(0.1), make_params())
    for step in range(3):
        chex.assert_trees_all_equal(updates[step]["dense"]["bias"], make_grads(step)["dense"]["bias"])
        chex.assert_trees_all_equal(updates[step]["dense"]["kernel"], expected[step]["dense"]["kernel"])
        chex.assert_trees_all_equal(updates[step]["scale"], expected[step]["scale"])
    assert isinstance(state.inner_state[0].mu["dense"]["bias"], optax.MaskedNode)


@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, "float32") for name in OPTIMIZERS), ("apollo", "bfloat16")]
)
def test_multi_steps(name, dtype):
    tx = OPTIMIZERS[name](0.1)
    accumulating: Any = optax.MultiSteps(tx, every_k_schedule=2)
    params = make_params(0, dtype)
    grads = [make_grads(step, dtype) for step in range(2)]
    state = accumulating.init(params)
    update = jax.jit(accumulating.update)
    updates, state = update(grads[0], state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    assert int(state.inner_opt_state[0].count) == 0
    updates, state = update(grads[1], state, params)
    assert int(state.inner_opt_state[0].count) == 1
    mean = jax.tree.map(lambda a, b: (a + (b - a) / 2).astype(dtype), *grads)
    expected, _ = tx.update(mean, tx.init(params), params)
    chex.assert_trees_all_equal_dtypes(updates, params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5 if dtype == "float32" else 3e-2, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@every_optimizer
def test_apply_if_finite_leaves_the_state_untouched(name, bad):
    tx: Any = optax.apply_if_finite(OPTIMIZERS[name](0.1), max_consecutive_errors=3)
    params = make_params()
    update = jax.jit(tx.update)
    _, state = update(make_grads(0), tx.init(params), params)
    spoilt = make_grads(1)
    spoilt["dense"]["kernel"] = spoilt["dense"]["kernel"].at[1, 2].set(bad)
    updates, after = update(spoilt, state, params)
    chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, params))
    chex.assert_trees_all_equal(after.inner_state, state.inner_state)
    assert int(after.total_notfinite) == 1
    # The run goes on as if the bad step had not been.
    expected, _ = update(make_grads(1), state, params)
    chex.assert_trees_all_equal(update(make_grads(1), after, params)[0], expected)
    assert np.abs(expected["dense"]["kernel"]).max() > 0


def test_learning_rate_schedule():
    schedule = optax.linear_schedule(0.5, 0.1, 4)
    scheduled, _ = run(apollo(schedule), make_params())
    constant, _ = run(apollo(1.0), make_params())
    for step, rate in enumerate([0.5, 0.4, 0.3]):
        assert_close(scheduled[step], jax.tree.map(lambda x: rate * x, constant[step]))  # noqa: B023


INJECTED: dict[str, Any] = {
    "apollo": functools.partial(apollo_optax.apollo, rank=2),
    "apollo_mini": functools.partial(apollo_optax.apollo_mini, scale=1.0),
}


def inject(name, **settings) -> Any:
    factory = INJECTED[name].func
    static_args = apollo_optax.STATIC_ARGS & inspect.signature(factory).parameters.keys()
    make = optax.inject_hyperparams(factory, static_args=static_args, hyperparam_dtype=jnp.float32)
    return make(**INJECTED[name].keywords | settings)


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@pytest.mark.parametrize("name", INJECTED)
def test_injected_hyperparameters_change_between_steps(name, jit):
    # No limiter, so that the two matrix updates differ by their factors alone.
    tx = inject(name, learning_rate=0.1, norm_growth_limit=None)
    traces = []

    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state, params)

    params = make_params()
    step = jax.jit(update) if jit else update
    _, state = step(make_grads(0), tx.init(params))
    expected, _ = step(make_grads(1), state)
    state.hyperparams["learning_rate"] = jnp.float32(0.3)
    state.hyperparams["scale"] = jnp.float32(4.0)
    updates, state = step(make_grads(1), state)
    assert len(traces) == (1 if jit else 3)
    # The update is multiplied by the square root of the scale, that of a matrix.
    assert_close(updates["dense"]["kernel"], 6 * expected["dense"]["kernel"])
    assert_close(updates["dense"]["bias"], 3 * expected["dense"]["bias"])
    assert float(state.hyperparams["learning_rate"]) == pytest.approx(0.3)


def test_injected_schedules():
    tx = inject(
        "apollo", learning_rate=optax.linear_schedule(1.0, 0.0, 2), b1=lambda count: 0.5 + 0.1 * count
    )
    updates, state = run(tx, make_params())
    assert float(state.hyperparams["b1"]) == pytest.approx(0.7)
    chex.assert_trees_all_equal(updates[2], jax.tree.map(jnp.zeros_like, make_params()))
    mu, grads = 0.0, [make_grads(step)["scale"] for step in range(3)]
    for b1, grad in zip([0.5, 0.6, 0.7], grads, strict=True):
        mu = b1 * mu + (1 - b1) * grad
    assert_close(state.inner_state[0].mu["scale"], mu)


# Flax, boxed and on a mesh.

SHAPES = {"kernel": (8, 16), "bias": (16,), "merged": (2, 4, 16)}
VALUES = {name: np.asarray(normal(i, shape)) for i, (name, shape) in enumerate(SHAPES.items())}
SPECS = {"kernel": ("data", "model"), "bias": ("model",), "merged": ("data", None, "model")}
NUMBERS = {
    "dense": {"kernel": ApolloDimensionNumbers(), "bias": None},
    "merged": ApolloDimensionNumbers((0, 1), 2),  # Contracted to rank 2, so its moments have two axes.
}
MOMENT_SHAPES = {"dense": {"kernel": (4, 16), "bias": (16,)}, "merged": (4, 16)}
flax_tx: Any = functools.partial(apollo_optax.apollo, 0.1, rank=4, weight_dimension_numbers=NUMBERS)

every_mesh = pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=str)
projections = pytest.mark.parametrize("projection", ["random", "svd"])


def make_mesh(axis_type):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(axis_type,) * 2)


def constant(name):
    return lambda key, shape, dtype=jnp.float32: jnp.asarray(VALUES[name], dtype)


def objective(params):
    """Touches every parameter by itself, so that no sharding rule is in question but ours."""
    return sum(jnp.sum(jnp.sin(3 * x)) for x in jax.tree.leaves(params))


@functools.cache
def plain_run(projection) -> Any:
    """Parameters and moments after two steps without boxes on one device."""
    params = {
        "dense": {name: jnp.asarray(VALUES[name]) for name in ("kernel", "bias")},
        "merged": jnp.asarray(VALUES["merged"]),
    }
    tx = flax_tx(projection=projection)
    state = tx.init(params)
    for _ in range(2):
        updates, state = tx.update(jax.grad(objective)(params), state, params)
        params = optax.apply_updates(params, updates)
    return params, state[0]._asdict()


class Model(nnx.Module):
    """A module of one partitioned layer and a parameter with names for its axes."""

    def __init__(self, partitioned=True):
        def init(name):
            return nnx.with_partitioning(constant(name), SPECS[name]) if partitioned else constant(name)

        self.dense = nnx.Linear(8, 16, kernel_init=init("kernel"), bias_init=init("bias"), rngs=nnx.Rngs(0))
        names = {"out_sharding": SPECS["merged"]} if partitioned else {}
        self.merged = nnx.Param(jnp.asarray(VALUES["merged"]), **names)


def assert_moments_are_placed(mu, nu):
    for moments in (mu, nu):
        assert jax.tree.map(jnp.shape, moments) == MOMENT_SHAPES
        # Cut over all eight devices, the contracted side's axis of the mesh along the channels too.
        shards = jax.tree.map(lambda x: x.sharding.shard_shape(x.shape), moments)
        assert shards == {"dense": {"kernel": (4, 2), "bias": (4,)}, "merged": (4, 2)}


def nnx_step(model, optimizer):
    grads = nnx.grad(lambda model: objective(nnx.state(model, nnx.Param)))(model)
    optimizer.update(model, grads)


@projections
@every_mesh
def test_nnx_optimizer_on_a_mesh(axis_type, projection):
    with jax.set_mesh(make_mesh(axis_type)):
        model = nnx.jit(Model)()
        optimizer = nnx.Optimizer(model, flax_tx(projection=projection), wrt=nnx.Param)
        step = nnx.jit(nnx_step)
        state: Any = None
        for number in range(3):
            # The parameters' metadata names axes that moments do not have.
            for leaf in jax.tree.leaves(optimizer.opt_state, is_leaf=lambda x: isinstance(x, nnx.Variable)):
                assert isinstance(leaf, nnx.OptArray)
                assert "out_sharding" not in leaf.get_metadata()
            state = nnx.to_pure_dict(nnx.state(optimizer))["opt_state"][0]
            assert_moments_are_placed(state["mu"], state["nu"])
            if number < 2:
                step(model, optimizer)
    params, expected = plain_run(projection)
    assert_close(jax.device_get(nnx.to_pure_dict(nnx.state(model))), jax.device_get(params))
    for field in ("mu", "nu", "norm"):
        assert_close(jax.device_get(state[field]), jax.device_get(expected[field]))


class LinenModel(nn.Module):
    """As Model, in Linen."""

    @nn.compact
    def __call__(self, x):
        def init(name):
            return nn.with_partitioning(constant(name), SPECS[name])

        self.param("merged", init("merged"), SHAPES["merged"])
        return nn.Dense(16, name="dense", kernel_init=init("kernel"), bias_init=init("bias"))(x)


@projections
@every_mesh
def test_linen_train_state_on_a_mesh(axis_type, projection):
    mesh = make_mesh(axis_type)
    boxed: Any = LinenModel().init(jax.random.key(0), jnp.ones((1, 8)))["params"]
    specs = nn.get_partition_spec(boxed)
    shardings = jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda x: isinstance(x, P)
    )
    boxed = jax.device_put(boxed, shardings)
    assert isinstance(boxed["dense"]["kernel"], nn.Partitioned)
    with jax.set_mesh(mesh):
        state: Any = TrainState.create(
            apply_fn=LinenModel().apply, params=boxed, tx=flax_tx(projection=projection)
        )
        inner: Any = None
        step = jax.jit(lambda state: state.apply_gradients(grads=jax.grad(objective)(state.params)))
        for number in range(3):
            inner = state.opt_state[0]
            for leaf in jax.tree.leaves(inner, is_leaf=lambda x: isinstance(x, nn.Partitioned)):
                assert isinstance(leaf, jax.Array)
            assert_moments_are_placed(inner.mu, inner.nu)
            if number < 2:
                state = step(state)
    assert isinstance(state.params["dense"]["kernel"], nn.Partitioned)
    params, expected = plain_run(projection)
    assert_close(jax.device_get(nn.meta.unbox(state.params)), jax.device_get(params))
    for field in ("mu", "nu", "norm"):
        assert_close(jax.device_get(getattr(inner, field)), jax.device_get(expected[field]))


MATRIX = ApolloDimensionNumbers()


@pytest.mark.parametrize(
    ("numbers", "moment_shapes"),
    [
        (NUMBERS, MOMENT_SHAPES),
        (
            {"dense": {"kernel": MATRIX, "bias": None}, "merged": None},
            MOMENT_SHAPES | {"merged": SHAPES["merged"]},
        ),
        (
            {"dense": None, "merged": ApolloDimensionNumbers(1, (0, 2))},
            {"dense": {name: SHAPES[name] for name in ("kernel", "bias")}, "merged": (4, 2, 16)},
        ),
        (lambda _: NUMBERS, MOMENT_SHAPES),
    ],
    ids=["plain dict", "None leaves", "prefix", "callable"],
)
@pytest.mark.parametrize("pure", [True, False], ids=["arrays", "variables"])
def test_dimension_numbers_of_an_nnx_state(pure, numbers, moment_shapes):
    params = nnx.state(Model(partitioned=False), nnx.Param)
    params = nnx.as_pure(params) if pure else params
    tx: Any = apollo_optax.scale_by_apollo(4, weight_dimension_numbers=numbers)
    state = tx.init(params)
    assert nnx.to_pure_dict(jax.tree.map(jnp.shape, state.mu)) == moment_shapes
    updates, state = tx.update(params, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(updates, params)
    assert nnx.to_pure_dict(jax.tree.map(jnp.shape, state.nu)) == moment_shapes


def test_one_dimension_numbers_for_all_of_an_nnx_state():
    class Matrices(nnx.Module):
        def __init__(self):
            self.wide, self.tall = nnx.Param(normal(0, (4, 6))), nnx.Param(normal(1, (6, 4)))

    params = nnx.state(Matrices())
    tx: Any = apollo_optax.scale_by_apollo(2, weight_dimension_numbers=MATRIX)
    state = tx.init(params)
    assert nnx.to_pure_dict(jax.tree.map(jnp.shape, state.mu)) == {"wide": (2, 6), "tall": (2, 6)}


# Checkpoints.


@pytest.mark.parametrize("dtype", [None, jnp.bfloat16], ids=["default", "bfloat16"])
@projections
def test_flax_serialization_continues_bit_for_bit(projection, dtype):
    tx = apollo(0.1, projection=projection, moment_dtype=dtype)
    _, state = run(tx, make_params())
    restored: Any = flax.serialization.from_bytes(tx.init(make_params()), flax.serialization.to_bytes(state))
    chex.assert_trees_all_equal(restored, state)
    chex.assert_trees_all_equal_dtypes(restored, state)
    # What comes back are NumPy arrays, which an eager and a jitted step have to take.
    assert isinstance(restored[0].mu["scale"], np.ndarray)
    for update in (tx.update, jax.jit(tx.update)):
        continued = run(tx, make_params(7), state=restored, first=3, steps=2, update=update)
        expected = run(tx, make_params(7), state=state, first=3, steps=2, update=update)
        chex.assert_trees_all_equal(continued, expected)


@projections
def test_orbax_continues_bit_for_bit(projection, tmp_path):
    tx = apollo(0.1, projection=projection)
    params = make_params()
    _, state = run(tx, params)
    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", state)
        checkpointer.wait_until_finished()
        abstract = jax.eval_shape(tx.init, params)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), abstract)
        restored = checkpointer.restore(tmp_path / "state", abstract)
    chex.assert_trees_all_equal_structs(restored, state)
    chex.assert_trees_all_equal(restored, state)
    continued = run(tx, make_params(7), state=restored, first=3, steps=2)
    expected = run(tx, make_params(7), state=state, first=3, steps=2)
    chex.assert_trees_all_equal(continued, expected)


# Trees and leaves of all sorts.


@every_optimizer
def test_init_on_shapes(name):
    tx = OPTIMIZERS[name](0.1)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), make_params())
    state = tx.init(shapes)
    chex.assert_trees_all_equal(state, tx.init(make_params()))
    chex.assert_trees_all_equal(*(run(tx, make_params(), state=s) for s in (state, None)))


def test_init_on_shapes_with_shardings():
    mesh = make_mesh(AxisType.Auto)
    shape = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=NamedSharding(mesh, P("data", "model")))
    tx: Any = apollo_optax.scale_by_apollo(4)
    state = tx.init({"kernel": shape})
    assert state.mu["kernel"].sharding.spec == P(None, ("model", "data"))
    assert state.count.sharding.is_equivalent_to(NamedSharding(mesh, P()), 0)


@every_optimizer
def test_empty_tree(name):
    tx = OPTIMIZERS[name](0.1)
    updates, state = tx.update({}, tx.init({}), {})
    assert updates == {}
    assert int(state[0].count) == 1


@projections
def test_leaves_that_are_none_or_masked_and_python_floats(projection):
    tx = apollo(0.1, projection=projection)
    plain = {"kernel": normal(0, (4, 6)), "number": jnp.float32(0.5), "scalar": jnp.float32(2.0)}
    params = plain | {"number": 0.5, "none": None, "masked": optax.MaskedNode()}
    state, plain_state = tx.init(params), tx.init(plain)
    for _ in range(2):
        updates, state = tx.update(params, state, params)
        expected, plain_state = tx.update(plain, plain_state, plain)
        assert updates["none"] is None
        assert updates["masked"] == optax.MaskedNode()
        chex.assert_trees_all_equal({name: updates[name] for name in plain}, expected)
        for leaf in jax.tree.leaves((updates, state)):
            assert isinstance(leaf, jax.Array)
            assert not leaf.weak_type


class Pair(NamedTuple):
    kernel: jax.Array
    bias: jax.Array


Record = collections.namedtuple("Record", ["kernel", "bias"])


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
    ids=["tuple", "list", "NamedTuple", "namedtuple", "nested", "OrderedDict", "matrix", "vector"],
)
def test_trees_of_parameters(make):
    # Projections depend on paths, so these are not drawn: rows of the identity project.
    tx = apollo(0.1, projection=lambda key, shape: jnp.eye(*shape))
    params = make(normal(0, (4, 6)), normal(1, (6,)))
    grads = make(normal(2, (4, 6)), normal(3, (6,)))
    updates, state = tx.update(grads, tx.init(params), params)
    whole = {"kernel": normal(0, (4, 6)), "b": normal(1, (6,))}
    of_dict, _ = tx.update({"kernel": normal(2, (4, 6)), "b": normal(3, (6,))}, tx.init(whole), whole)
    chex.assert_trees_all_equal(updates, make(of_dict["kernel"], of_dict["b"]))
    chex.assert_trees_all_equal_structs(updates, params, state[0].mu, state[0].nu, state[0].norm)


# Nothing about the state changes from step to step but its values.


def describe(state):
    return jax.tree.map(lambda x: (x.shape, x.dtype, x.weak_type), state)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@every_optimizer
def test_types_of_the_state_never_change(name, dtype):
    with jax.enable_x64(dtype == "float64"):
        tx = OPTIMIZERS[name](0.1, weight_decay=0.01)
        params = make_params(0, dtype)
        eager = jitted = tx.init(params)
        expected = describe(eager)
        assert not any(leaf.weak_type for leaf in jax.tree.leaves(eager))
        traces = []

        @jax.jit
        def update(grads, state):
            traces.append(None)
            # Under cond, which refuses branches whose types differ in any way.
            keep = state[0].count < 0
            return jax.lax.cond(keep, lambda: (grads, state), lambda: tx.update(grads, state, params))

        for step in range(3):
            _, eager = tx.update(make_grads(step, dtype), eager, params)
            _, jitted = update(make_grads(step, dtype), jitted)
            assert describe(eager) == expected
            assert describe(jitted) == expected
        assert len(traces) == 1


@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
@projections
@every_mesh
def test_shardings_of_the_state_never_change(axis_type, projection, jit):
    mesh = make_mesh(axis_type)
    leaves = {
        "kernel": jax.device_put(VALUES["kernel"], NamedSharding(mesh, P(*SPECS["kernel"]))),
        "bias": jax.device_put(VALUES["bias"], NamedSharding(mesh, P(*SPECS["bias"]))),
    }
    tx: Any = apollo_optax.apollo(0.1, rank=4, projection=projection)
    traces = []

    def update(grads, state):
        traces.append(None)
        return tx.update(grads, state, leaves)

    step = jax.jit(update) if jit else update
    with jax.set_mesh(mesh):
        initial = state = tx.init(leaves)
        assert len(initial[0].mu["kernel"].sharding.device_set) == 8
        for _ in range(3):
            updates, state = step(leaves, state)
            pairs = zip(jax.tree.leaves(state), jax.tree.leaves(initial), strict=True)
            for new, old in pairs:
                assert new.sharding.is_equivalent_to(old.sharding, old.ndim), (new.sharding, old.sharding)
            for name, leaf in leaves.items():
                assert updates[name].sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
    assert len(traces) == (1 if jit else 3)

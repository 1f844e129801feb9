"""A run depends on the key, the paths of the leaves and the step, and nothing else."""

import contextlib
import functools
from typing import Any, NamedTuple

import chex
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import ApolloDimensionNumbers, _keys, scale_by_apollo
from tests import helpers
from tests.helpers import normal

pytestmark = pytest.mark.usefixtures("quick_compilation")

DRAWN = ["random", "rademacher"]
STACKED = ApolloDimensionNumbers(1, 2)


def make_grads(step=0) -> Any:
    kernel, bias = normal(10 * step, (4, 8)), normal(10 * step + 1, (8,))
    return {
        "attention": {"kernel": kernel, "bias": bias},
        "mlp": {"kernel": normal(10 * step + 2, (4, 8))},
    }


def make(key: Any = 0, projection: Any = "random", gap=2, **settings) -> Any:
    return scale_by_apollo(
        2, key=key, projection=projection, update_proj_gap=gap, **settings
    )


def run(tx: Any, *steps: int, grads=make_grads, state=None, jit=False) -> Any:
    """The updates and states of the steps in ``range(*steps)``, of three by default."""
    gradients = [grads(step) for step in range(*steps or (3,))]
    return helpers.run(tx, gradients, state=state, jit=jit)


def projections_in(tx, grads, state) -> Any:
    """The projection P of every matrix in the next step; None for other leaves.

    A step adds ``(1 - b1) P G`` to the first moment, so the moment after a step from
    zero with the identity for G is ``(1 - b1) P``. The matrices need 4 rows for this.
    """

    def identity_like(g):
        return jnp.broadcast_to(jnp.eye(4, 8), g.shape) if g.ndim > 1 else g

    def projection_of(g, mu):
        return 10 * mu[..., :4] if g.ndim > 1 else None

    from_zero = state._replace(mu=jax.tree.map(jnp.zeros_like, state.mu))
    _, after = tx.update(jax.tree.map(identity_like, grads), from_zero)
    return jax.tree.map(projection_of, grads, after.mu)


def first_projections(tx, grads=None) -> Any:
    grads = make_grads() if grads is None else grads
    return projections_in(tx, grads, tx.init(grads))


def draw_by_hand(key, path, refresh, size):
    """Normal projections of rank 2 for matrices of 4 rows, as documented."""
    drawn = jax.random.fold_in(key, _keys.leaf_id(path))
    drawn = jax.random.fold_in(drawn, refresh)
    keys = [jax.random.fold_in(drawn, index) for index in range(size)]
    return jnp.stack([jax.random.normal(k, (2, 4)) / jnp.sqrt(2.0) for k in keys])


def differ(a, b):
    """Whether two projections differ by more than rounding."""
    return bool(jnp.any(jnp.abs(a - b) > 1e-4))


@pytest.mark.parametrize("projection", [*DRAWN, "svd"])
def test_same_key_gives_the_same_run_bit_for_bit(projection):
    chex.assert_trees_all_equal(run(make(3, projection)), run(make(3, projection)))


@pytest.mark.parametrize("projection", DRAWN)
def test_different_keys_give_different_projections(projection):
    drawn = [first_projections(make(key, projection)) for key in (0, 1, 2**31 - 1)]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        for name in ("attention", "mlp"):
            assert differ(drawn[i][name]["kernel"], drawn[j][name]["kernel"])
    for name in ("attention", "mlp"):
        assert np.std([tree[name]["kernel"] for tree in drawn]) > 0.3
    # Leaves of one shape have different draws under one key, too.
    assert differ(drawn[0]["attention"]["kernel"], drawn[0]["mlp"]["kernel"])


def test_svd_needs_no_key():
    (updates, _), (expected, _) = (run(make(key, "svd")) for key in (0, 1))
    chex.assert_trees_all_equal(updates, expected)


# Which keys are the same.


@contextlib.contextmanager
def default_prng_impl_in_config(name):
    before = jax.config.values["jax_default_prng_impl"]
    jax.config.update("jax_default_prng_impl", name)
    try:
        yield
    finally:
        jax.config.update("jax_default_prng_impl", before)


@pytest.mark.parametrize(
    "set_default",
    [jax.default_prng_impl, default_prng_impl_in_config],
    ids=["context", "config"],
)
@pytest.mark.parametrize(
    "key",
    [5, np.int64(5), np.uint32(5), jnp.int32(5)],
    ids=["int", "int64", "uint32", "array"],
)
def test_seed_does_not_depend_on_the_default_generator(key, set_default):
    expected = run(make(5))
    with set_default("rbg"):
        assert jax.random.key_data(jax.random.key(5)).shape == (4,)
        actual = run(make(key))
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize(
    "make_key",
    [
        lambda: jax.random.PRNGKey(5),
        lambda: jax.random.key(5),
        lambda: np.asarray(jax.random.PRNGKey(5)),
        lambda: jax.random.key(5, impl="threefry2x32"),
    ],
    ids=["raw", "typed", "numpy", "threefry"],
)
def test_key_of_a_seed_gives_the_same_run_as_the_seed(make_key):
    chex.assert_trees_all_equal(run(make(make_key())), run(make(5)))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_typed_key_keeps_its_generator(impl):
    tx = make(jax.random.key(5, impl=impl))
    grads = make_grads()
    state = tx.init(grads)
    assert state.key.shape == (4,)
    key = jax.random.wrap_key_data(state.key, impl=impl)
    expected = draw_by_hand(key, ("mlp", "kernel"), 0, 1)[0]
    drawn = first_projections(tx)["mlp"]["kernel"]
    chex.assert_trees_all_close(drawn, expected, rtol=1e-5, atol=1e-6)
    assert differ(first_projections(make(5))["mlp"]["kernel"], expected)
    expected = run(tx)
    with jax.default_prng_impl("unsafe_rbg" if impl == "rbg" else "rbg"):
        chex.assert_trees_all_equal(run(tx), expected)


def test_raw_key_keeps_the_generator_that_was_the_default():
    with jax.default_prng_impl("rbg"):
        tx = make(jax.random.PRNGKey(5))
    # The steps run where the default generator is Threefry again.
    chex.assert_trees_all_equal(run(tx), run(make(jax.random.key(5, impl="rbg"))))


# The run does not depend on where and how it is computed.


def test_jit_equals_eager():
    tx = make(gap=1)
    jitted, eager = run(tx, jit=True), run(tx)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-6, atol=1e-6)
    _, (*_, state) = eager
    draw = functools.partial(projections_in, tx, make_grads())
    chex.assert_trees_all_equal(jax.jit(draw)(state), draw(state))


@pytest.mark.parametrize(
    ("shape", "spec", "stack_spec", "projection", "axis_type"),
    [
        ((8, 16), P("x"), P("x"), "random", AxisType.Auto),
        ((8, 16), P("x"), P("x"), "rademacher", AxisType.Explicit),
        ((8, 16), P(None, "x"), P(None, "x"), "random", AxisType.Explicit),
        ((16, 8), P("x"), P(None, None, "x"), "rademacher", AxisType.Auto),
        ((16, 8), P(None, "x"), P(), "random", AxisType.Auto),
    ],
    ids=[
        "contracted, layers",
        "contracted, layers, explicit",
        "channels, rows, explicit",
        "tall channels, columns",
        "tall contracted, replicated",
    ],
)
def test_eight_devices_draw_what_one_device_draws(
    shape, spec, stack_spec, projection, axis_type
):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    grads = {"matrix": normal(0, shape), "stack": normal(1, (8, 8, 16))}
    grads["bias"] = normal(2, (8,))
    shardings = {
        "matrix": NamedSharding(mesh, spec),
        "stack": NamedSharding(mesh, stack_spec),
        "bias": NamedSharding(mesh, P("x")),
    }
    numbers = {"matrix": ApolloDimensionNumbers(), "stack": STACKED, "bias": None}
    tx = make(projection=projection, weight_dimension_numbers=numbers, gap=1)
    expected = helpers.run(tx, [grads] * 2)
    with jax.set_mesh(mesh):
        actual = helpers.run(tx, [jax.device_put(grads, shardings)] * 2)
    (*_, updates), (*_, state) = actual
    for leaf in jax.tree.leaves((updates, state)):
        assert len(leaf.sharding.device_set) == 8
    # The moments are linear in the projection. So they agree up to rounding, or another
    # projection was drawn and they differ by far more.
    actual, expected = jax.device_get((actual, expected))
    chex.assert_trees_all_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projection", [*DRAWN, "svd"])
def test_saved_and_restored_run_goes_on_bit_for_bit(projection):
    tx = make(jax.random.key(7, impl="rbg"), projection)
    updates, states = run(tx, 5)
    saved = flax.serialization.to_bytes(states[2])
    # A new process would make another optimizer with the same arguments.
    fresh = make(jax.random.key(7, impl="rbg"), projection)
    restored = flax.serialization.from_bytes(fresh.init(make_grads()), saved)
    continued = run(fresh, 3, 5, state=restored)
    chex.assert_trees_all_equal(continued, (updates[3:], states[3:]))


def test_updates_take_the_key_from_the_state():
    # A restored run keeps its key, although the new optimizer was given another seed.
    expected = run(make(1))
    state = make(1).init(make_grads())
    chex.assert_trees_all_equal(run(make(2), state=state), expected)


# A leaf's draws depend on its path, not on other leaves.


def restricted(updates, expected):
    """The updates of each step, for the leaves in `expected` only."""
    return [
        {name: ours[name] for name in theirs}
        for ours, theirs in zip(updates, expected, strict=True)
    ]


@pytest.mark.parametrize("projection", DRAWN)
@pytest.mark.parametrize(
    "others",
    [
        {"a_first": (4, 8)},
        {"z_last": (6, 3)},
        {"between": (4, 8), "mlp2": (8,)},
    ],
    ids=["before", "after", "between"],
)
def test_other_leaves_do_not_matter(others, projection):
    def more(step):
        extra = {name: normal(50 + step, shape) for name, shape in others.items()}
        return make_grads(step) | extra

    tx = make(projection=projection)
    (updates, _), (expected, _) = run(tx, grads=more), run(tx)
    assert all(step.keys() > expected[0].keys() for step in updates)
    chex.assert_trees_all_equal(restricted(updates, expected), expected)


def test_leaves_added_within_a_module_do_not_matter():
    def more(step):
        grads = make_grads(step)
        grads["mlp"] |= {"a": normal(50, (4, 8)), "z": normal(51, (4, 8))}
        return grads

    (updates, _), (expected, _) = run(make(), grads=more), run(make())
    for got, wanted in zip(updates, expected, strict=True):
        chex.assert_trees_all_equal(got["attention"], wanted["attention"])
        chex.assert_trees_all_equal(got["mlp"]["kernel"], wanted["mlp"]["kernel"])


def test_order_of_leaves_does_not_matter():
    # JAX sorts the keys of a dict, but keeps the order of a NamedTuple.
    class Forward(NamedTuple):
        attention: dict
        mlp: dict

    class Backward(NamedTuple):
        mlp: dict
        attention: dict

    forward, _ = run(make(), grads=lambda step: Forward(**make_grads(step)))
    backward, _ = run(make(), grads=lambda step: Backward(**make_grads(step)))
    expected, _ = run(make())
    assert forward[0]._fields != backward[0]._fields
    for updates in (forward, backward):
        in_dicts = [step._asdict() for step in updates]
        chex.assert_trees_all_equal(in_dicts, expected)


@pytest.mark.parametrize("kind", ["masked", "partition"])
def test_leaves_taken_away_do_not_matter(kind):
    if kind == "masked":
        mask = {"attention": False, "mlp": {"kernel": True}}
        tx: Any = optax.masked(make(), mask)
    else:
        labels = {"attention": "sgd", "mlp": "apollo"}
        tx: Any = optax.partition({"apollo": make(), "sgd": optax.sgd(1.0)}, labels)
    (updates, _), (expected, _) = run(tx), run(make())
    for got, wanted in zip(updates, expected, strict=True):
        chex.assert_trees_all_equal(got["mlp"], wanted["mlp"])
        assert differ(got["attention"]["kernel"], wanted["attention"]["kernel"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, (None,) * x.ndim), tree),
        lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
        lambda tree: nnx.State(tree),
        lambda tree: jax.tree.map(nnx.Param, tree),
    ],
    ids=["Linen boxes", "NNX variables", "pure NNX state", "dict of NNX variables"],
)
def test_boxes_do_not_matter(wrap):
    boxed = run(make(), grads=lambda step: wrap(make_grads(step)))
    actual, expected = jax.tree.leaves(boxed), jax.tree.leaves(run(make()))
    chex.assert_trees_all_equal(actual, expected)


# The draws are the documented ones, and change at the documented steps.


def test_each_matrix_of_a_stack_has_its_projection():
    layers = 3
    tx = make(weight_dimension_numbers=STACKED)
    grads = {"layers": {"kernel": normal(0, (layers, 4, 8))}}
    state = tx.init(grads)
    for step in range(3):
        expected = draw_by_hand(
            jax.random.key(0), ("layers", "kernel"), step // 2, layers
        )
        drawn = projections_in(tx, grads, state)["layers"]["kernel"]
        chex.assert_trees_all_close(drawn, expected, rtol=1e-5, atol=1e-6)
        assert differ(drawn[0], drawn[1])
        assert differ(drawn[1], drawn[2])
        _, state = tx.update(grads, state)


def test_moment_of_a_stack_holds_the_moment_of_each_matrix():
    tx = make(weight_dimension_numbers=STACKED)
    grads = normal(0, (3, 4, 8))
    _, state = tx.update({"kernel": grads}, tx.init({"kernel": grads}))
    projections = draw_by_hand(jax.random.key(0), ("kernel",), 0, 3)
    for layer in range(3):
        drawn, gradient = np.asarray(projections[layer]), np.asarray(grads[layer])
        expected = 0.1 * drawn.astype(np.float64) @ gradient.astype(np.float64)
        moment = state.mu["kernel"][layer]
        np.testing.assert_allclose(moment, expected, rtol=1e-5, atol=1e-6)


def test_projections_of_stacked_and_separate_layers_have_one_distribution():
    layers = 60
    stacked = make(weight_dimension_numbers=STACKED)
    grads = {"kernel": jnp.zeros((layers, 4, 8))}
    of_stack = np.asarray(first_projections(stacked, grads)["kernel"])
    leaves = {str(layer): {"kernel": jnp.zeros((4, 8))} for layer in range(layers)}
    of_leaves = first_projections(make(), leaves)
    separate = [of_leaves[layer]["kernel"] for layer in leaves]
    for drawn in (of_stack, np.asarray(separate)):
        # Entries are independent, with mean 0 and variance 1/r = 0.5. The limits are
        # five standard deviations.
        flat = drawn.reshape(layers, -1)
        of_mean, of_variance = np.sqrt(0.5 / flat.size), 0.5 * np.sqrt(2 / flat.size)
        np.testing.assert_allclose(flat.mean(), 0, atol=5 * of_mean)
        np.testing.assert_allclose(flat.var(), 0.5, atol=5 * of_variance)
        # Layers are uncorrelated, so the off-diagonal entries of their Gram matrix
        # have mean 0.
        gram = flat @ flat.T / 4
        off = gram[~np.eye(layers, dtype=bool)]
        np.testing.assert_allclose(off.mean(), 0, atol=0.05)
        assert np.abs(off).max() < 3


def test_stack_of_one_matrix_gives_the_update_of_the_matrix():
    separate = make()
    stacked = make(weight_dimension_numbers=STACKED)
    grads = normal(0, (4, 8))
    (updates,), _ = helpers.run(separate, [{"kernel": grads}])
    (of_stack,), _ = helpers.run(stacked, [{"kernel": grads[None]}])
    actual, expected = of_stack["kernel"][0], updates["kernel"]
    chex.assert_trees_all_close(actual, expected, rtol=1e-6)


@pytest.mark.parametrize("projection", DRAWN)
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_projection_changes_every_gap_steps_and_not_between(gap, projection):
    tx = make(projection=projection, gap=gap)
    grads = {"kernel": normal(0, (4, 8))}
    state = tx.init(grads)
    drawn = []
    for _ in range(7):
        drawn.append(projections_in(tx, grads, state)["kernel"])
        _, state = tx.update(grads, state)
    # The paper counts steps from 1.
    for t in range(2, 8):
        before, now = drawn[t - 2], drawn[t - 1]
        if (t - 1) % gap == 0:
            assert differ(now, before)
        else:
            chex.assert_trees_all_equal(now, before)


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_svd_changes_every_gap_steps_and_not_between(gap):
    _, states = run(make(projection="svd", gap=gap), 7)
    for t in range(2, 8):
        before, now = (states[i].projection["mlp"]["kernel"] for i in (t - 2, t - 1))
        if (t - 1) % gap == 0:
            assert differ(now, before)
        else:
            chex.assert_trees_all_equal(now, before)


def test_draws_after_many_steps_follow_from_the_count():
    tx = make(gap=200)
    grads = {"kernel": normal(0, (4, 8))}
    refreshes = {199: 0, 200: 1, 399: 1, 400: 2, 2_000_000_000: 10_000_000}
    for count, refresh in refreshes.items():
        state = tx.init(grads)._replace(count=jnp.int32(count))
        expected = draw_by_hand(jax.random.key(0), ("kernel",), refresh, 1)[0]
        drawn = projections_in(tx, grads, state)["kernel"]
        chex.assert_trees_all_close(drawn, expected, rtol=1e-5, atol=1e-6)

"""A run is a function of the key, of the leaves' names and of the step, and of nothing else."""

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

DRAWN = ["random", "rademacher"]


def normal(seed, shape):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def make_grads(step=0) -> Any:
    return {
        "attention": {"kernel": normal(10 * step, (4, 8)), "bias": normal(10 * step + 1, (8,))},
        "mlp": {"kernel": normal(10 * step + 2, (4, 8))},
    }


def make(key: Any = 0, projection: Any = "random", gap=2, **settings) -> Any:
    return scale_by_apollo(2, key=key, projection=projection, update_proj_gap=gap, **settings)


def run(tx: Any, steps=3, grads=make_grads, update=None, state=None, first=0) -> Any:
    """The updates and states of some steps."""
    state = tx.init(grads(0)) if state is None else state
    history = []
    for step in range(first, first + steps):
        updates, state = (update or tx.update)(grads(step), state)
        history.append((updates, state))
    return history


def projections_in(tx, grads, state) -> Any:
    """P of every matrix at the next step, read off the moments of a gradient that shows it.

    The first moment gains ``(1 - b1) P G``, and the identity for G leaves P in view. Its values count
    for these matrices of 4 rows only; other leaves get none.
    """
    identity = jax.tree.map(lambda g: jnp.broadcast_to(jnp.eye(4, 8), g.shape) if g.ndim > 1 else g, grads)
    zeroed = state._replace(mu=jax.tree.map(jnp.zeros_like, state.mu))
    _, after = tx.update(identity, zeroed)
    return jax.tree.map(lambda g, mu: 10 * mu[..., :4] if g.ndim > 1 else None, grads, after.mu)


def first_projections(tx, grads=None) -> Any:
    grads = make_grads() if grads is None else grads
    return projections_in(tx, grads, tx.init(grads))


def differ(a, b):
    """Whether two projections are different draws, beyond rounding."""
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
    # And leaves of one shape differ from each other under one key.
    assert differ(drawn[0]["attention"]["kernel"], drawn[0]["mlp"]["kernel"])


def test_svd_needs_no_key():
    for (updates, _), (expected, _) in zip(run(make(0, "svd")), run(make(1, "svd")), strict=True):
        chex.assert_trees_all_equal(updates, expected)


# What counts as the same key.


def by_config():
    before = jax.config.values["jax_default_prng_impl"]
    jax.config.update("jax_default_prng_impl", "rbg")
    return lambda: jax.config.update("jax_default_prng_impl", before)


@pytest.mark.parametrize("how", ["context", "config"])
@pytest.mark.parametrize(
    "key", [5, np.int64(5), np.uint32(5), jnp.int32(5)], ids=["int", "int64", "uint32", "array"]
)
def test_a_seed_is_independent_of_the_default_generator(key, how):
    expected = run(make(5))
    if how == "context":
        with jax.default_prng_impl("rbg"):
            assert jax.random.key_data(jax.random.key(5)).shape == (4,)
            actual = run(make(key))
    else:
        restore = by_config()
        try:
            assert jax.random.key_data(jax.random.key(5)).shape == (4,)
            actual = run(make(key))
        finally:
            restore()
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
def test_typed_and_raw_keys_are_the_seed_they_were_made_from(make_key):
    chex.assert_trees_all_equal(run(make(make_key())), run(make(5)))


@pytest.mark.parametrize("impl", ["rbg", "unsafe_rbg"])
def test_a_typed_key_keeps_its_generator(impl):
    tx = make(jax.random.key(5, impl=impl))
    grads = make_grads()
    state = tx.init(grads)
    assert state.key.shape == (4,)
    key = jax.random.wrap_key_data(state.key, impl=impl)
    expected = by_hand(key, ("mlp", "kernel"), 0, 1)[0]
    chex.assert_trees_all_close(first_projections(tx)["mlp"]["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert differ(first_projections(make(5))["mlp"]["kernel"], expected)
    expected = run(tx)
    with jax.default_prng_impl("unsafe_rbg" if impl == "rbg" else "rbg"):
        chex.assert_trees_all_equal(run(tx), expected)


def test_a_raw_key_is_of_the_generator_that_was_the_default():
    with jax.default_prng_impl("rbg"):
        tx = make(jax.random.PRNGKey(5))
    # The step runs outside, where raw keys are Threefry's.
    chex.assert_trees_all_equal(run(tx), run(make(jax.random.key(5, impl="rbg"))))


# Where and how it runs.


def test_jit_equals_eager():
    tx = make(gap=1)
    jitted, eager = run(tx, update=jax.jit(tx.update)), run(tx)
    chex.assert_trees_all_close(jitted, eager, rtol=1e-6, atol=1e-6)
    drawn = projections_in(tx, make_grads(), eager[-1][1])
    chex.assert_trees_all_equal(
        jax.jit(lambda state: projections_in(tx, make_grads(), state))(eager[-1][1]), drawn
    )


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
def test_eight_devices_draw_what_one_draws(shape, spec, stack_spec, projection, axis_type):
    mesh = jax.make_mesh((8,), ("x",), axis_types=(axis_type,))
    grads = {"matrix": normal(0, shape), "stack": normal(1, (8, 8, 16)), "bias": normal(2, (8,))}
    specs = {"matrix": spec, "stack": stack_spec, "bias": P("x")}
    placed = {name: jax.device_put(g, NamedSharding(mesh, specs[name])) for name, g in grads.items()}
    numbers = {"matrix": ApolloDimensionNumbers(), "stack": ApolloDimensionNumbers(1, 2), "bias": None}
    tx = make(projection=projection, weight_dimension_numbers=numbers, gap=1)
    expected = run(tx, grads=lambda _: grads, steps=2)
    with jax.set_mesh(mesh):
        actual = run(tx, grads=lambda _: placed, steps=2)
    assert all(len(g.sharding.device_set) == 8 for g in jax.tree.leaves(actual[-1]))
    # The moments are linear in the projection: the same to rounding, or else altogether different.
    chex.assert_trees_all_close(jax.device_get(actual), jax.device_get(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("projection", [*DRAWN, "svd"])
def test_saved_and_restored_run_goes_on_bit_for_bit(projection):
    tx = make(jax.random.key(7, impl="rbg"), projection)
    uninterrupted = run(tx, steps=5)
    saved = flax.serialization.to_bytes(uninterrupted[2][1])
    # As in a new process, with another optimizer object of the same arguments.
    fresh = make(jax.random.key(7, impl="rbg"), projection)
    restored = flax.serialization.from_bytes(fresh.init(make_grads()), saved)
    chex.assert_trees_all_equal(run(fresh, steps=2, state=restored, first=3), uninterrupted[3:])


def test_the_key_in_the_state_is_the_one_in_use():
    # A restored run goes on with its own key, whatever the seed the new optimizer was given.
    expected = run(make(1))
    state = make(1).init(make_grads())
    chex.assert_trees_all_equal(run(make(2), state=state), expected)


# A leaf's draws depend on its name alone.


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
        return make_grads(step) | {name: normal(50 + step, shape) for name, shape in others.items()}

    tx = make(projection=projection)
    for (updates, _), (expected, _) in zip(run(tx, grads=more), run(tx), strict=True):
        assert updates.keys() > expected.keys()
        chex.assert_trees_all_equal({name: updates[name] for name in expected}, expected)


def test_leaves_added_within_a_module_do_not_matter():
    def more(step):
        grads = make_grads(step)
        grads["mlp"] |= {"a": normal(50, (4, 8)), "z": normal(51, (4, 8))}
        return grads

    for (updates, _), (expected, _) in zip(run(make(), grads=more), run(make()), strict=True):
        chex.assert_trees_all_equal(updates["attention"], expected["attention"])
        chex.assert_trees_all_equal(updates["mlp"]["kernel"], expected["mlp"]["kernel"])


def test_order_of_leaves_does_not_matter():
    # NamedTuples keep their order, where JAX sorts dicts.
    class Forward(NamedTuple):
        attention: dict
        mlp: dict

    class Backward(NamedTuple):
        mlp: dict
        attention: dict

    forward = run(make(), grads=lambda step: Forward(**make_grads(step)))
    backward = run(make(), grads=lambda step: Backward(**make_grads(step)))
    plain = run(make())
    for (a, _), (b, _), (c, _) in zip(forward, backward, plain, strict=True):
        assert list(a._asdict()) != list(b._asdict())
        chex.assert_trees_all_equal(a._asdict(), c)
        chex.assert_trees_all_equal({name: getattr(b, name) for name in c}, c)


@pytest.mark.parametrize("kind", ["masked", "partition"])
def test_leaves_taken_away_do_not_matter(kind):
    if kind == "masked":
        mask = {"attention": False, "mlp": {"kernel": True}}
        tx: Any = optax.masked(make(), mask)
    else:
        labels = {"attention": {"kernel": "sgd", "bias": "sgd"}, "mlp": {"kernel": "apollo"}}
        tx: Any = optax.partition({"apollo": make(), "sgd": optax.sgd(1.0)}, labels)
    for (updates, _), (expected, _) in zip(run(tx), run(make()), strict=True):
        chex.assert_trees_all_equal(updates["mlp"], expected["mlp"])
        assert differ(updates["attention"]["kernel"], expected["attention"]["kernel"])


@pytest.mark.parametrize(
    "wrap",
    [
        lambda tree: jax.tree.map(lambda x: nn.Partitioned(x, names=(None,) * x.ndim), tree),
        lambda tree: nnx.State(jax.tree.map(nnx.Param, tree)),
        lambda tree: nnx.State(tree),
        lambda tree: jax.tree.map(nnx.Param, tree),
    ],
    ids=["Linen boxes", "NNX variables", "pure NNX state", "dict of NNX variables"],
)
def test_boxes_do_not_matter(wrap):
    boxed = run(make(), grads=lambda step: wrap(make_grads(step)))
    for (updates, state), (expected, expected_state) in zip(boxed, run(make()), strict=True):
        chex.assert_trees_all_equal(jax.tree.leaves(updates), jax.tree.leaves(expected))
        chex.assert_trees_all_equal(jax.tree.leaves(state), jax.tree.leaves(expected_state))


# What is drawn, and when.


def by_hand(key, path, refresh, size):
    """The normal projections of 4-row matrices at rank 2, as the documentation states them."""
    drawn = jax.random.fold_in(jax.random.fold_in(key, _keys.leaf_id(path)), refresh)
    keys = [jax.random.fold_in(drawn, b) for b in range(size)]
    return jnp.stack([jax.random.normal(k, (2, 4)) / jnp.sqrt(2.0) for k in keys])


def test_each_matrix_of_a_stack_has_its_projection():
    layers = 3
    tx = make(weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    grads = {"layers": {"kernel": normal(0, (layers, 4, 8))}}
    state = tx.init(grads)
    for step in range(3):
        expected = by_hand(jax.random.key(0), ("layers", "kernel"), step // 2, layers)
        drawn = projections_in(tx, grads, state)["layers"]["kernel"]
        chex.assert_trees_all_close(drawn, expected, rtol=1e-5, atol=1e-6)
        assert differ(drawn[0], drawn[1])
        assert differ(drawn[1], drawn[2])
        _, state = tx.update(grads, state)


def test_mu_of_a_stack_is_that_of_each_matrix_by_hand():
    tx = make(weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    grads = normal(0, (3, 4, 8))
    _, state = tx.update({"kernel": grads}, tx.init({"kernel": grads}))
    projections = by_hand(jax.random.key(0), ("kernel",), 0, 3)
    for layer in range(3):
        expected = 0.1 * np.asarray(projections[layer], np.float64) @ np.asarray(grads[layer], np.float64)
        np.testing.assert_allclose(state.mu["kernel"][layer], expected, rtol=1e-5, atol=1e-6)


def test_a_stack_and_separate_leaves_are_alike_in_distribution():
    # The entries of 60 layers' projections, stacked and one leaf for each, against what they should be.
    layers = 60
    stacked = make(weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    grads = {"kernel": jnp.zeros((layers, 4, 8))}
    of_stack = np.asarray(first_projections(stacked, grads)["kernel"])
    separate = np.asarray([by_hand(jax.random.key(0), (str(i), "kernel"), 0, 1)[0] for i in range(layers)])
    for drawn in (of_stack, separate):
        # P has independent entries of variance 1/r: so has the mean over layers, to within 5 sigma.
        flat = drawn.reshape(layers, -1)
        np.testing.assert_allclose(flat.mean(), 0, atol=5 * np.sqrt(0.5 / flat.size))
        np.testing.assert_allclose(flat.var(), 0.5, atol=5 * 0.5 * np.sqrt(2 / flat.size))
        # Layers are uncorrelated: the Gram matrix's off-diagonal entries average out.
        gram = flat @ flat.T / 4
        off = gram[~np.eye(layers, dtype=bool)]
        np.testing.assert_allclose(off.mean(), 0, atol=0.05)
        assert np.abs(off).max() < 3


def test_a_matrix_of_a_stack_of_one_is_the_matrix():
    separate = make()
    stacked = make(weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    grads = normal(0, (4, 8))
    updates, _ = separate.update({"kernel": grads}, separate.init({"kernel": grads}))
    of_stack, _ = stacked.update({"kernel": grads[None]}, stacked.init({"kernel": grads[None]}))
    chex.assert_trees_all_close(of_stack["kernel"][0], updates["kernel"], rtol=1e-6)


@pytest.mark.parametrize("projection", DRAWN)
@pytest.mark.parametrize("gap", [1, 2, 3])
def test_projection_is_drawn_anew_every_gap_steps_and_not_between(gap, projection):
    tx = make(projection=projection, gap=gap)
    grads = {"kernel": normal(0, (4, 8))}
    state = tx.init(grads)
    drawn = []
    for _ in range(7):
        drawn.append(projections_in(tx, grads, state)["kernel"])
        _, state = tx.update(grads, state)
    for t in range(2, 8):  # Steps as the paper counts them, from 1.
        before, now = drawn[t - 2], drawn[t - 1]
        if (t - 1) % gap == 0:
            assert differ(now, before)
        else:
            chex.assert_trees_all_equal(now, before)


@pytest.mark.parametrize("gap", [1, 2, 3])
def test_svd_is_taken_anew_every_gap_steps_and_not_between(gap):
    tx = make(projection="svd", gap=gap)
    states = [state for _, state in run(tx, steps=7)]
    for t in range(2, 8):
        before, now = (states[i].projection["mlp"]["kernel"] for i in (t - 2, t - 1))
        if (t - 1) % gap == 0:
            assert differ(now, before)
        else:
            chex.assert_trees_all_equal(now, before)


def test_draws_after_many_steps_are_by_hand_still():
    # The refresh is counted by the state, so a run can be entered anywhere.
    tx = make(gap=200)
    grads = {"kernel": normal(0, (4, 8))}
    for count, refresh in ((199, 0), (200, 1), (399, 1), (400, 2), (2_000_000_000, 10_000_000)):
        state = tx.init(grads)._replace(count=jnp.int32(count))
        expected = by_hand(jax.random.key(0), ("kernel",), refresh, 1)[0]
        drawn = projections_in(tx, grads, state)["kernel"]
        chex.assert_trees_all_close(drawn, expected, rtol=1e-5, atol=1e-6)

"""The file proposed to Optax computes what this library computes."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest

import apollo_optax
from contrib import apollo_optax_contrib as contrib

pytestmark = pytest.mark.usefixtures("quick_compilation")

SHAPES = {
    "wide": {"kernel": (8, 24), "bias": (24,)},
    "tall": {"kernel": (24, 8)},
    "thin": {"kernel": (3, 16)},  # Its smaller side is below the rank.
    "row": {"kernel": (1, 16)},  # Both take it for a vector.
}


def random_tree(seed: int) -> Any:
    leaves, structure = jax.tree.flatten(
        SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return structure.unflatten(map(jax.random.normal, keys, leaves))


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 4, "update_proj_gap": 2},
        {"rank": 1, "scale_type": "tensor", "scale": 128.0},
        {"rank": 4, "norm_growth_limit": None, "b1": 0.8, "eps": 1e-4},
    ],
)
def test_updates_and_states_equal_those_of_the_library(options: Any) -> None:
    # The file for Optax draws normal entries, as the paper does.
    ours = apollo_optax.apollo(0.01, weight_decay=0.1, projection="random", **options)
    theirs = contrib.apollo(0.01, weight_decay=0.1, **options)
    params = random_tree(0)
    states = [ours.init(params), theirs.init(params)]
    steps = [jax.jit(ours.update), jax.jit(theirs.update)]
    for step in range(5):
        # The third gradient is a spike, and the fourth vanishes beside eps.
        size = {2: 30.0, 3: 1e-12}.get(step, 1.0)
        grads = jax.tree.map(lambda x, size=size: size * x, random_tree(step + 1))
        updates = []
        for number, update in enumerate(steps):
            one, states[number] = update(grads, states[number], params)
            updates.append(one)
        assert_close(*updates)
    for name in contrib.ScaleByApolloState._fields:
        assert_close(*(getattr(state[0], name) for state in states))


def assert_close(ours: Any, theirs: Any) -> None:
    assert jax.tree.structure(ours) == jax.tree.structure(theirs)
    for x, y in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert x.shape == y.shape
        assert x.dtype == y.dtype
        assert jnp.allclose(x, y, rtol=2e-6, atol=2e-6 * float(jnp.abs(x).max()))


def test_trains_and_takes_a_mask() -> None:
    params = {"embed": jnp.ones((6, 8)), "kernel": jnp.ones((8, 16))}
    tx = contrib.apollo(0.1, rank=2, matrices={"embed": False, "kernel": True})
    state = tx.init(params)
    assert jax.tree.map(jnp.shape, state[0].mu) == {"embed": (6, 8), "kernel": (2, 16)}

    def loss(params: Any) -> jax.Array:
        return optax.tree.norm(params, squared=True)

    def step(carry: Any, _: None) -> tuple[Any, None]:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (after, _), _ = jax.lax.scan(step, (params, state), length=30)
    assert loss(after) < loss(params) / 2


def test_a_mask_goes_with_masked_and_partition() -> None:
    params = {"embed": jnp.ones((6, 8)), "kernel": jnp.ones((8, 16))}
    is_kernel = {"embed": False, "kernel": True}
    ours = contrib.scale_by_apollo(2, matrices=is_kernel)
    labels = jax.tree.map(str, is_kernel)
    for tx in (
        optax.masked(ours, is_kernel),
        optax.partition({"True": ours, "False": optax.sgd(1.0)}, labels),
    ):
        state = tx.init(params)
        updates, _ = jax.jit(tx.update)(params, state, params)
        shapes = {x.shape for x in jax.tree.leaves(state)}
        assert shapes == {(), (2,), (2, 16)}
        assert not jnp.allclose(updates["kernel"], params["kernel"])


@pytest.mark.parametrize(
    ("matrices", "is_matrix"),
    [
        (True, {"a": {"kernel": True}, "b": {"kernel": True}}),
        ({"a": True, "b": False}, {"a": {"kernel": True}, "b": {"kernel": False}}),
    ],
)
def test_a_mask_may_be_a_prefix(matrices: Any, is_matrix: Any) -> None:
    params = jax.tree.map(lambda _: jnp.ones((8, 16)), is_matrix)
    state = contrib.scale_by_apollo(2, matrices=matrices).init(params)
    expected = jax.tree.map(lambda each: (2, 16) if each else (8, 16), is_matrix)
    assert jax.tree.map(jnp.shape, state.mu) == expected


@pytest.mark.parametrize("dtype", [jnp.complex64, jnp.int32])
def test_rejects_leaves_that_are_not_real(dtype: Any) -> None:
    params = {"kernel": jnp.ones((8, 16), dtype)}
    with pytest.raises(ValueError, match=f"got dtype {jnp.dtype(dtype)}"):
        contrib.scale_by_apollo(2).init(params)


def test_a_channel_without_a_gradient_divides_nothing_by_zero() -> None:
    params = {"kernel": jnp.ones((8, 16)).at[:, 3].set(0.0)}
    tx = contrib.scale_by_apollo(2)
    with jax.debug_nans(True):
        updates, _ = tx.update(params, tx.init(params))
    assert (updates["kernel"][:, 3] == 0).all()


def test_rejects_an_unknown_scale_type() -> None:
    with pytest.raises(ValueError, match="'channel' or 'tensor', got row"):
        contrib.scale_by_apollo(4, scale_type="row")


def test_rejects_a_rank_below_1_and_a_matrix_of_three_axes() -> None:
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        contrib.scale_by_apollo(0)
    tx = contrib.scale_by_apollo(2, matrices={"kernel": True})
    with pytest.raises(ValueError, match=r"a leaf of shape \(3, 4, 6\), and only 2-D"):
        tx.init({"kernel": jnp.ones((3, 4, 6))})

"""Everything works where JAX may not add axes to the operands of an operation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import apollo_optax
from apollo_optax import ApolloDimensionNumbers
from apollo_optax._projection import NAMED
from tests.helpers import normal

PARAMS = {
    # The two leaves of one shape are drawn together.
    "wide": normal(0, (40, 64)),
    "alike": normal(1, (40, 64)),
    "tall": normal(2, (64, 40)),
    "stack": normal(3, (3, 40, 64)),
    "heads": normal(4, (4, 5, 2, 16)),
    "bias": normal(5, (64,)),
    "temperature": normal(6, ()),
}
NUMBERS = dict.fromkeys(("wide", "alike", "tall"), ApolloDimensionNumbers()) | {
    "stack": ApolloDimensionNumbers(1, 2),
    "heads": ApolloDimensionNumbers((0, 2), 3),
    "bias": None,
    "temperature": None,
}


@pytest.fixture(autouse=True)
def no_rank_promotion(quick_compilation):
    with jax.numpy_rank_promotion("raise"):
        yield


def two_steps(tx):
    update = jax.jit(tx.update)
    _, state = update(PARAMS, tx.init(PARAMS), PARAMS)
    updates, _ = update(PARAMS, state, PARAMS)
    return updates


@pytest.mark.parametrize(
    "projection", [*NAMED, jax.random.normal], ids=[*NAMED, "callable"]
)
@pytest.mark.parametrize("name", ["apollo", "apollo_mini"])
def test_updates(name, projection):
    rank = {"rank": 4} if name == "apollo" else {}
    tx = getattr(apollo_optax, name)(
        0.1,
        **rank,
        projection=projection,
        scale_front=name == "apollo_mini",
        weight_decay=0.1,
        weight_dimension_numbers=NUMBERS,
    )
    updates = two_steps(tx)
    assert all(jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(updates))


def test_limiter_alone():
    two_steps(apollo_optax.limit_norm_growth(1.01, weight_dimension_numbers=NUMBERS))


@pytest.mark.parametrize("settings", [{}, {"axis": -2}, {"axis": -2, "group_size": 8}])
def test_quantized_updates(settings):
    weights = {
        "int8": apollo_optax.quantize(PARAMS["stack"], **settings),
        "bfloat16": PARAMS["wide"].astype(jnp.bfloat16),
    }
    updates = {"int8": PARAMS["stack"], "bfloat16": PARAMS["wide"]}
    new = apollo_optax.apply_updates_stochastic(weights, updates, jax.random.key(0))
    apollo_optax.dequantize(new)


@pytest.mark.parametrize("columns", [31, 32, 45])
def test_rademacher_takes_the_same_bits_as_ever(columns):
    """The draws are part of the format, since a resumed run must repeat them."""
    key, rows = jax.random.key(3), 4
    drawn = NAMED["rademacher"].draw_one(key, (rows, columns), jnp.float32)
    words = np.asarray(jax.random.bits(key, (rows, -(-columns // 32)), jnp.uint32))
    bits = (words[:, :, None] >> np.arange(32, dtype=np.uint32)) & 1
    signs = 1 - 2 * bits.reshape(rows, -1)[:, :columns].astype(np.float32)
    np.testing.assert_array_equal(drawn, signs / 2)

"""The table of a state's memory, by parameter and in total."""

import re

import jax
import jax.numpy as jnp
import optax
import pytest

from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    apollo_mini,
    apollo_zero,
    int8_trace,
    limit_norm_growth,
    racs,
    scale_by_apollo,
    state_bytes,
    tabulate,
)

NUMBERS = {
    "layers": ApolloDimensionNumbers(1, 2),
    "norm": None,
    "embed": None,
    "lm_head": None,
}


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


PARAMS = {
    "layers": {"kernel": leaf(3, 8, 16)},
    "norm": {"scale": leaf(3, 8)},
    "embed": {"embedding": leaf(100, 8)},
    "lm_head": {"kernel": leaf(8, 100)},
}


def rows(text):
    """The other cells of each row, by the cell in the first column."""
    cells = [re.split(r"\s{2,}", line) for line in text.splitlines()]
    return {first: others for first, *others in cells if first}


def number(text):
    return int(text.replace(",", ""))


def test_table_has_each_tensor_and_the_totals():
    tx = apollo(0.01, rank=4, weight_dimension_numbers=NUMBERS)
    table = rows(tabulate(tx, PARAMS, weight_dimension_numbers=NUMBERS))
    moments = 2 * 3 * 4 * 16 * 4
    assert table["layers/kernel"] == [
        "(3, 8, 16)",
        "APOLLO rank 4, 8 contracted",
        "(3, 4, 16) x 2, (3,) x 1",
        f"{moments + 12:,}",
        f"{2 * 3 * 8 * 16 * 4:,}",
    ]
    assert table["norm/scale"][1:3] == ["Adam", "(3, 8) x 2"]
    assert table["embed/embedding"][1] == table["lm_head/kernel"][1] == "Adam"
    assert [number(x) for x in table["kernels"]] == [moments + 12, 2 * 3 * 8 * 16 * 4]
    # The limiter's norm is a scalar of every leaf, also of those that get Adam.
    of_embeddings = [number(x) for x in table["embeddings and head"]]
    assert of_embeddings == [2 * 1600 * 4 + 8, 2 * 1600 * 4]
    # The rest is the moments and the scalar of `norm/scale`, the count and the key.
    of_others = [number(x) for x in table["other"]]
    assert of_others == [2 * 24 * 4 + 4 + 4 + 8, 2 * 24 * 4 + 4]


@pytest.mark.parametrize(
    "make", [apollo, apollo_mini, racs, optax.adamw, optax.sgd, optax.lion]
)
def test_totals_are_the_bytes_of_the_whole_state(make):
    is_ours = not make.__module__.startswith("optax")
    tx = make(0.01, **{"weight_dimension_numbers": NUMBERS} if is_ours else {})
    table = rows(tabulate(tx, PARAMS, weight_dimension_numbers=NUMBERS))
    for column, optimizer in enumerate([tx, optax.adamw(0.01)]):
        state = jax.eval_shape(optimizer.init, PARAMS)
        total = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
        assert number(table["total"][column]) == total
        groups = ("kernels", "embeddings and head", "other")
        assert sum(number(table[group][column]) for group in groups) == total


@pytest.mark.parametrize(
    ("tx", "treatment"),
    [
        (optax.adam(0.1), "Adam"),
        (optax.sgd(0.1), "no state"),
        (optax.sgd(0.1, momentum=0.9), "other"),
        (optax.lion(0.1), "other"),
        (optax.chain(optax.adam(0.1), limit_norm_growth()), "Adam"),
        (optax.masked(apollo(0.1), {"kernel": False}), "no state"),
        (apollo(0.1, rank=64), "APOLLO rank 4, 4 contracted"),
        (apollo(0.1, rank=2, projection="svd"), "APOLLO rank 2, 4 contracted"),
        (apollo_zero(0.1), "flattened"),
        (apollo_zero(0.1, momentum=0.9), "flattened"),
        (optax.masked(apollo_zero(0.1, momentum=0.9), {"kernel": False}), "no state"),
        (
            apollo_zero(0.1, momentum=0.9, int8_momentum=True),
            "momentum in int8, flattened",
        ),
        (int8_trace(0.9), "momentum in int8"),
        (racs(0.1), "RACS"),
        (
            optax.chain(scale_by_apollo(2), int8_trace(0.9)),
            "APOLLO rank 2, 4 contracted, momentum in int8",
        ),
        (
            optax.chain(int8_trace(0.9), scale_by_apollo(2)),
            "momentum in int8, APOLLO rank 2, 4 contracted",
        ),
    ],
)
def test_table_names_the_treatment(tx, treatment):
    assert rows(tabulate(tx, {"kernel": leaf(4, 6)}))["kernel"][1] == treatment


def test_modules_may_be_named_like_fields_of_the_state():
    params = {"mu": {"w": leaf(4, 8)}, "norm": {"w": leaf(4, 12)}, "w": leaf(4, 6)}
    table = rows(tabulate(apollo(0.1, rank=2), params))
    for name, n in (("mu/w", 8), ("norm/w", 12), ("w", 6)):
        assert table[name][1:3] == ["APOLLO rank 2, 4 contracted", f"(2, {n}) x 2"]


def test_parameters_may_be_named_like_fields_of_other_states():
    params = {name: leaf() for name in ("count", "learning_rate")}
    tx = optax.chain(
        optax.adam(optax.constant_schedule(0.1)),
        optax.inject_hyperparams(optax.sgd)(0.1),
    )
    table = rows(tabulate(tx, params))
    for name in params:
        assert table[name][1:] == ["Adam", "8", "8"]


def test_scalars_and_the_empty_tree_have_tables():
    assert rows(tabulate(apollo(0.1), {"t": leaf()}))["t"][:2] == ["()", "Adam"]
    assert rows(tabulate(apollo(0.1), {}))["total"] == ["12", "4"]


def test_optimizers_that_need_an_array_have_a_table_too():
    size = 3 * 8 * 16 + 3 * 8 + 2 * 100 * 8
    for tx in (optax.flatten(optax.adam(0.1)), optax.lbfgs()):
        total = rows(tabulate(tx, PARAMS))["total"]
        state = jax.tree.leaves(jax.eval_shape(tx.init, PARAMS))
        nbytes = sum(leaf.size * leaf.dtype.itemsize for leaf in state)
        assert nbytes > 4 * size
        assert f"{nbytes:,}" in total


def test_counts_a_typed_key():
    """That of `add_noise` belongs to no parameter."""
    key = jax.random.key(0)
    tx = optax.chain(optax.add_noise(0.1, 0.9, key=key), apollo_mini(0.1))
    params = {"kernel": leaf(64, 100)}
    before, after = (sum(state_bytes(t, params)) for t in (apollo_mini(0.1), tx))
    assert after - before == 4 + jax.random.key_data(key).nbytes
    assert "kernel" in tabulate(tx, params)


def test_the_last_line_on_a_mesh_is_that_of_each_device():
    mesh = jax.make_mesh((8,), ("fsdp",))

    def sharded(shape, *spec):
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)

    params = {"kernel": sharded((16, 64), None, "fsdp"), "bias": sharded((64,))}
    tx = apollo(0.1, rank=4)
    ours, adamw = rows(tabulate(tx, params))["total per device"]
    # The moments of the kernel are sharded, all else is on every device.
    rest = 2 * 64 * 4
    count, key, norms = 4, 8, 2 * 4
    assert number(ours) == 2 * 4 * 64 * 4 // 8 + rest + count + key + norms
    assert number(adamw) == 2 * 16 * 64 * 4 // 8 + rest + count
    unsharded = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), params)
    assert "per device" not in tabulate(tx, unsharded)

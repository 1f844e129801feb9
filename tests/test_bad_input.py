"""Every mistake gives one error that names the value, the leaf and the remedy."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    apollo_mini,
    apollo_zero,
    limit_norm_growth,
    racs,
    scale_by_apollo,
    scale_by_flattening,
    scale_by_racs,
)
from tests.helpers import make_mesh, put

PARAMS = {"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(6)}}
MUON = apollo_optax.dimension_numbers_from(optax.contrib.MuonDimensionNumbers())


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rank": 0}, ValueError, "rank must be at least 1, got 0"),
        ({"rank": -1}, ValueError, "rank must be at least 1, got -1"),
        ({"rank": 2.5}, TypeError, "rank must be an int of at least 1, got 2.5"),
        ({"rank": "4"}, TypeError, "rank must be an int of at least 1, got '4'"),
        ({"rank": True}, TypeError, "rank must be an int of at least 1, got True"),
        ({"rank": jnp.array(4)}, TypeError, "rank must be a Python int.*static_args"),
        ({"rank": np.array(4)}, TypeError, "rank must be a Python int.*static_args"),
        (
            {"scale_type": "row"},
            ValueError,
            "scale_type must be .*channel.*tensor.*got 'row'",
        ),
        ({"scale": -1.0}, ValueError, "scale must be .*got -1.0"),
        ({"scale": float("nan")}, ValueError, "scale must be .*got nan"),
        (
            {"update_proj_gap": 0},
            ValueError,
            "update_proj_gap must be at least 1, got 0",
        ),
        ({"update_proj_gap": 1.5}, TypeError, "update_proj_gap must be an int"),
        ({"b1": 1.0}, ValueError, r"b1 must be in \[0, 1\), got 1.0"),
        ({"b1": -0.1}, ValueError, r"b1 must be in \[0, 1\), got -0.1"),
        ({"b2": 1.0}, ValueError, r"b2 must be in \[0, 1\), got 1.0"),
        ({"b2": "0.9"}, TypeError, "b2 must be a number"),
        ({"eps": -1e-8}, ValueError, "eps must be .*got -1e-08"),
        (
            {"norm_growth_limit": 0.5},
            ValueError,
            "norm_growth_limit must be at least 1.*got 0.5",
        ),
        (
            {"scale_front": jnp.array(True)},
            TypeError,
            "scale_front must be True or False.*static_args",
        ),
        (
            {"projection": "qr"},
            ValueError,
            "projection must be .*rademacher.*random.*svd.*got 'qr'",
        ),
        ({"projection": 3}, TypeError, "projection must be .*callable.*got 3"),
        ({"scale_type": 1}, TypeError, "scale_type must be .*channel.*got 1"),
        (
            {"moment_dtype": jnp.int8},
            TypeError,
            "moment_dtype must be a real floating-point dtype",
        ),
        (
            {"moment_dtype": jnp.float8_e4m3fn},
            ValueError,
            "moment_dtype float8_e4m3fn can't hold .*; give bfloat16",
        ),
        (
            {"moment_dtype": "float16"},
            ValueError,
            "moment_dtype float16 can't hold .*; give bfloat16",
        ),
        (
            {"b2": jnp.array(0.999, jnp.bfloat16)},
            TypeError,
            "b2 has dtype bfloat16.*hyperparam_dtype=jnp.float32",
        ),
        (
            {"b1": jnp.array([0.9])},
            TypeError,
            r"b1 must be one real number, got an array of shape \(1,\)",
        ),
        ({"norm_growth_limit": np.ones((1, 1))}, TypeError, "must be one real number"),
        ({"scale": jnp.array(True)}, TypeError, "scale must be one real .* dtype bool"),
        ({"eps": jnp.array(1e-8j)}, TypeError, "eps must be one .* dtype complex64"),
        ({"moment_dtype": "flot32"}, TypeError, "moment_dtype must be .*got 'flot32'"),
        ({"key": 0.5}, TypeError, "key must be an int seed.*got 0.5"),
        ({"key": True}, TypeError, "key must be an int seed.*got True"),
        ({"key": -1}, ValueError, r"key must be a seed from 0 to 2\*\*32 - 1, got -1"),
        (
            {"key": 2**32},
            ValueError,
            r"key must be a seed from 0 to 2\*\*32 - 1, got 4294967296",
        ),
        ({"key": np.zeros(3, np.uint32)}, TypeError, "key must be .* raw data of one"),
        ({"key": jnp.zeros((3, 2), jnp.uint32)}, TypeError, "key must be an int seed"),
        (
            {"key": jax.random.split(jax.random.key(0))},
            TypeError,
            "key must be .* one JAX key",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "make", [scale_by_apollo, lambda **kw: apollo(0.1, **kw)], ids=["scale", "apollo"]
)
def test_rejects_arguments(make, arguments, error, message):
    with pytest.raises(error, match=message):
        make(**arguments)


def test_mini_and_limiter_reject_arguments():
    with pytest.raises(ValueError, match="b2 must be in"):
        apollo_mini(0.1, b2=2.0)
    with pytest.raises(
        ValueError, match=r"norm_growth_limit must be at least 1.*got 0\.99"
    ):
        limit_norm_growth(0.99)
    with pytest.raises(TypeError, match="norm_growth_limit"):
        limit_norm_growth(None)


def test_accepts_numpy_scalars():
    tx = scale_by_apollo(np.int64(2), b1=np.float32(0.9), update_proj_gap=np.int32(3))
    updates, _ = tx.update(PARAMS, tx.init(PARAMS))
    assert jnp.isfinite(updates["layer"]["kernel"]).all()


@pytest.mark.parametrize("factory", [apollo_optax.apollo_zero, apollo_optax.int8_trace])
def test_rejects_dimension_numbers_that_are_called_as_a_schedule(factory):
    rules = apollo_optax.dimension_numbers_by_path([("kernel$", None)])
    rate = {"learning_rate" if factory is apollo_optax.apollo_zero else "decay": 0.1}
    tx = optax.inject_hyperparams(factory)(**rate, weight_dimension_numbers=rules)
    with pytest.raises(TypeError, match=r"inject_hyperparams needs static_args="):
        tx.init({"kernel": jnp.ones((4, 8))})


def has_several_axes(params):
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


INJECTED = [
    (apollo, {"learning_rate": 0.1}),
    (apollo_mini, {"learning_rate": 0.1}),
    (apollo_mini, {"learning_rate": 0.1, "moment_dtype": jnp.bfloat16}),
    (apollo_zero, {"learning_rate": 0.1, "rank": 2}),
    (apollo_zero, {"learning_rate": 0.1, "mask": has_several_axes}),
    (racs, {"learning_rate": 0.1}),
    (scale_by_apollo, {}),
    (scale_by_flattening, {"rank": 2}),
    (scale_by_flattening, {"moment_dtype": jnp.bfloat16}),
    (scale_by_racs, {}),
    (apollo_optax.int8_trace, {"decay": 0.9, "weight_dimension_numbers": MUON}),
]


@pytest.mark.parametrize(("factory", "arguments"), INJECTED)
def test_the_remedy_for_inject_hyperparams_without_static_args_works(
    factory, arguments
):
    params = {"kernel": jnp.ones((4, 6))}
    with pytest.raises(TypeError, match="static_args") as error:
        optax.inject_hyperparams(factory)(**arguments).init(params)
    (remedy,) = re.findall(r"needs static_args=(.*)$", str(error.value))
    static_args = eval(remedy, {"apollo_optax": apollo_optax, "factory": factory})
    tx = optax.inject_hyperparams(
        factory, static_args=static_args, hyperparam_dtype=jnp.float32
    )(**arguments)
    assert tx.init(params).hyperparams.keys().isdisjoint(static_args)


@pytest.mark.parametrize("optimizer", [apollo, apollo_mini, apollo_zero, racs])
@pytest.mark.parametrize("mask", [False, np.True_, jnp.array(True)])
def test_rejects_a_mask_that_is_one_truth_value(optimizer, mask):
    with pytest.raises(TypeError, match=r"mask must be a tree .*weight_decay=0"):
        optimizer(0.1, weight_decay=0.1, mask=mask)


TRANSFORMATIONS = [
    lambda: scale_by_apollo(2),
    scale_by_racs,
    scale_by_flattening,
    limit_norm_growth,
]


@pytest.mark.parametrize("make", TRANSFORMATIONS)
def test_rejects_the_state_of_another_transformation(make):
    state = optax.scale_by_adam().init(PARAMS)
    with pytest.raises(
        ValueError, match="the state is a ScaleByAdamState without .*call init again"
    ):
        make().update(PARAMS, state)


@pytest.mark.parametrize("make", TRANSFORMATIONS)
def test_names_the_target_for_a_state_that_was_restored_without_one(make):
    """Orbax then gives dictionaries in the place of named tuples."""
    tx = make()
    state = tx.init(PARAMS)
    with pytest.raises(ValueError, match="restore it with tx.init.* as the target"):
        tx.update(PARAMS, state._asdict())


@pytest.mark.parametrize("make", TRANSFORMATIONS[:3])
@pytest.mark.parametrize("index", [1.5, "1", (0, 1), True])
def test_rejects_a_batch_index_that_is_no_integer(make, index):
    tx = make()
    with pytest.raises(TypeError, match="batch_index must be an integer"):
        tx.update(PARAMS, tx.init(PARAMS), batch_index=index)


@pytest.mark.parametrize("optimizer", [apollo, apollo_mini, apollo_zero, racs])
def test_rejects_hyperparameters_that_are_injected_in_bfloat16(optimizer):
    """In bfloat16, a b2 of 0.999 is 1, so that all updates would be 0."""
    static = apollo_optax.static_args(optimizer)
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), PARAMS)
    inject = functools.partial(optax.inject_hyperparams, optimizer, static_args=static)
    with pytest.raises(TypeError, match=r"has dtype bfloat16.*hyperparam_dtype"):
        inject()(learning_rate=0.1).init(params)
    tx = inject(hyperparam_dtype=jnp.float32)(learning_rate=0.1)
    updates, _ = tx.update(params, tx.init(params), params)
    assert (updates["layer"]["bias"] < 0).all()


@pytest.mark.parametrize("dtype", ["int32", "uint8", "bool", "complex64"])
@pytest.mark.parametrize("make", [lambda: scale_by_apollo(2), limit_norm_growth])
def test_rejects_untrainable_leaves(make, dtype):
    params = {"layer": {"steps": jnp.ones((2, 3), dtype), "kernel": jnp.ones((2, 3))}}
    with pytest.raises(
        ValueError, match=f"'layer/steps' has dtype {dtype}.*optax.masked"
    ):
        make().init(params)
    tx = optax.masked(make(), {"layer": {"steps": False, "kernel": True}})
    updates, _ = tx.update(params, tx.init(params))
    assert updates["layer"]["steps"] is params["layer"]["steps"]


@pytest.mark.parametrize(
    ("shape", "numbers", "message"),
    [
        ((4, 6), ApolloDimensionNumbers(0, 0), "overlap"),
        ((4, 6), ApolloDimensionNumbers(0, -2), "overlap"),
        ((2, 4, 6), ApolloDimensionNumbers((0, 1), (1, 2)), "overlap"),
        ((2, 4, 6), ApolloDimensionNumbers((1, 1), 2), "overlap"),
        ((4, 6), ApolloDimensionNumbers(0, 2), "missing"),
        ((4, 6), ApolloDimensionNumbers(-3, 1), "missing"),
        ((6,), ApolloDimensionNumbers(), "missing"),
        ((), ApolloDimensionNumbers(), "missing"),
        ((4, 6), ApolloDimensionNumbers((), 1), "no axis for one of the sides"),
        ((4, 6), ApolloDimensionNumbers(0.0, 1), "ints"),
        ((4, 6), ApolloDimensionNumbers(("0",), 1), "ints"),
        ((4, 6), ApolloDimensionNumbers(None, 1), "ints"),
        ((4, 6), ApolloDimensionNumbers(True, False), "ints"),
    ],
)
def test_rejects_dimension_numbers_for_the_shape(shape, numbers, message):
    params = {"layer": {"kernel": jnp.ones(shape)}}
    given = {"layer": numbers}
    for tx in (
        scale_by_apollo(2, weight_dimension_numbers=given),
        limit_norm_growth(weight_dimension_numbers=given),
    ):
        with pytest.raises((TypeError, ValueError), match=message) as caught:
            tx.init(params)
        assert "'layer/kernel'" in str(caught.value)
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("numbers", "error", "message"),
    [
        ({"layer": {"kernel": None}}, ValueError, "no entry for 'layer/bias'"),
        (
            {"layer": {"kernel": (0, 1), "bias": None}},
            TypeError,
            "holds 0 for 'layer/kernel/0'",
        ),
        ({"layer": "kernel"}, TypeError, "holds 'kernel' for 'layer'"),
        (3, TypeError, "holds 3"),
        (
            optax.contrib.MuonDimensionNumbers(),
            TypeError,
            "holds MuonDimensionNumbers.*with dimension_numbers_from",
        ),
    ],
)
def test_rejects_malformed_dimension_numbers(numbers, error, message):
    with pytest.raises(error, match=message):
        scale_by_apollo(2, weight_dimension_numbers=numbers).init(PARAMS)


def test_rejects_malformed_rules():
    with pytest.raises(ValueError, match=re.escape("'(' is not a regular expression")):
        apollo_optax.dimension_numbers_by_path([("(", None)])
    for rules in ({"kernel": None}, [("kernel",)], [(5, None)], ("kernel", None)):
        with pytest.raises(TypeError, match="rules must be a sequence of tuples"):
            apollo_optax.dimension_numbers_by_path(rules)
    with pytest.raises(TypeError, match="the rule 'kernel'"):
        apollo_optax.dimension_numbers_by_path([("kernel", (0, 1))])


@pytest.mark.parametrize(
    "projection",
    [
        lambda key, shape: jnp.ones(shape[::-1]),
        lambda key, shape: jnp.ones(shape[0]),
        lambda key, shape: jnp.ones(shape, jnp.complex64),
    ],
)
def test_rejects_results_of_a_projection(projection):
    tx = scale_by_apollo(2, projection=projection)
    message = re.escape("projection(key, (2, 4)) returned") + ".*layer/kernel"
    with pytest.raises(ValueError, match=message):
        tx.init(PARAMS)


def test_rejects_updates_of_another_structure():
    tx = scale_by_apollo(2)
    state = tx.init(PARAMS)
    with pytest.raises(
        ValueError, match="another structure.*lacks leaves.*'layer/bias'"
    ):
        tx.update({"layer": {"kernel": PARAMS["layer"]["kernel"]}}, state)
    with pytest.raises(ValueError, match="another structure.*state lacks.*'extra'"):
        tx.update(PARAMS | {"extra": jnp.ones(3)}, state)
    tx = limit_norm_growth()
    with pytest.raises(ValueError, match="another structure"):
        tx.update({"layer": jnp.ones(3)}, tx.init(PARAMS))


def test_rejects_updates_of_another_shape():
    tx = scale_by_apollo(2)
    state = tx.init(PARAMS)
    message = re.escape("'layer/bias' has shape (6,)") + ".*init"
    with pytest.raises(ValueError, match=message):
        tx.update({"layer": {"kernel": jnp.ones((4, 6)), "bias": jnp.ones(5)}}, state)


def test_rejects_state_of_other_settings():
    state = scale_by_apollo(2).init(PARAMS)
    without_matrices = scale_by_apollo(2, weight_dimension_numbers={"layer": None})
    message = r"mu for 'layer/kernel' has shape \(2, 6\).*rank"
    for other in (scale_by_apollo(3), without_matrices):
        with pytest.raises(ValueError, match=message):
            other.update(PARAMS, state)
    with pytest.raises(ValueError, match="lacks a projection, which these arguments"):
        scale_by_apollo(2, projection="svd").update(PARAMS, state)
    svd = scale_by_apollo(2, projection="svd").init(PARAMS)
    with pytest.raises(ValueError, match="has a projection, .* do not store; .*init"):
        scale_by_apollo(2).update(PARAMS, svd)


def test_rejects_the_state_of_a_chain():
    tx = scale_by_racs()
    state = optax.chain(tx, optax.scale(0.1)).init(PARAMS)
    message = "is a tuple without count, mu, .*call the chain's update"
    with pytest.raises(ValueError, match=message):
        tx.update(PARAMS, state)


def test_rejects_state_of_another_generator():
    state = scale_by_apollo(2).init(PARAMS)
    tx = scale_by_apollo(2, key=jax.random.key(0, impl="rbg"))
    with pytest.raises(ValueError, match=r"key has shape \(2,\).*takes \(4,\)"):
        tx.update(PARAMS, state)


@pytest.mark.parametrize("make", [lambda: scale_by_apollo(2), limit_norm_growth])
def test_rejects_eight_bit_leaves(make):
    with pytest.raises(
        ValueError, match="'w' has dtype float8_e4m3fn.*bfloat16 or wider"
    ):
        make().init({"w": jnp.ones((2, 3), jnp.float8_e4m3fn)})


@pytest.mark.parametrize("make", [lambda: scale_by_apollo(2), limit_norm_growth])
def test_rejects_leaves_that_vary_over_a_manual_axis(make):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    tx, split = make(), jax.sharding.PartitionSpec("data")
    gradient = {"layer": {"kernel": jnp.ones((16, 12))}}
    state = tx.init({"layer": {"kernel": jnp.ones((2, 12))}})

    def step(gradient):
        return tx.update(gradient, state)[0]

    mapped = jax.shard_map(step, mesh=mesh, in_specs=split, out_specs=split)
    message = "'layer/kernel' varies over the manual axes.*data.*pmean"
    with pytest.raises(ValueError, match=message):
        jax.jit(mapped)(gradient)


@jax.tree_util.register_pytree_with_keys_class
class NodeWithEqualNames:
    """A node with two children whose keys differ but print the same."""

    def __init__(self, first, second):
        self.children = (first, second)

    def tree_flatten_with_keys(self):
        keys = (jax.tree_util.DictKey(1), jax.tree_util.DictKey("1"))
        return tuple(zip(keys, self.children, strict=True)), None

    @classmethod
    def tree_unflatten(cls, aux, children):
        return cls(*children)


def test_rejects_two_leaves_of_one_path():
    params = {"a": NodeWithEqualNames(jnp.ones(2), jnp.ones(2))}
    with pytest.raises(ValueError, match="same path"):
        scale_by_apollo(2).init(params)


def test_tabulate_rejects_other_dimension_numbers():
    params = {"kernel": jnp.ones((3, 4, 6))}
    tx = scale_by_apollo(2, weight_dimension_numbers=ApolloDimensionNumbers(1, 2))
    for wrong in ({"kernel": None}, ApolloDimensionNumbers(0, 1)):
        message = "mu for 'kernel' has shape.*weight_dimension_numbers"
        with pytest.raises(ValueError, match=message):
            apollo_optax.tabulate(tx, params, weight_dimension_numbers=wrong)


def test_state_sharding_rejects_parameters_without_a_mesh():
    with pytest.raises(ValueError, match="no parameter has a NamedSharding"):
        apollo_optax.state_sharding(scale_by_apollo(2).init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("numbers", "shape"),
    [({"kernel": None}, ""), (ApolloDimensionNumbers(0, 2), r" \(2, 2, 6\)")],
    ids=["no matrix", "other axes"],
)
def test_state_sharding_rejects_other_dimension_numbers(numbers, shape):
    params = put(make_mesh(), {"kernel": jnp.ones((2, 4, 6))}, jax.P())
    stacked = ApolloDimensionNumbers(1, 2)
    state = scale_by_apollo(2, weight_dimension_numbers=stacked).init(params)
    message = f"mu for 'kernel' has shape{shape}.*weight_dimension_numbers"
    with pytest.raises(ValueError, match=message):
        apollo_optax.state_sharding(state, params, weight_dimension_numbers=numbers)

"""How the state is sharded on meshes of eight devices, automatic and explicit."""

import itertools
import math
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import (
    ApolloDimensionNumbers,
    LimitNormGrowthState,
    int8_trace,
    limit_norm_growth,
    scale_by_apollo,
    scale_by_param_matrix_rms,
    scale_by_racs,
    state_bytes,
    state_sharding,
)
from tests.helpers import (
    AXIS_TYPES,
    every_axis_type,
    every_projection,
    make_mesh,
    normal,
    put,
)

pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)


def sharded(mesh, shape, spec):
    return put(mesh, normal(0, shape), spec)


def full_spec(spec, ndim):
    """The mesh axes of every axis, so that P('x') and P('x', None) compare equal."""
    entries = [*spec, *[None] * (ndim - len(spec))]
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)


# A parameter's shape, its dimension numbers (or 1 for a rank of 1 instead of 4) and its
# spec; then the specs of its moments, its norm, and its SVD's projection.
SHARDINGS = [
    # Parameters sharded along the channels, the contracted side, both, and neither.
    ((8, 16), None, P(None, "model"), P(None, "model"), P(), P(None, None)),
    ((8, 16), None, P("model"), P(None, "model"), P(), P(None, "model")),
    (
        (8, 16),
        None,
        P("data", "model"),
        P(None, ("model", "data")),
        P(),
        P(None, "data"),
    ),
    (
        (8, 16),
        None,
        P("model", "data"),
        P(None, ("data", "model")),
        P(),
        P(None, "model"),
    ),
    (
        (8, 16),
        None,
        P(("data", "model")),
        P(None, ("data", "model")),
        P(),
        P(None, ("data", "model")),
    ),
    ((8, 16), None, P(), P(), P(), P()),
    (
        (16, 8),
        None,
        P("data", "model"),
        P(None, ("data", "model")),
        P(),
        P(None, "model"),
    ),
    # No mesh axis divides 43 channels, so the rank axis is sharded. At rank 4 it has at
    # most four shards.
    ((8, 43), None, P("model"), P("model"), P(), P(None, "model")),
    ((8, 43), None, P(("data", "model")), P("data"), P(), P(None, ("data", "model"))),
    # 2 divides 86 channels, so each side is sharded by one mesh axis.
    (
        (8, 86),
        None,
        P(("model", "data")),
        P("model", "data"),
        P(),
        P(None, ("model", "data")),
    ),
    # No mesh axis divides the channels or a rank of 1, so the moments are replicated.
    ((4, 43), 1, P("model"), P(), P(), P(None, "model")),
    # Stacks sharded along the layers, too. The layers are the first or the middle axis.
    (
        (2, 8, 16),
        STACKED,
        P("data", "model"),
        P("data", None, "model"),
        P("data"),
        P("data", None, "model"),
    ),
    (
        (8, 2, 16),
        ApolloDimensionNumbers(0, 2),
        P("model", "data"),
        P("data", None, "model"),
        P("data"),
        P("data", None, "model"),
    ),
    # Several axes per side.
    (
        (8, 4, 6),
        ApolloDimensionNumbers(0, (1, 2)),
        P("data", "model"),
        P(None, "model", "data"),
        P(),
        P(),
    ),
    (
        (4, 6, 64),
        ApolloDimensionNumbers((0, 1), 2),
        P("model", "data"),
        P(None, ("model", "data")),
        P(),
        P(),
    ),
]


@pytest.mark.parametrize(
    ("shape", "how", "spec", "moments", "norm", "projection"), SHARDINGS
)
def test_state_sharding(shape, how, spec, moments, norm, projection):
    mesh = make_mesh()
    rank, numbers = (1, None) if how == 1 else (4, how)
    sharding = NamedSharding(mesh, spec)
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)}
    expected = {"mu": moments, "nu": moments, "norm": norm}
    for kind in ("random", "svd"):
        tx = scale_by_apollo(rank, projection=kind, weight_dimension_numbers=numbers)
        state = jax.eval_shape(tx.init, params)
        shardings = state_sharding(state, params, weight_dimension_numbers=numbers)
        chex.assert_trees_all_equal_structs(shardings, state)
        assert shardings.count.spec == shardings.key.spec == P()
        if kind == "svd" and projection != P():
            expected["projection"] = projection
        for field, wanted in expected.items():
            ndim = getattr(state, field)["kernel"].ndim
            actual = getattr(shardings, field)["kernel"].spec
            assert full_spec(actual, ndim) == full_spec(wanted, ndim)
        # Every leaf can be put on the mesh like this.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        jax.device_put(zeros, shardings)


SHAPES = [
    ((8, 16), None),
    ((16, 8), None),
    ((8, 8), None),
    ((8, 43), None),
    ((2, 8, 16), STACKED),
    ((8, 4, 6), ApolloDimensionNumbers(0, (1, 2))),
]


def every_spec(shape):
    """All specs that shard a tensor of this shape over the mesh of two by four."""
    entries = [(), ("data",), ("model",), ("data", "model"), ("model", "data")]
    sizes = {"data": 2, "model": 4}
    for spec in itertools.product(entries, repeat=len(shape)):
        used = [name for entry in spec for name in entry]
        shards = [math.prod(sizes[name] for name in entry) for entry in spec]
        divides = all(
            size % count == 0 for size, count in zip(shape, shards, strict=True)
        )
        if divides and len(used) == len(set(used)):
            yield P(*(entry or None for entry in spec))


def assert_types(tree, expected, shardings):
    """Asserts the types and the shardings of all leaves."""
    leaves = zip(*map(jax.tree.leaves, (tree, expected, shardings)), strict=True)
    for leaf, other, sharding in leaves:
        assert jax.typeof(leaf) == jax.typeof(other)
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)


@pytest.mark.slow
@every_axis_type
@every_projection
@pytest.mark.parametrize(
    ("shape", "spec", "numbers"),
    [(shape, spec, numbers) for shape, numbers in SHAPES for spec in every_spec(shape)],
)
def test_types_never_change_for_any_spec(axis_type, projection, shape, spec, numbers):
    test_types_never_change(axis_type, projection, shape, spec, numbers)


NEVER_CHANGE = [
    ((8, 16), P(None, "model"), None),
    ((8, 16), P("model"), None),
    ((16, 8), P("data", "model"), None),
    ((8, 43), P(("data", "model")), None),
    ((2, 8, 16), P("data", "model"), STACKED),
    ((8, 4, 6), P("data", "model"), ApolloDimensionNumbers(0, (1, 2))),
]


# Random projections take all cases by default. The others take one matrix and one
# stack, because the shardings depend on the axes and not on how a projection is made.
# test_state_sharding checks the shardings of a stored projection in every case.
# Neighbours in the list have different types of axes, and the two types of a case that
# every projection takes are divided among the projections.
@pytest.mark.parametrize(
    ("shape", "spec", "numbers", "projection", "axis_type"),
    [
        pytest.param(
            *case,
            projection,
            axis_type,
            marks=[]
            if (projection == "random" or number in (1, 4))
            and (number + which + (projection == "svd")) % 2 == 0
            else pytest.mark.slow,
        )
        for number, case in enumerate(NEVER_CHANGE)
        for projection in ("random", "rademacher", "svd")
        for which, axis_type in enumerate(AXIS_TYPES)
    ],
)
def test_types_never_change(axis_type, projection, shape, spec, numbers):
    """The state has one type in every step, and the update is that of one device."""
    mesh = make_mesh(axis_type)
    tx = scale_by_apollo(
        4,
        scale_type="tensor" if projection == "rademacher" else "channel",
        projection=projection,
        weight_dimension_numbers=numbers,
    )
    gradient = sharded(mesh, shape, spec)
    state = tx.init(gradient)
    on_one_device = np.asarray(gradient)
    expected = tx.update(on_one_device, tx.init(on_one_device))
    shardings = state_sharding(state, gradient, weight_dimension_numbers=numbers)
    assert_types(state, state, shardings)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(gradient, state)
        _, newer = update(gradient, new)
        for after in (new, newer):
            assert_types(after, state, shardings)
        assert updates.sharding.is_equivalent_to(gradient.sharding, gradient.ndim)
        chex.assert_trees_all_close((updates, new), expected, rtol=1e-4, atol=1e-5)
    if axis_type == AxisType.Explicit:
        with jax.set_mesh(mesh):
            jitted = jax.jit(tx.init)(gradient)
            assert_types(jitted, tx.init(gradient), shardings)

            def step(state, _):
                return tx.update(gradient, state)[1], None

            # A scan raises an error if the type of its carry changes.
            scanned, _ = jax.lax.scan(step, jitted, length=2)
            assert scanned.count == 2


def test_second_step_on_a_mesh_does_not_compile():
    """init shards even the count and the key as the step returns them."""
    mesh, traces = make_mesh(), []
    tx = apollo_optax.apollo(0.1, rank=4)
    params = {
        "kernel": sharded(mesh, (8, 16), P("model")),
        "bias": sharded(mesh, (16,), P("model")),
    }

    @jax.jit
    def step(params, state):
        traces.append(None)
        updates, state = tx.update(params, state, params)
        return optax.apply_updates(params, updates), state

    state = tx.init(params)
    for _ in range(3):
        params, state = step(params, state)
    assert step._cache_size() == len(traces) == 1


def pipelines():
    def is_matrix(x):
        return x.ndim == 2

    def labels(params):
        return jax.tree.map(lambda x: "apollo" if is_matrix(x) else "adam", params)

    apollo = apollo_optax.apollo(0.1, rank=4)
    return {
        "chain": optax.chain(optax.clip(1.0), apollo),
        "masked": optax.masked(apollo, lambda tree: jax.tree.map(is_matrix, tree)),
        "partition": optax.partition(
            {"apollo": apollo, "adam": optax.adam(0.1)}, labels
        ),
        "multi_steps": optax.MultiSteps(apollo, 2).gradient_transformation(),
        "inject": optax.inject_hyperparams(
            apollo_optax.apollo,
            apollo_optax.static_args(apollo_optax.apollo),
            jnp.float32,
        )(0.1, rank=4),
        "limiter": optax.chain(optax.adam(0.1), apollo_optax.limit_norm_growth()),
        "full_rank": apollo_optax.apollo(0.1, rank=64),
    }


@pytest.mark.parametrize("name", pipelines())
def test_pipelines(name):
    mesh = make_mesh()
    params = {
        "kernel": sharded(mesh, (16, 8), P("data", "model")),
        "bias": sharded(mesh, (8,), P("model")),
    }
    tx = pipelines()[name]
    state = tx.init(params)
    shardings = state_sharding(state, params)
    chex.assert_trees_all_equal_structs(shardings, state)
    seen = set()
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
        names = [str(getattr(e, "name", getattr(e, "key", e))) for e in path]
        assert isinstance(sharding, NamedSharding)
        is_adam = name == "limiter" or (name == "partition" and "adam" in names)
        if names[-1] == "kernel" and names[-2] in ("mu", "nu"):
            seen.add("kernel")
            projected = P(None, ("data", "model"))
            expected = P("data", "model") if is_adam else projected
        elif names[-1] == "kernel" and names[-2] == "acc_grads":
            seen.add("accumulated")
            expected = P("data", "model")
        elif names[-1] == "bias" and names[-2] in ("mu", "nu", "acc_grads"):
            expected = P("model")
        else:
            expected = P()
        assert sharding.spec == expected, names
    assert "kernel" in seen
    assert ("accumulated" in seen) == (name == "multi_steps")
    jax.device_put(state, shardings)


@pytest.mark.filterwarnings("ignore:the parameters are one vector")
@pytest.mark.parametrize(
    ("shape", "spec", "moments"),
    # The key has the shape of the second one, and yet is replicated.
    [((8, 16), P("model"), P(None, "model")), ((2,), P("data"), P("data"))],
    ids=["matrix", "vector"],
)
def test_params_may_be_one_array(shape, spec, moments):
    param = sharded(make_mesh(), shape, spec)
    state = apollo_optax.apollo(0.1, rank=4).init(param)
    shardings = state_sharding(state, param)[0]
    assert shardings.mu.spec == shardings.nu.spec == moments
    assert shardings.key.spec == shardings.count.spec == P()


def test_longest_path_owns_a_state_leaf():
    """The paths of ``scale`` and ``norm/scale`` both end a path in Adam's state."""
    mesh = make_mesh()
    params = {
        "scale": sharded(mesh, (8,), P("data")),
        "norm": {"scale": sharded(mesh, (8,), P("model"))},
    }
    shardings = state_sharding(optax.adam(0.1).init(params), params)
    assert shardings[0].mu["scale"].spec == P("data")
    assert shardings[0].mu["norm"]["scale"].spec == P("model")


def test_modules_may_be_named_like_fields_of_the_state():
    mesh = make_mesh()
    names = ("mu", "nu", "norm", "projection")
    params = {name: {"w": sharded(mesh, (8, 16), P("model"))} for name in names}
    params["w"] = sharded(mesh, (8, 16), P("data"))
    tx = apollo_optax.apollo(0.1, rank=4, projection="svd")
    shardings = state_sharding(tx.init(params), params)[0]
    specs = {"mu": P(None, "model"), "norm": P(), "projection": P(None, "model")}
    for field, spec in specs.items():
        assert all(getattr(shardings, field)[name]["w"].spec == spec for name in names)
    assert shardings.mu["w"].spec == P(None, "data")


@pytest.mark.parametrize(
    "names", [("codes", "row", "column"), ("count", "key", "mu"), ("norm",)]
)
def test_parameters_may_be_named_like_fields_of_the_state(names):
    mesh = make_mesh()
    params = {name: sharded(mesh, (8, 16), P("model")) for name in names}
    state = state_sharding(jax.eval_shape(optax.adamw(0.1).init, params), params)[0]
    for moments in (state.mu, state.nu):
        assert {name: moments[name].spec for name in names} == dict.fromkeys(
            names, P("model")
        )
    assert state_bytes(optax.adamw(0.1), params) == (8 * 128 * len(names), 0, 4)


def test_field_norm_of_another_optimizer():
    params = {"w": sharded(make_mesh(), (8, 16), P("model"))}
    states = (LimitNormGrowthState(params), LimitNormGrowthState({"w": jnp.zeros(())}))
    shardings = state_sharding(states, params)
    assert shardings[0].norm["w"].spec == P("model")
    assert shardings[1].norm["w"].spec == P()


def test_memory_kind_is_that_of_the_parameter():
    host = NamedSharding(make_mesh(), P("model"), memory_kind="pinned_host")
    leaf = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=host)
    params = {"kernel": leaf, "bias": leaf}
    state = jax.eval_shape(scale_by_apollo(4).init, params)
    shardings = state_sharding(state, params)
    for field in (shardings.mu, shardings.norm):
        kinds = {leaf.memory_kind for leaf in field.values()}
        assert kinds == {"pinned_host"}
    # The rows and columns of Adafactor do not have the parameter's shape.
    adafactor = jax.eval_shape(optax.adafactor().init, params)
    found = state_sharding(adafactor, params)
    owners = apollo_optax.state_owners(adafactor, params)
    places = zip(jax.tree.leaves(found), jax.tree.leaves(owners), strict=True)
    owned = [place.memory_kind for place, owner in places if owner]
    assert len(owned) > 2
    assert set(owned) == {"pinned_host"}


@pytest.mark.parametrize(
    ("spec", "scale_type"),
    [
        (P(), "channel"),
        (P("data"), "channel"),
        (P(None, None, "model"), "channel"),
        (P("data", None, "model"), "channel"),
        # The norm of a tensor is a sum over the channels, which these two specs shard.
        (P(None, None, "model"), "tensor"),
        (P("data", None, "model"), "tensor"),
        pytest.param(P(), "tensor", marks=pytest.mark.slow),
        pytest.param(P("data"), "tensor", marks=pytest.mark.slow),
    ],
)
def test_gradients_may_be_sharded_unlike_the_parameters(spec, scale_type):
    """A reduce-scatter over some axes of the mesh gives such gradients."""
    mesh = make_mesh(AxisType.Explicit)
    param = sharded(mesh, (2, 8, 16), P("data", "model"))
    gradient = sharded(mesh, (2, 8, 16), spec)
    for projection in ("random", "svd"):
        tx = scale_by_apollo(
            4,
            scale_type=scale_type,
            projection=projection,
            weight_dimension_numbers=STACKED,
        )
        state = tx.init(param)
        _, expected = tx.update(param, state)
        updates, new = jax.jit(tx.update)(gradient, state)
        assert jax.typeof(updates) == jax.typeof(gradient)
        for leaf, before in zip(*map(jax.tree.leaves, (new, state)), strict=True):
            assert jax.typeof(leaf).str_short() == jax.typeof(before).str_short()
        chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("jit", [False, True])
@pytest.mark.parametrize(
    ("make", "shape", "specs"),
    [
        (limit_norm_growth, (4, 8, 16), (P("data"), P(None, None, "model"))),
        (int8_trace, (4, 8, 16), (P("data"), P(None, None, "model"))),
        (scale_by_racs, (4, 8, 16), (P("data"), P(None, None, "model"))),
        (scale_by_param_matrix_rms, (4, 8, 16), (P("data"), P(None, None, "model"))),
        (scale_by_apollo, (16,), (P("data"), P())),  # A vector has Adam.
    ],
)
def test_states_stay_where_they_are_for_any_gradient(make, shape, specs, jit):
    mesh = make_mesh(AxisType.Explicit)
    arguments: dict[Any, Any] = {int8_trace: (0.9,), scale_by_apollo: (4,)}
    numbers: Any = {} if len(shape) == 1 else {"weight_dimension_numbers": STACKED}
    tx = make(*arguments.get(make, ()), **numbers)
    update = jax.jit(tx.update) if jit else tx.update
    for spec, other in itertools.permutations(specs):
        param = {"w": sharded(mesh, shape, spec)}
        gradient = {"w": sharded(mesh, shape, other)}
        state = tx.init(param)
        expected, kept = update(param, state, param)
        updates, new = update(gradient, state, param)
        assert jax.typeof(updates["w"]) == jax.typeof(gradient["w"])
        for leaf, before in zip(*map(jax.tree.leaves, (new, state)), strict=True):
            assert jax.typeof(leaf).str_short() == jax.typeof(before).str_short()
        actual, both = jax.device_get(((updates, new), (expected, kept)))
        chex.assert_trees_all_close(actual, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model")])
def test_gradients_may_be_sharded_along_one_side_only(spec):
    """Moments sharded like this gradient would not have the type of the state's."""
    mesh = make_mesh(AxisType.Explicit)
    tx = scale_by_apollo(4)
    param = sharded(mesh, (8, 16), P("data", "model"))
    state = tx.init(param)
    _, expected = tx.update(param, state)
    _, new = jax.jit(tx.update)(sharded(mesh, (8, 16), spec), state)
    assert new.mu.sharding.spec == P(None, ("model", "data"))
    chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)


@every_axis_type
@pytest.mark.parametrize(
    ("shape", "spec", "numbers"),
    [
        ((64, 512), P(("data", "model")), None),
        ((8, 64, 128), P(("data", "model")), STACKED),
        ((8, 8, 512), P("data", "model"), ApolloDimensionNumbers((0, 1), 2)),
    ],
)
def test_devices_draw_their_shard_only(axis_type, shape, spec, numbers):
    """No device draws more words than its shard of the projection has."""
    mesh = make_mesh(axis_type)
    # A word of random signs has 32 of them, which the program takes apart.
    tx = scale_by_apollo(32, projection="random", weight_dimension_numbers=numbers)
    gradient = sharded(mesh, shape, spec)
    program = jax.jit(tx.update).lower(gradient, tx.init(gradient)).compile().as_text()
    shapes = re.findall(r"u32\[([\d,]+)\]", program)
    words = [math.prod(map(int, sizes.split(","))) for sizes in shapes]
    matrices = shape[0] if numbers == STACKED else 1
    assert max(words) <= matrices * 32 * 64 / 8


@every_axis_type
@every_projection
def test_shard_map_over_one_axis_of_two(axis_type, projection):
    mesh, tx = make_mesh(axis_type), scale_by_apollo(4, projection=projection)
    gradient = sharded(mesh, (8, 16), P())
    state = tx.init(gradient)
    update = jax.shard_map(
        tx.update, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"}
    )
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(update)(gradient, state)
    expected, _ = tx.update(gradient, state)
    np.testing.assert_allclose(updates, expected, rtol=1e-5, atol=1e-6)


def test_nnx_optimizer():
    """nnx.state drops the type of the state, so its fields are found by their names."""
    mesh = make_mesh()
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    model.kernel.set_value(sharded(mesh, (8, 16), P("model")))
    model.bias.set_value(sharded(mesh, (16,), P("model")))
    optimizer = nnx.Optimizer(model, apollo_optax.apollo(0.1, rank=4), wrt=nnx.Param)
    state = nnx.state(optimizer)
    shardings = state_sharding(state, nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal_structs(shardings, state)
    pure = nnx.to_pure_dict(shardings)["opt_state"][0]
    assert pure["mu"]["kernel"].spec == pure["nu"]["kernel"].spec == P(None, "model")
    assert pure["mu"]["bias"].spec == P("model")
    for leaf in (pure["norm"]["kernel"], pure["count"], pure["key"]):
        assert leaf.spec == P()


def test_jitted_init_with_out_shardings():
    mesh = make_mesh()
    params = {"kernel": sharded(mesh, (8, 16), P("data", "model"))}
    tx = apollo_optax.apollo(0.1, rank=4)
    shardings = state_sharding(jax.eval_shape(tx.init, params), params)
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    chex.assert_trees_all_equal(state, tx.init(params))
    assert state[0].mu["kernel"].sharding.spec == P(None, ("model", "data"))


@every_axis_type
def test_limiter_keeps_types_and_shardings(axis_type):
    mesh = make_mesh(axis_type)
    numbers = {"stack": STACKED, "bias": None}
    tx = apollo_optax.limit_norm_growth(weight_dimension_numbers=numbers)
    gradient = {
        "stack": sharded(mesh, (2, 8, 16), P("data", "model")),
        "bias": sharded(mesh, (8,), P("model")),
    }
    state = tx.init(gradient)
    _, state = tx.update(gradient, state)
    before = (gradient, state)
    shardings = jax.tree.map(lambda x: x.sharding, before)
    larger = jax.tree.map(lambda x: 3 * x, gradient)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(larger, state)
        limited = jax.tree.map(lambda x: 1.01 * x, gradient)
        chex.assert_trees_all_close(updates, limited, rtol=1e-5)
        assert_types((updates, new), before, shardings)


@pytest.mark.parametrize(
    "tx",
    [
        apollo_optax.scale_by_apollo(2),
        apollo_optax.scale_by_racs(),
        apollo_optax.scale_by_flattening(momentum=0.9),
        apollo_optax.int8_trace(0.9),
        apollo_optax.limit_norm_growth(),
    ],
)
def test_state_is_on_the_device_that_the_caller_put_a_parameter_on(tx: Any) -> None:
    second = jax.devices()[1]
    params = {"kernel": jax.device_put(normal(0, (8, 16)), second)}
    state = tx.init(params)
    owners = apollo_optax.state_owners(state, params)
    for leaf, owner in zip(*map(jax.tree.leaves, (state, owners)), strict=True):
        if owner:
            assert leaf.devices() == {second}
    assert any(jax.tree.leaves(owners))


def test_specs_with_reduced_axes_are_read_and_partial_sums_refused():
    """The gradient of a parameter that is reduced over an axis is unreduced over it."""
    mesh = make_mesh(AxisType.Explicit)
    reduced = sharded(mesh, (8, 16), P(None, "model", reduced={"data"}))
    tx = scale_by_apollo(4)
    state = tx.init({"w": reduced})
    assert full_spec(state.mu["w"].sharding.spec, 2) == ((), ("model",))

    @jax.jit
    def update(inputs, outputs, state):
        gradient = jnp.einsum(
            "bi,bj->ij", inputs, outputs, out_sharding=P(unreduced={"data"})
        )
        return tx.update({"w": gradient}, state)

    batch = (sharded(mesh, (4, size), P("data")) for size in (8, 16))
    with (
        jax.set_mesh(mesh),
        pytest.raises(
            ValueError, match=r"'w' is unreduced over .* \['data'\].*reshard"
        ),
    ):
        update(*batch, state)


def test_only_moments_of_the_parameters_shape_heal_after_a_jitted_init():
    """So docs/recipes.md advises ``out_shardings`` for `init` and for the step."""
    mesh = make_mesh()
    params = {"w": sharded(mesh, (16, 64), P("data", None))}

    def after_two_steps(tx):
        @jax.jit
        def step(params, state):
            grads = jax.tree.map(jnp.sin, params)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        state = jax.jit(tx.init)(params)
        assert optax.tree.get(state, "mu")["w"].is_fully_replicated
        for _ in range(2):
            _, state = step(params, state)
        return optax.tree.get(state, "mu")["w"]

    assert after_two_steps(apollo_optax.apollo(0.1, rank=4)).is_fully_replicated
    assert not after_two_steps(optax.adam(0.1)).is_fully_replicated

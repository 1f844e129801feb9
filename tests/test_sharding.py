"""Where the state lives on meshes of eight devices, automatic and explicit."""

import itertools
import math
import re

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from apollo_optax import ApolloDimensionNumbers, LimitNormGrowthState, scale_by_apollo, state_sharding

STACKED = ApolloDimensionNumbers(1, 2)
KINDS = [AxisType.Auto, AxisType.Explicit]


def mesh_of(kind=AxisType.Auto):
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)


def put(mesh, shape, spec, seed=0):
    value = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return jax.device_put(value, NamedSharding(mesh, spec))


def spec_of(sharding, ndim):
    """A spec in full, so that P('x') and P('x', None) compare alike."""
    entries = [*sharding.spec, *[None] * (ndim - len(sharding.spec))]
    return tuple((e,) if isinstance(e, str) else tuple(e or ()) for e in entries)


# For each parameter: its shape, axes and spec; then where mu, norm and an SVD's projection go.
PLACES = [
    # Cut along the channels, the contracted side, both, neither.
    ((8, 16), None, P(None, "model"), P(None, "model"), P(), P(None, None)),
    ((8, 16), None, P("model"), P(None, "model"), P(), P(None, "model")),
    ((8, 16), None, P("data", "model"), P(None, ("model", "data")), P(), P(None, "data")),
    ((8, 16), None, P("model", "data"), P(None, ("data", "model")), P(), P(None, "model")),
    ((8, 16), None, P(("data", "model")), P(None, ("data", "model")), P(), P(None, ("data", "model"))),
    ((8, 16), None, P(), P(), P(), P()),
    ((16, 8), None, P("data", "model"), P(None, ("data", "model")), P(), P(None, "model")),
    # 43 channels can't be cut: the rank axis takes it; a rank of 4 is cut four ways and no further.
    ((8, 43), None, P("model"), P("model"), P(), P(None, "model")),
    ((8, 43), None, P(("data", "model")), P("data"), P(), P(None, ("data", "model"))),
    # 86 channels can be cut in two: one mesh axis each.
    ((8, 86), None, P(("model", "data")), P("model", "data"), P(), P(None, ("model", "data"))),
    # Neither divides: replicated.
    ((4, 43), 1, P("model"), P(), P(), P(None, "model")),
    # Stacked, cut along the layers as well; and with the layers in the middle.
    ((2, 8, 16), STACKED, P("data", "model"), P("data", None, "model"), P("data"), P("data", None, "model")),
    (
        (8, 2, 16),
        ApolloDimensionNumbers(0, 2),
        P("model", "data"),
        P("data", None, "model"),
        P("data"),
        P("data", None, "model"),
    ),
    # Several axes a side.
    ((8, 4, 6), ApolloDimensionNumbers(0, (1, 2)), P("data", "model"), P(None, "model", "data"), P(), P()),
    ((4, 6, 64), ApolloDimensionNumbers((0, 1), 2), P("model", "data"), P(None, ("model", "data")), P(), P()),
]


@pytest.mark.parametrize(("shape", "how", "spec", "mu", "norm", "projection"), PLACES)
def test_places(shape, how, spec, mu, norm, projection):
    mesh = mesh_of()
    rank, numbers = (1, None) if how == 1 else (4, how)
    params = {"kernel": jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))}
    for kind in ("random", "svd"):
        tx = scale_by_apollo(rank, projection=kind, weight_dimension_numbers=numbers)
        state = jax.eval_shape(tx.init, params)
        places = state_sharding(state, params, weight_dimension_numbers=numbers)
        chex.assert_trees_all_equal_structs(places, state)
        for field in ("mu", "nu"):
            leaf = getattr(state, field)["kernel"]
            assert spec_of(getattr(places, field)["kernel"], leaf.ndim) == spec_of(
                NamedSharding(mesh, mu), leaf.ndim
            )
        ndim = state.norm["kernel"].ndim
        assert spec_of(places.norm["kernel"], ndim) == spec_of(NamedSharding(mesh, norm), ndim)
        assert places.count.spec == places.key.spec == P()
        if kind == "svd" and projection != P():
            ndim = state.projection["kernel"].ndim
            assert spec_of(places.projection["kernel"], ndim) == spec_of(
                NamedSharding(mesh, projection), ndim
            )
        # And every leaf can be put there.
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), state)
        jax.device_put(zeros, places)


SHAPES = [
    ((8, 16), None),
    ((16, 8), None),
    ((8, 8), None),
    ((8, 43), None),
    ((2, 8, 16), STACKED),
    ((8, 4, 6), ApolloDimensionNumbers(0, (1, 2))),
]


def every_spec(shape):
    """All ways to cut a tensor of this shape over the mesh of two and four."""
    cuts = [(), ("data",), ("model",), ("data", "model"), ("model", "data")]
    sizes = {"data": 2, "model": 4}
    for entries in itertools.product(cuts, repeat=len(shape)):
        used = [name for cut in entries for name in cut]
        pieces = [math.prod(sizes[name] for name in cut) for cut in entries]
        divides = all(size % count == 0 for size, count in zip(shape, pieces, strict=True))
        if divides and len(used) == len(set(used)):
            yield P(*(cut or None for cut in entries))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["random", "svd"])
@pytest.mark.parametrize(
    ("shape", "spec", "numbers"),
    [(shape, spec, numbers) for shape, numbers in SHAPES for spec in every_spec(shape)],
)
def test_types_never_change_whatever_is_cut(kind, projection, shape, spec, numbers):
    test_types_never_change(kind, projection, shape, spec, numbers)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["random", "rademacher", "svd"])
@pytest.mark.parametrize(
    ("shape", "spec", "numbers"),
    [
        ((8, 16), P(None, "model"), None),
        ((8, 16), P("model"), None),
        ((16, 8), P("data", "model"), None),
        ((8, 43), P(("data", "model")), None),
        ((2, 8, 16), P("data", "model"), STACKED),
        ((8, 4, 6), P("data", "model"), ApolloDimensionNumbers(0, (1, 2))),
    ],
)
def test_types_never_change(kind, projection, shape, spec, numbers):
    """init, eager and jitted, and every update give states of one type; numbers are the unsharded ones."""
    mesh = mesh_of(kind)
    scale_type = "tensor" if projection == "rademacher" else "channel"
    tx = scale_by_apollo(4, scale_type=scale_type, projection=projection, weight_dimension_numbers=numbers)
    gradient = put(mesh, shape, spec)
    state = tx.init(gradient)
    expected, expected_state = tx.update(np.asarray(gradient), tx.init(np.asarray(gradient)))
    places = state_sharding(state, gradient, weight_dimension_numbers=numbers)
    for update in (tx.update, jax.jit(tx.update)):
        got, new = update(gradient, state)
        _, newer = update(gradient, new)
        for after in (new, newer):
            for leaf, before, place in zip(*map(jax.tree.leaves, (after, state, places)), strict=True):
                assert jax.typeof(leaf) == jax.typeof(before)
                assert leaf.sharding.is_equivalent_to(place, leaf.ndim)
                assert before.sharding.is_equivalent_to(place, leaf.ndim)
        assert got.sharding.is_equivalent_to(gradient.sharding, gradient.ndim)
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
        chex.assert_trees_all_close(new, expected_state, rtol=1e-4, atol=1e-5)
    if kind == AxisType.Explicit:
        with jax.set_mesh(mesh):
            jitted = jax.jit(tx.init)(gradient)
            for leaf, before in zip(jax.tree.leaves(jitted), jax.tree.leaves(tx.init(gradient)), strict=True):
                assert jax.typeof(leaf) == jax.typeof(before)

            def step(state, _):
                return tx.update(gradient, state)[1], None

            # A scan refuses a carry whose type changes.
            scanned, _ = jax.lax.scan(step, jitted, length=2)
            assert scanned.count == 2


def test_no_recompilation_on_a_mesh():
    """An eager init puts even the count and the key where the step will leave them."""
    mesh, traces = mesh_of(), []
    tx = apollo_optax.apollo(0.1, rank=4)
    params = {"kernel": put(mesh, (8, 16), P("model")), "bias": put(mesh, (16,), P("model"))}

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
    def labels(params):
        return jax.tree.map(lambda x: "apollo" if x.ndim == 2 else "adam", params)

    apollo = apollo_optax.apollo(0.1, rank=4)
    return {
        "chain": optax.chain(optax.clip(1.0), apollo),
        "masked": optax.masked(apollo, lambda params: jax.tree.map(lambda x: x.ndim == 2, params)),
        "partition": optax.partition({"apollo": apollo, "adam": optax.adam(0.1)}, labels),
        "multi_steps": optax.MultiSteps(apollo, 2).gradient_transformation(),
        "inject": optax.inject_hyperparams(apollo_optax.apollo, apollo_optax.STATIC_ARGS, jnp.float32)(
            0.1, rank=4
        ),
        "limiter": optax.chain(optax.adam(0.1), apollo_optax.limit_norm_growth()),
        "full_rank": apollo_optax.apollo(0.1, rank=64),
    }


@pytest.mark.parametrize("name", pipelines())
def test_any_pipeline(name):
    mesh = mesh_of()
    params = {
        "kernel": put(mesh, (16, 8), P("data", "model")),
        "bias": put(mesh, (8,), P("model")),
    }
    tx = pipelines()[name]
    state = tx.init(params)
    places = state_sharding(state, params)
    chex.assert_trees_all_equal_structs(places, state)
    seen = set()
    for path, place in jax.tree_util.tree_leaves_with_path(places):
        names = [str(getattr(entry, "name", getattr(entry, "key", entry))) for entry in path]
        assert isinstance(place, NamedSharding)
        ours = name != "limiter" and not (name == "partition" and "adam" in names)
        if names[-1] == "kernel" and names[-2] in ("mu", "nu"):
            seen.add("kernel")
            assert place.spec == (P(None, ("data", "model")) if ours else P("data", "model")), names
        elif names[-1] == "kernel" and names[-2] == "acc_grads":
            seen.add("accumulated")
            assert place.spec == P("data", "model")
        elif names[-1] == "bias" and names[-2] in ("mu", "nu", "acc_grads"):
            seen.add("bias")
            assert place.spec == P("model"), names
        else:
            assert place.spec == P(), names
    assert "kernel" in seen
    assert ("accumulated" in seen) == (name == "multi_steps")
    jax.device_put(state, places)


def test_a_bare_array():
    mesh = mesh_of()
    for shape, spec, mu in [((8, 16), P("model"), P(None, "model")), ((2,), P("data"), P("data"))]:
        param = put(mesh, shape, spec)
        tx = apollo_optax.apollo(0.1, rank=4)
        places = state_sharding(tx.init(param), param)
        assert places[0].mu.spec == places[0].nu.spec == mu
        assert places[0].key.spec == places[0].count.spec == P()  # Also where it has the leaf's shape.


def test_a_parameter_called_as_another_ends():
    """`scale` alone and `norm/scale`: the longer path owns the state leaf."""
    mesh = mesh_of()
    params = {"scale": put(mesh, (8,), P("data")), "norm": {"scale": put(mesh, (8,), P("model"))}}
    places = state_sharding(optax.adam(0.1).init(params), params)
    assert places[0].mu["scale"].spec == P("data")
    assert places[0].mu["norm"]["scale"].spec == P("model")


def test_modules_named_as_our_fields():
    mesh = mesh_of()
    names = ("mu", "nu", "norm", "projection")
    params = {name: {"w": put(mesh, (8, 16), P("model"))} for name in names}
    params["w"] = put(mesh, (8, 16), P("data"))
    places = state_sharding(apollo_optax.apollo(0.1, rank=4, projection="svd").init(params), params)[0]
    for field, spec in (("mu", P(None, "model")), ("norm", P()), ("projection", P(None, "model"))):
        assert all(getattr(places, field)[name]["w"].spec == spec for name in names)
    assert places.mu["w"].spec == P(None, "data")


def test_a_field_called_norm_of_another_optimizer():
    mesh = mesh_of()
    params = {"w": put(mesh, (8, 16), P("model"))}
    states = (LimitNormGrowthState(params), LimitNormGrowthState({"w": jnp.zeros(())}))
    places = state_sharding(states, params)
    assert places[0].norm["w"].spec == P("model")
    assert places[1].norm["w"].spec == P()


def test_the_kind_of_memory_follows_the_parameter():
    host = NamedSharding(mesh_of(), P("model"), memory_kind="pinned_host")
    params = {name: jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=host) for name in ("kernel", "bias")}
    places = state_sharding(jax.eval_shape(scale_by_apollo(4).init, params), params)
    for field in (places.mu, places.norm):
        assert field["kernel"].memory_kind == field["bias"].memory_kind == "pinned_host"


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("spec", [P(), P("data"), P(None, None, "model"), P("data", None, "model")])
def test_gradients_cut_otherwise_than_the_parameters(spec, scale_type):
    """As after a reduce-scatter over some of the mesh's axes only: the state stays where it is."""
    mesh = mesh_of(AxisType.Explicit)
    param = put(mesh, (2, 8, 16), P("data", "model"))
    gradient = put(mesh, (2, 8, 16), spec)
    for projection in ("random", "svd"):
        tx = scale_by_apollo(
            4, scale_type=scale_type, projection=projection, weight_dimension_numbers=STACKED
        )
        state = tx.init(param)
        _, expected = tx.update(param, state)
        updates, new = jax.jit(tx.update)(gradient, state)
        assert jax.typeof(updates) == jax.typeof(gradient)
        for leaf, before in zip(*map(jax.tree.leaves, (new, state)), strict=True):
            assert jax.typeof(leaf).str_short() == jax.typeof(before).str_short()
        chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", [P("data"), P(None, "model")])
def test_gradients_cut_by_one_axis_of_two(spec):
    """Where the moments would be by the gradient's own cuts, their types would clash with the state's."""
    mesh = mesh_of(AxisType.Explicit)
    tx = scale_by_apollo(4)
    param = put(mesh, (8, 16), P("data", "model"))
    state = tx.init(param)
    _, expected = tx.update(param, state)
    _, new = jax.jit(tx.update)(put(mesh, (8, 16), spec), state)
    assert new.mu.sharding.spec == P(None, ("model", "data"))
    chex.assert_trees_all_close(new, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("shape", "spec", "numbers"),
    [
        ((64, 512), P(("data", "model")), None),
        ((8, 64, 128), P(("data", "model")), STACKED),
        ((8, 8, 512), P("data", "model"), ApolloDimensionNumbers((0, 1), 2)),
    ],
)
def test_each_device_draws_its_own_part(kind, shape, spec, numbers):
    """The compiled step makes no more random words a device than its part of the projection has."""
    mesh = mesh_of(kind)
    tx = scale_by_apollo(32, weight_dimension_numbers=numbers)
    gradient = put(mesh, shape, spec)
    program = jax.jit(tx.update).lower(gradient, tx.init(gradient)).compile().as_text()
    words = [math.prod(map(int, sizes.split(","))) for sizes in re.findall(r"u32\[([\d,]+)\]", program)]
    matrices = shape[0] if numbers == STACKED else 1
    assert max(words) <= matrices * 32 * 64 / 8


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projection", ["random", "svd"])
def test_inside_a_shard_map_over_some_axes(kind, projection):
    mesh, tx = mesh_of(kind), scale_by_apollo(4, projection=projection)
    gradient = put(mesh, (8, 16), P())
    state = tx.init(gradient)
    update = jax.shard_map(tx.update, mesh=mesh, in_specs=P(), out_specs=P(), axis_names={"data"})
    with jax.set_mesh(mesh):
        updates, _ = jax.jit(update)(gradient, state)
    np.testing.assert_allclose(updates, tx.update(gradient, state)[0], rtol=1e-5, atol=1e-6)


def test_nnx_optimizer():
    """nnx.state of an optimizer has lost the type of our state: its fields are known by name."""
    mesh = mesh_of()
    model = nnx.Linear(8, 16, rngs=nnx.Rngs(0))
    model.kernel.set_value(put(mesh, (8, 16), P("model")))
    model.bias.set_value(put(mesh, (16,), P("model")))
    optimizer = nnx.Optimizer(model, apollo_optax.apollo(0.1, rank=4), wrt=nnx.Param)
    state = nnx.state(optimizer)
    places = state_sharding(state, nnx.state(model, nnx.Param))
    chex.assert_trees_all_equal_structs(places, state)
    pure = nnx.to_pure_dict(places)["opt_state"][0]
    assert pure["mu"]["kernel"].spec == pure["nu"]["kernel"].spec == P(None, "model")
    assert pure["mu"]["bias"].spec == P("model")
    assert pure["norm"]["kernel"].spec == pure["count"].spec == pure["key"].spec == P()


def test_boxed_parameters():
    """Linen's metadata says ("data", "model"); the state follows the arrays, not the metadata."""
    mesh = mesh_of()
    params = {"kernel": nn.Partitioned(put(mesh, (8, 16), P("data", "model")), ("data", "model"))}
    tx = scale_by_apollo(4)
    state = tx.init(params)
    assert isinstance(state.mu["kernel"], jax.Array)
    places = state_sharding(state, params)
    assert places.mu["kernel"].spec == P(None, ("model", "data"))


def test_state_made_on_the_mesh_by_jit():
    mesh = mesh_of()
    params = {"kernel": put(mesh, (8, 16), P("data", "model"))}
    tx = apollo_optax.apollo(0.1, rank=4)
    places = state_sharding(jax.eval_shape(tx.init, params), params)
    state = jax.jit(tx.init, out_shardings=places)(params)
    chex.assert_trees_all_equal(state, tx.init(params))
    assert state[0].mu["kernel"].sharding.spec == P(None, ("model", "data"))


@pytest.mark.parametrize("kind", KINDS)
def test_the_limiter_alone(kind):
    mesh = mesh_of(kind)
    tx = apollo_optax.limit_norm_growth(weight_dimension_numbers={"stack": STACKED, "bias": None})
    gradient = {"stack": put(mesh, (2, 8, 16), P("data", "model")), "bias": put(mesh, (8,), P("model"))}
    state = tx.init(gradient)
    _, state = tx.update(gradient, state)
    larger = jax.tree.map(lambda x: 3 * x, gradient)
    for update in (tx.update, jax.jit(tx.update)):
        updates, new = update(larger, state)
        chex.assert_trees_all_close(updates, jax.tree.map(lambda x: 1.01 * x, gradient), rtol=1e-5)
        for leaf, before in zip(*map(jax.tree.leaves, ((updates, new), (gradient, state))), strict=True):
            assert jax.typeof(leaf) == jax.typeof(before)
            assert leaf.sharding.is_equivalent_to(before.sharding, leaf.ndim)

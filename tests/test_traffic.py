"""What crosses the wire: read off the compiled step, for meshes of CPU devices and for TPUs not there.

As a script, with the name of a TPU topology: prints what the programs for it send, as JSON.
"""

import dataclasses
import importlib.util
import itertools
import json
import math
import os
import subprocess
import sys
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from apollo_optax import (
    ApolloDimensionNumbers,
    apollo,
    dimension_numbers_by_path,
    layerwise_step,
    scale_by_apollo,
    state_sharding,
)
from benchmarks.hlo import Collective, collectives, drawn_words

KINDS = [AxisType.Auto, AxisType.Explicit]
STACKED = ApolloDimensionNumbers(1, 2)
HEADS = ApolloDimensionNumbers(0, (1, 2))  # (in, heads, head size)
FROM_HEADS = ApolloDimensionNumbers((0, 1), 2)  # (heads, head size, out)
RANK = 4  # So small that no part of a gradient is as small as a projected one.
D, M = "data", "model"


class Case(NamedTuple):
    """A kernel, by the sizes of its sides, and how it is cut."""

    shape: tuple[int, ...]
    spec: P
    numbers: ApolloDimensionNumbers | None
    channels: int  # Of all its matrices.
    contracted: tuple[int, ...] = (0,)  # The axes of that side.


CASES = {
    "contracted": Case((256, 1024), P(M), None, 1024),
    "contracted twice": Case((256, 1024), P((D, M)), None, 1024),
    "channels": Case((256, 1024), P(None, M), None, 1024),
    "both": Case((256, 1024), P(D, M), None, 1024),
    "tall": Case((1024, 256), P(D, M), None, 1024, (1,)),
    "square": Case((256, 256), P(M, D), None, 256),
    "batch": Case((256, 1024), P(), None, 1024),
    # No mesh divides 1021: moments are cut along the rank axis.
    "prime": Case((256, 1021), P(M), None, 1021),
    "prime, tall": Case((1021, 256), P(None, (M, D)), None, 1021, (1,)),
    "stacked": Case((8, 256, 1024), P(None, M, D), STACKED, 8 * 1024, (1,)),
    "stacked, prime": Case((8, 256, 1021), P(None, M), STACKED, 8 * 1021, (1,)),
    "layers": Case((16, 256, 1024), P(M, D), STACKED, 16 * 1024, (1,)),
    "heads": Case((256, 16, 64), P(D, M), HEADS, 1024),
    "head size": Case((256, 16, 64), P(D, None, M), HEADS, 1024),
    "from heads": Case((16, 16, 1024), P(M, D), FROM_HEADS, 1024, (0, 1)),
    "from head size": Case((16, 16, 1024), P(None, M, D), FROM_HEADS, 1024, (0, 1)),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "channel-wise": {"rank": RANK},
    "tensor-wise": {"rank": 1, "scale_type": "tensor", "scale_front": True},
    "rademacher": {"rank": RANK, "projection": "rademacher", "norm_growth_limit": None},
    "rank 1": {"rank": 1},
    "rank 16": {"rank": 16},
    "svd": {"rank": RANK, "projection": "svd"},
}


def make_mesh(kind: AxisType, devices: Any = None) -> jax.sharding.Mesh:
    """Of two axes, the second the longer."""
    count = len(devices or jax.devices())
    rows = 2 if count < 64 else 16
    return jax.make_mesh((rows, count // rows), (D, M), (kind,) * 2, devices=devices)


def compiled(case: Case, mesh: jax.sharding.Mesh, settings: str, dtype: Any = jnp.float32) -> Any:
    """The update and its addition to the parameter, and where state_sharding places the state."""
    tx = scale_by_apollo(**SETTINGS[settings], weight_dimension_numbers=case.numbers)
    param = jax.ShapeDtypeStruct(case.shape, dtype, sharding=NamedSharding(mesh, case.spec))
    state = jax.eval_shape(tx.init, param)
    places = state_sharding(state, param, weight_dimension_numbers=case.numbers)
    state = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, places)

    def step(param, gradient, state):
        updates, state = tx.update(gradient, state, param)
        return optax.apply_updates(param, updates), state

    return jax.jit(step, donate_argnums=(0, 2)).lower(param, param, state).compile(), state


def drawn_locally(case: Case, mesh: jax.sharding.Mesh, rank: int) -> int:
    """The numbers in the part of the projections that a device multiplies with."""
    part = NamedSharding(mesh, case.spec).shard_shape(case.shape)
    matrices = math.prod(part) // math.prod(part[axis] for axis in sides(case))
    return rank * matrices * math.prod(part[axis] for axis in case.contracted)


def sides(case: Case) -> set[int]:
    numbers = case.numbers or ApolloDimensionNumbers()
    axes = [numbers.reduction_axis, numbers.output_axis]
    return {axis for side in axes for axis in ((side,) if isinstance(side, int) else side)}


def check_traffic(found: list[Collective], case: Case, devices: int, rank: int) -> None:
    """At most one sum of projected gradients, and vectors."""
    sums, moves = {"all-reduce", "reduce-scatter"}, {"all-gather", "collective-permute"}
    assert {each.kind for each in found} <= sums | moves, found
    assert all(each.times == 1 for each in found)
    projected = [each for each in found if each.size > case.channels]
    vectors = [each for each in found if each not in projected and each.size > 8]
    assert all(each.kind in sums and each.size <= rank * case.channels for each in projected), found
    # One sum, be it over one axis of the mesh after the other.
    one_sum = 2 * (devices - 1) / devices * 4 * rank * case.channels
    assert sum(each.sent_bytes for each in projected) <= one_sum, found
    # A device's part of the projected gradient may be a vector, too, and be moved once to where it is held.
    moved = [each for each in vectors if each.kind == "collective-permute"]
    assert len(vectors) - len(moved) <= 4, found
    assert len(moved) <= 1, found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        *((name, "channel-wise") for name in CASES),
        *((name, "tensor-wise") for name in ("contracted", "both", "prime", "stacked")),
        *((name, "rademacher") for name in ("contracted", "stacked, prime")),
        ("both", "rank 1"),
    ],
)
def test_only_projections_cross_the_wire(name, settings, kind):
    case, mesh, rank = CASES[name], make_mesh(kind), SETTINGS[settings]["rank"]
    program, state = compiled(case, mesh, settings)
    check_traffic(collectives(program.as_text()), case, mesh.size, rank)
    # No device draws more than its part; the keys of the matrices are words too.
    assert drawn_words(program.as_text()) <= max(drawn_locally(case, mesh, rank), 2 * 16)
    # And though nothing else says where the new state is to be, it is where the old one was.
    for leaf, place in zip(jax.tree.leaves(state), jax.tree.leaves(program.output_shardings[1]), strict=True):
        assert place.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize("told", [*KINDS, "in_shardings"])
@pytest.mark.parametrize("layers", [(), (8,)], ids=["separate", "stacked"])
def test_leaves_of_one_shape_may_be_cut_differently(layers, told):
    """As those of attention are, before and after the heads: no more is sent than of each alone."""
    mesh = make_mesh(AxisType.Auto if told == "in_shardings" else told)
    specs = {"q": P(D, M), "k": P(D, M), "o": P(M, D), "p": P(None, M), "r": P((D, M))}
    specs = {name: P(*[None] * len(layers), *spec) for name, spec in specs.items()}
    tx = scale_by_apollo(RANK, weight_dimension_numbers=ApolloDimensionNumbers(-2, -1))

    def program(names):
        def abstract(shape, dtype, place):
            return jax.ShapeDtypeStruct(shape, dtype, sharding=None if told == "in_shardings" else place)

        params = {
            name: jax.ShapeDtypeStruct(
                (*layers, 256, 256), jnp.float32, sharding=NamedSharding(mesh, specs[name])
            )
            for name in names
        }
        state = jax.eval_shape(tx.init, params)
        places = state_sharding(state, params, weight_dimension_numbers=ApolloDimensionNumbers(-2, -1))
        given = jax.tree.map(lambda x: x.sharding, params), places
        params = jax.tree.map(lambda x: abstract(x.shape, x.dtype, x.sharding), params)
        state = jax.tree.map(lambda x, place: abstract(x.shape, x.dtype, place), state, places)
        by_hand = {"in_shardings": given, "out_shardings": given} if told == "in_shardings" else {}
        # The types of in_shardings' arguments show no mesh; the context does.
        with jax.set_mesh(mesh):
            lowered = jax.jit(tx.update, **by_hand).lower(params, state)
        found = collectives(lowered.compile().as_text())
        kinds = {"all-reduce", "reduce-scatter", "all-gather", "collective-permute"}
        assert {each.kind for each in found} <= kinds
        return sum(each.sent_bytes for each in found)

    together = program(specs)
    assert 0 < together <= sum(program([name]) for name in specs)


def test_a_gathered_gradient_would_be_noticed():
    case, mesh = CASES["contracted"], make_mesh(AxisType.Auto)
    param = jax.ShapeDtypeStruct(case.shape, jnp.float32, sharding=NamedSharding(mesh, case.spec))
    whole = NamedSharding(mesh, P())
    program = jax.jit(jnp.sin, out_shardings=whole).lower(param).compile().as_text()
    (gathered,) = collectives(program)
    assert gathered == Collective("all-gather", "f32", case.shape, 4)
    assert gathered.sent_bytes == 3 / 4 * 4 * 256 * 1024
    with pytest.raises(AssertionError):
        check_traffic([gathered], case, mesh.size, RANK)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["contracted", "stacked", "from heads"])
def test_svd_replicates_a_matrix_at_a_time_when_it_refreshes(name, kind):
    case, mesh = CASES[name], make_mesh(kind)
    program = compiled(case, mesh, "svd")[0].as_text()
    check_traffic(collectives(program), case, mesh.size, RANK)
    matrices = math.prod(case.shape) // math.prod(case.shape[axis] for axis in sides(case))
    gathered = [each for each in collectives(program, rare=True) if each.size > RANK * case.channels]
    assert gathered
    assert {each.times for each in gathered} == {matrices}
    assert max(each.size for each in gathered) == math.prod(case.shape) // matrices


# Layer by layer.

LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 128, 256, 40
NUMBERS = dimension_numbers_by_path([(r"^layers/", STACKED)])
SHAPES = {
    "embed": (VOCABULARY, WIDTH),
    "layers": {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)},
    "head": (WIDTH, VOCABULARY),
}
WHOLE = {"embed": P(), "layers": {"up": P(), "down": P()}, "head": P()}
BY_WIDTH = {
    "embed": P(None, "x"),
    "layers": {"up": P(None, "x"), "down": P(None, None, "x")},
    "head": P("x"),
}


def layerwise_collectives(tx, specs) -> Counter[Collective]:
    """Of a step over eight devices, of which each has its part of the batch."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))

    def abstract(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(abstract, SHAPES, specs, is_leaf=lambda x: type(x) is tuple)
    state = jax.eval_shape(tx.init, params)
    places = state_sharding(state, params, weight_dimension_numbers=NUMBERS)
    state = jax.tree.map(lambda x, place: abstract(x.shape, place.spec, x.dtype), state, places)

    def loss(params, x, batch):
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[:, 1:]).mean()

    step = layerwise_step(
        lambda params, batch: params["embed"][batch[:, :-1]],
        lambda params, x, *_: x + jnp.tanh(x @ params["up"]) @ params["down"],
        loss,
        tx,
    )
    places = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*places, None))
    lowered = jitted.lower(params, state, abstract((16, 9), P("x"), jnp.int32))
    return Counter(collectives(lowered.compile().as_text()))


@pytest.mark.parametrize("specs", [WHOLE, BY_WIDTH], ids=["data", "fsdp"])
def test_layer_by_layer(specs):
    """Beside what SGD's step sends, which is the model's, projections of a layer at a time and vectors."""
    tx = apollo(0.1, RANK, weight_dimension_numbers=NUMBERS)
    of_sgd, of_apollo = (layerwise_collectives(each, specs) for each in (optax.sgd(0.1), tx))
    kernel = WIDTH * HIDDEN
    assert max(each.size for each in of_sgd) == kernel  # Of one layer.
    sums = [each for each in of_sgd.elements() if each.kind == "all-reduce" and each.size == kernel]
    if specs is WHOLE:
        assert [each.times for each in sums] == [LAYERS, LAYERS]  # Of the two kernels' gradients.
        assert of_apollo == of_sgd
        return
    assert not of_sgd - of_apollo
    more = list((of_apollo - of_sgd).elements())
    assert {each.times for each in more} == {LAYERS}
    # Both kernels have their width contracted, and it is cut.
    assert sorted(each.size for each in more if each.size > HIDDEN) == [RANK * HIDDEN] * 2
    assert all(each.kind == "all-reduce" for each in more if each.size > HIDDEN)


# TPUs, compiled for with none attached.

ON_TPUS = [
    *((name, "channel-wise") for name in ("contracted", "contracted twice", "both", "stacked", "from heads")),
    *((name, "rank 16") for name in ("prime", "stacked, prime")),  # Which the mesh's axes divide.
]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, the TPU compiler, is not installed"
)
@pytest.mark.parametrize(("topology", "devices"), [("v5e:4x4", 16), ("v5e:16x16", 256)])
def test_on_tpus(topology, devices):
    environment = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    path = {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
    command = [sys.executable, __file__, topology]
    child = subprocess.run(command, env=os.environ | environment | path, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    programs = json.loads(child.stdout.splitlines()[-1])
    assert len(programs) == 4 * len(ON_TPUS)
    for program in programs:
        found = [Collective(**each) for each in program["collectives"]]
        check_traffic(found, CASES[program["case"]], devices, SETTINGS[program["settings"]]["rank"])
        assert program["words"] <= program["part"], program


def programs_for(topology: str) -> list[dict[str, Any]]:
    from jax.experimental import topologies

    devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    programs = []
    for name, settings in ON_TPUS:
        # Which is multiplied in its own dtype, other than on CPUs.
        for kind, dtype in itertools.product(KINDS, (jnp.float32, jnp.bfloat16)):
            case, mesh = CASES[name], make_mesh(kind, devices)
            text = compiled(case, mesh, settings, dtype)[0].as_text()
            found = [dataclasses.asdict(each) for each in collectives(text)]
            # A program has tables of the devices, too.
            part = max(drawn_locally(case, mesh, SETTINGS[settings]["rank"]), 2 * len(devices))
            program = {"case": name, "settings": settings, "collectives": found, "part": part}
            programs.append(program | {"words": drawn_words(text)})
    return programs


if __name__ == "__main__":
    print(json.dumps(programs_for(sys.argv[1])))

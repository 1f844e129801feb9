"""What devices send each other in a step, read from the compiled program.

The programs are for meshes of CPU devices, and for TPUs, of which none is attached.
As a script, with the name of a TPU topology and the number of cases, this file prints
what the programs for the topology send, as JSON.
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
from tests.helpers import every_axis_type, make_mesh

# The fixture changes the machine code alone. The collectives and the sizes of random
# arrays, which these tests read, stay the same.
pytestmark = pytest.mark.usefixtures("quick_compilation")

STACKED = ApolloDimensionNumbers(1, 2)
LAST_TWO = ApolloDimensionNumbers(-2, -1)
# Axes (in, heads, head size), and (heads, head size, out).
HEADS = ApolloDimensionNumbers(0, (1, 2))
FROM_HEADS = ApolloDimensionNumbers((0, 1), 2)
# With this small rank, a shard of a gradient is larger than a projected gradient.
RANK = 4
D, M = "data", "model"
# The collectives that sum over devices, and those that only move data.
SUMS = {"all-reduce", "reduce-scatter"}
MOVES = {"all-gather", "collective-permute"}


class Case(NamedTuple):
    """A sharded kernel.

    Attributes:
      shape: The shape of the whole kernel.
      spec: How it is sharded over the mesh.
      numbers: Which axes are a matrix; None for the default.
      channels: The number of channels of all matrices together.
      contracted: The axes of the contracted side.
    """

    shape: tuple[int, ...]
    spec: P
    numbers: ApolloDimensionNumbers | None
    channels: int
    contracted: tuple[int, ...] = (0,)


CASES = {
    "contracted": Case((256, 1024), P(M), None, 1024),
    "contracted twice": Case((256, 1024), P((D, M)), None, 1024),
    "channels": Case((256, 1024), P(None, M), None, 1024),
    "both": Case((256, 1024), P(D, M), None, 1024),
    "tall": Case((1024, 256), P(D, M), None, 1024, (1,)),
    "square": Case((256, 256), P(M, D), None, 256),
    "batch": Case((256, 1024), P(), None, 1024),
    # The mesh does not divide 1021 channels, so it shards the rank axis of the moments.
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
# Drawn words are counted, so most settings draw a word per entry. Random signs come 32
# to a word, which the program takes apart.
NORMAL = {"projection": "random"}
SETTINGS: dict[str, dict[str, Any]] = {
    "channel-wise": {"rank": RANK, **NORMAL},
    "tensor-wise": {"rank": 1, "scale_type": "tensor", "scale_front": True, **NORMAL},
    "rademacher": {"rank": RANK, "projection": "rademacher", "norm_growth_limit": None},
    "rank 1": {"rank": 1, **NORMAL},
    "rank 16": {"rank": 16, **NORMAL},
    "svd": {"rank": RANK, "projection": "svd"},
}


def sharded_state(tx: Any, params: Any, numbers: Any) -> Any:
    """The shapes of the state, with the shardings of ``state_sharding``."""
    state = jax.eval_shape(tx.init, params)
    shardings = state_sharding(state, params, weight_dimension_numbers=numbers)
    return jax.tree.map(lambda x, s: x.update(sharding=s), state, shardings)


def compiled(
    case: Case, mesh: jax.sharding.Mesh, settings: str, dtype: Any = jnp.float32
) -> Any:
    """A step that adds the update to the parameter, and the shapes of its state."""
    tx = scale_by_apollo(**SETTINGS[settings], weight_dimension_numbers=case.numbers)
    sharding = NamedSharding(mesh, case.spec)
    param = jax.ShapeDtypeStruct(case.shape, dtype, sharding=sharding)
    state = sharded_state(tx, param, case.numbers)

    def step(param, gradient, state):
        updates, state = tx.update(gradient, state, param)
        return optax.apply_updates(param, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 2))
    return jitted.lower(param, param, state).compile(), state


def numbers_to_draw(case: Case, mesh: jax.sharding.Mesh, rank: int) -> int:
    """The size of the projections that a device multiplies its shard with."""
    shard = NamedSharding(mesh, case.spec).shard_shape(case.shape)
    matrices = math.prod(shard) // math.prod(shard[axis] for axis in matrix_axes(case))
    return rank * matrices * math.prod(shard[axis] for axis in case.contracted)


def matrix_axes(case: Case) -> set[int]:
    numbers = case.numbers or ApolloDimensionNumbers()
    sides = [numbers.reduction_axis, numbers.output_axis]
    return {
        axis for side in sides for axis in ((side,) if isinstance(side, int) else side)
    }


def check_traffic(found: list[Collective], case: Case, devices: int, rank: int) -> None:
    """Asserts that devices send at most one sum of projected gradients, and vectors."""
    assert {each.kind for each in found} <= SUMS | MOVES, found
    assert all(each.times == 1 for each in found)

    def is_row(each: Collective) -> bool:
        """Whether this is the sum of one row of the projected gradients, `(1, n)`."""
        return each.kind in SUMS and each.size == case.channels and 1 in each.shape

    projected = [each for each in found if each.size > case.channels or is_row(each)]
    vectors = [each for each in found if each not in projected and each.size > 8]
    for each in projected:
        assert each.kind in SUMS, found
        assert each.size <= rank * case.channels, found
    # XLA may split the sum by the axes of the mesh.
    one_sum = 2 * (devices - 1) / devices * 4 * rank * case.channels
    assert sum(each.sent_bytes for each in projected) <= one_sum, found
    # A shard of the projected gradient may be as small as a vector. XLA may move it
    # once, to the device that stores its moments.
    moved = [each for each in vectors if each.kind == "collective-permute"]
    assert len(vectors) - len(moved) <= 4, found
    assert len(moved) <= 1, found


# These have a sum over the contracted side, shards of both sides, and a stack. A new
# compiler may word the programs of the many other cases differently, so they are slow.
REPRESENTATIVE = [
    ("contracted", "channel-wise"),
    ("both", "tensor-wise"),
    ("stacked", "channel-wise"),
]


@every_axis_type
@pytest.mark.parametrize(
    ("name", "settings"),
    [
        pytest.param(*case, marks=[] if case in REPRESENTATIVE else pytest.mark.slow)
        for case in (
            *((name, "channel-wise") for name in CASES),
            *((n, "tensor-wise") for n in ("contracted", "both", "prime", "stacked")),
            *((name, "rademacher") for name in ("contracted", "stacked, prime")),
            ("both", "rank 1"),
        )
    ],
)
def test_devices_exchange_projected_gradients_only(name, settings, axis_type):
    case, rank = CASES[name], SETTINGS[settings]["rank"]
    mesh = make_mesh(axis_type)
    program, state = compiled(case, mesh, settings)
    text = program.as_text()
    check_traffic(collectives(text), case, mesh.size, rank)
    # No device draws more than its shard needs. The keys of matrices are words, too.
    assert drawn_words(text) <= max(numbers_to_draw(case, mesh, rank), 2 * 16)
    # The step has no out_shardings, and yet the new state is sharded like the old one.
    pairs = zip(
        *map(jax.tree.leaves, (state, program.output_shardings[1])), strict=True
    )
    for leaf, sharding in pairs:
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


def bytes_sent(tx: Any, params: Any, numbers: Any, as_arguments: bool) -> float:
    """What a device sends in an update.

    Args:
      tx: The optimizer.
      params: The shapes and shardings of the parameters.
      numbers: The dimension numbers of ``tx``.
      as_arguments: Whether to pass the shardings as ``in_shardings`` and
        ``out_shardings`` of ``jit``, instead of with the arrays.
    """
    given = (params, sharded_state(tx, params, numbers))
    shardings = jax.tree.map(lambda x: x.sharding, given)
    jit_arguments = {}
    if as_arguments:
        given = jax.tree.map(lambda x: x.update(sharding=None), given)
        jit_arguments = {"in_shardings": shardings, "out_shardings": shardings}
    jitted = jax.jit(tx.update, **jit_arguments)
    mesh = jax.tree.leaves(shardings)[0].mesh
    # The types of such arguments show no mesh, but the context does.
    with jax.set_mesh(mesh):
        lowered = jitted.lower(*given)
    found = collectives(lowered.compile().as_text())
    assert {each.kind for each in found} <= SUMS | MOVES
    return sum(each.sent_bytes for each in found)


@pytest.mark.parametrize(
    ("layers", "told"),
    [
        pytest.param((), AxisType.Auto, id="separate, automatic"),
        *(
            pytest.param(layers, told, id=f"{name}, {told}", marks=pytest.mark.slow)
            for name, layers, told in [
                ("separate", (), AxisType.Explicit),
                ("separate", (), "in_shardings"),
                ("stacked", (8,), AxisType.Auto),
                ("stacked", (8,), AxisType.Explicit),
                ("stacked", (8,), "in_shardings"),
            ]
        ),
    ],
)
def test_leaves_of_one_shape_may_be_sharded_differently(layers, told):
    """Together they send no more than each alone.

    An attention's kernels before and after the heads are such leaves.
    """
    as_arguments = told == "in_shardings"
    mesh = make_mesh(AxisType.Auto if as_arguments else told)
    specs = {"q": P(D, M), "o": P(M, D), "p": P(None, M), "r": P((D, M))}
    tx = scale_by_apollo(RANK, weight_dimension_numbers=LAST_TWO)
    params = {}
    for name, spec in specs.items():
        sharding = NamedSharding(mesh, P(*[None] * len(layers), *spec))
        shape = (*layers, 256, 256)
        params[name] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)
    params["k"] = params["q"]

    def sent(names):
        named = {name: params[name] for name in names}
        return bytes_sent(tx, named, LAST_TWO, as_arguments)

    alone = {name: sent([name]) for name in specs}
    # A leaf of the same sharding sends as much.
    alone["k"] = alone["q"]
    assert 0 < sent(params) <= sum(alone.values())


def test_gathered_gradient_fails_the_check():
    case, mesh = CASES["contracted"], make_mesh()
    sharding, replicated = NamedSharding(mesh, case.spec), NamedSharding(mesh, P())
    param = jax.ShapeDtypeStruct(case.shape, jnp.float32, sharding=sharding)
    jitted = jax.jit(jnp.sin, out_shardings=replicated)
    (gathered,) = collectives(jitted.lower(param).compile().as_text())
    assert gathered == Collective("all-gather", "f32", case.shape, 4)
    assert gathered.sent_bytes == 3 / 4 * 4 * 256 * 1024
    with pytest.raises(AssertionError):
        check_traffic([gathered], case, mesh.size, RANK)


@every_axis_type
@pytest.mark.parametrize(
    "name",
    [
        pytest.param("contracted", marks=pytest.mark.slow),
        "stacked",
        pytest.param("from heads", marks=pytest.mark.slow),
    ],
)
def test_svd_gathers_one_matrix_at_a_time_when_it_refreshes(name, axis_type):
    case, mesh = CASES[name], make_mesh(axis_type)
    program = compiled(case, mesh, "svd")[0].as_text()
    check_traffic(collectives(program), case, mesh.size, RANK)
    size = math.prod(case.shape)
    matrices = size // math.prod(case.shape[axis] for axis in matrix_axes(case))
    with_refresh = collectives(program, rare=True)
    gathered = [each for each in with_refresh if each.size > RANK * case.channels]
    assert gathered
    assert {each.times for each in gathered} == {matrices}
    assert max(each.size for each in gathered) == size // matrices


def test_svd_gathers_no_experts_when_it_refreshes():
    """Under explicit sharding, where it is known that the experts are sharded."""
    case = Case((16, 64, 256), P(M), STACKED, 16 * 256, (1,))
    program = compiled(case, make_mesh(AxisType.Explicit), "svd")[0].as_text()
    assert not [each for each in collectives(program, rare=True) if each.size > 1]


# The layer-wise step.

LAYERS, WIDTH, HIDDEN, VOCABULARY = 3, 128, 256, 40
NUMBERS = dimension_numbers_by_path([(r"^layers/", STACKED)])
SHAPES = {
    "embed": (VOCABULARY, WIDTH),
    "layers": {"up": (LAYERS, WIDTH, HIDDEN), "down": (LAYERS, HIDDEN, WIDTH)},
    "head": (WIDTH, VOCABULARY),
}
REPLICATED = {"embed": P(), "layers": {"up": P(), "down": P()}, "head": P()}
SHARDED_BY_WIDTH = {
    "embed": P(None, "x"),
    "layers": {"up": P(None, "x"), "down": P(None, None, "x")},
    "head": P("x"),
}


def layerwise_collectives(tx, specs) -> Counter[Collective]:
    """The collectives of a step over eight devices, which share the batch."""
    mesh = jax.make_mesh((8,), ("x",), (AxisType.Auto,))

    def abstract(shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    params = jax.tree.map(abstract, SHAPES, specs, is_leaf=lambda x: type(x) is tuple)
    state = sharded_state(tx, params, NUMBERS)

    def loss(params, x, batch):
        logits = x @ params["head"]
        return optax.softmax_cross_entropy_with_integer_labels(
            logits, batch[:, 1:]
        ).mean()

    step = layerwise_step(
        lambda params, batch: params["embed"][batch[:, :-1]],
        lambda params, x, *_: x + jnp.tanh(x @ params["up"]) @ params["down"],
        loss,
        tx,
    )
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (params, state))
    jitted = jax.jit(step, donate_argnums=(0, 1), out_shardings=(*shardings, None))
    lowered = jitted.lower(params, state, abstract((16, 9), P("x"), jnp.int32))
    return Counter(collectives(lowered.compile().as_text()))


# SGD's step sends what the model needs. The tests look at what APOLLO adds to it.


def test_layerwise_step_sends_gradients_of_one_layer_at_a_time():
    of_sgd = layerwise_collectives(optax.sgd(0.1), REPLICATED)
    tx = apollo(0.1, RANK, weight_dimension_numbers=NUMBERS)
    kernel = WIDTH * HIDDEN
    assert max(each.size for each in of_sgd) == kernel
    sums = [
        each
        for each in of_sgd.elements()
        if each.kind == "all-reduce" and each.size == kernel
    ]
    # One per kernel, and both in the loop over layers.
    assert [each.times for each in sums] == [LAYERS, LAYERS]
    assert layerwise_collectives(tx, REPLICATED) == of_sgd


def test_layerwise_step_sends_projections_of_one_layer_at_a_time():
    of_sgd = layerwise_collectives(optax.sgd(0.1), SHARDED_BY_WIDTH)
    tx = apollo(0.1, RANK, weight_dimension_numbers=NUMBERS)
    of_apollo = layerwise_collectives(tx, SHARDED_BY_WIDTH)
    assert max(each.size for each in of_sgd) == WIDTH * HIDDEN
    assert not of_sgd - of_apollo
    more = list((of_apollo - of_sgd).elements())
    assert {each.times for each in more} == {LAYERS}
    # Both kernels have the width contracted, and it is sharded. The rest are vectors.
    projected = [each for each in more if each.size > HIDDEN]
    assert sorted(each.size for each in projected) == [RANK * HIDDEN] * 2
    assert all(each.kind == "all-reduce" for each in projected)


# Programs for TPUs, of which none is attached.

ON_TPUS = [
    # Its sum is over the largest axis of the mesh.
    ("contracted", "channel-wise"),
    ("contracted twice", "channel-wise"),
    ("both", "channel-wise"),
    ("stacked", "channel-wise"),
    ("from heads", "channel-wise"),
    # The axes of the mesh divide a rank of 16.
    ("prime", "rank 16"),
    ("stacked, prime", "rank 16"),
]


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed",
)
@pytest.mark.parametrize(
    ("topology", "devices", "cases"),
    [
        ("v5e:16x16", 256, 1),
        pytest.param("v5e:16x16", 256, len(ON_TPUS), marks=pytest.mark.slow),
        ("v5e:4x4", 16, len(ON_TPUS)),
    ],
)
def test_tpus_exchange_projected_gradients_only(topology, devices, cases):
    """Compiles the first of the cases for TPUs, or all."""
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "TPU_SKIP_MDS_QUERY": "1",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        # libtpu does not know the flags for CPUs of `quick_compilation`.
        "XLA_FLAGS": "",
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
    }
    command = [sys.executable, __file__, topology, str(cases)]
    child = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    programs = json.loads(child.stdout.splitlines()[-1])
    assert len(programs) == 4 * cases
    for program in programs:
        found = [Collective(**each) for each in program["collectives"]]
        case, rank = CASES[program["case"]], SETTINGS[program["settings"]]["rank"]
        check_traffic(found, case, devices, rank)
        assert program["words"] <= program["words_needed"], program


def programs_for(topology: str, cases: int) -> list[dict[str, Any]]:
    from jax.experimental import topologies

    description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
    devices = description.devices
    rows = 2 if len(devices) < 64 else 16
    sizes = (rows, len(devices) // rows)
    # Unlike CPUs, TPUs multiply bfloat16 gradients in bfloat16.
    variants = itertools.product(
        (AxisType.Auto, AxisType.Explicit), (jnp.float32, jnp.bfloat16)
    )
    programs = []
    for (name, settings), (axis_type, dtype) in itertools.product(
        ON_TPUS[:cases], variants
    ):
        case, rank = CASES[name], SETTINGS[settings]["rank"]
        mesh = jax.make_mesh(sizes, (D, M), (axis_type,) * 2, devices=devices)
        text = compiled(case, mesh, settings, dtype)[0].as_text()
        program = {
            "case": name,
            "settings": settings,
            "collectives": [dataclasses.asdict(each) for each in collectives(text)],
            "words": drawn_words(text),
            # A program has tables of the devices, too.
            "words_needed": max(numbers_to_draw(case, mesh, rank), 2 * len(devices)),
        }
        programs.append(program)
    return programs


if __name__ == "__main__":
    print(json.dumps(programs_for(sys.argv[1], int(sys.argv[2]))))

"""LLaMA on meshes of one process: shardings, checkpoints, and one device's numbers."""

import dataclasses
import importlib.util
import itertools
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import optax
import pytest

from benchmarks.hlo import collectives
from examples.llama import partition
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.evaluate import make_evaluator
from examples.llama.memory.target import environment
from examples.llama.mesh import batch_share, make_mesh, over_data
from examples.llama.model import Batch, pieces_of
from examples.llama.optimizers.embeddings import EMBEDDING_RULES
from examples.llama.optimizers.parameters import path_name
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import RECIPES, with_defaults
from examples.llama.options import RunOptions
from examples.llama.run import setup
from examples.llama.run.checkpoint import Checkpoints
from examples.llama.run.errors import UsageError
from examples.llama.step import TrainState

STEPS = 20
MESHES = ["data=8", "fsdp=8", "tensor=8", "data=2,fsdp=2,tensor=2"]
# The model has eight heads, and eight devices divide its sizes.
WIDE = LlamaConfig(384, 64, 96, 8, 2, max_seq_len=128)
INT8 = {"weights": "int8", "layerwise": True, "compute_dtype": "float32"}

Run = tuple[RunOptions, LlamaConfig, optax.GradientTransformation, jax.sharding.Mesh]


@pytest.fixture(autouse=True)
def tiny_is_wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", WIDE)


def run_of(mesh: str, devices: int = 8, **settings: Any) -> Run:
    options = RunOptions(
        out=Path("nowhere"),
        **{"batch": 8, "seq": 16, "steps": STEPS, "mesh": mesh, **settings},
    )
    config = setup.model_config(options)
    options = with_defaults(options, config)
    mesh_of_run = setup.mesh_of(options, config, jax.devices()[:devices])
    return options, config, make_optimizer(options, config)[0], mesh_of_run


def trained(run: Run, steps: int = STEPS) -> tuple[TrainState, list[float]]:
    """The state after some steps, and the losses."""
    options, _, _, mesh = run
    state, step = setup.initial_state(*run), setup.training_step(*run)
    losses = []
    for number in range(1, steps + 1):
        # Batches have only a few of the tokens, which the model learns fast.
        rows = np.random.default_rng(number).integers(
            0, 16, (options.batch, 17), np.int32
        )
        state, metrics = step(
            state, Batch(jax.device_put(rows, over_data(mesh))), number
        )
        losses.append(float(metrics.loss))
    return state, losses


@pytest.fixture(scope="module")
def on_one_device() -> list[float]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", WIDE)
        return trained(run_of("data=1", optimizer="apollo"))[1]


# The default test has all axes at once. Each axis alone is a slow test.
@pytest.mark.parametrize(
    "mesh",
    [
        "data=2,fsdp=2,tensor=2",
        *(
            pytest.param(mesh, marks=pytest.mark.slow)
            for mesh in ("data=8", "fsdp=8", "tensor=8")
        ),
    ],
)
def test_any_mesh_trains_as_one_device(mesh: str, on_one_device: list[float]) -> None:
    run = run_of(mesh, optimizer="apollo")
    state, losses = trained(run)
    assert (
        on_one_device[-1] < on_one_device[0] - 1
    )  # The loss falls, so that other states would have other losses.
    np.testing.assert_allclose(losses, on_one_device, rtol=1e-5)
    for leaf, expected in zip(
        jax.tree.leaves(state), jax.tree.leaves(setup.abstract_state(*run)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(expected.sharding, leaf.ndim)


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(INT8, marks=pytest.mark.slow),  # This is the layer-wise step, too.
        pytest.param(
            {
                "layerwise": True,
                "optimizer": "muon",
                "embeddings": "adafactor-momentum",
                "head": "flattening",
            },
            marks=pytest.mark.slow,
        ),
        {
            "optimizer": "lion",
            "accumulate": 2,
            "batch": 16,
            "embeddings": "racs",
            "head": "scale",
        },
    ],
    ids=["int8", "layer-wise", "micro-batches"],
)
def test_other_steps_on_a_mesh(settings: dict[str, Any]) -> None:
    mesh = "data=2,fsdp=2,tensor=2"
    (_, expected), (state, losses) = (
        trained(run_of(mesh, **settings), 6) for mesh in ("data=1", mesh)
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert expected[-1] < expected[0] - 0.1
    on_device = sum(
        leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(state)
    )
    assert on_device < 0.35 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads_on_a_mesh(
    model_type: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = dataclasses.replace(WIDE, num_layers=1, model_type=model_type)
    monkeypatch.setitem(PRESETS, "tiny", shape)
    (_, expected), (state, losses) = (
        trained(run_of(mesh, optimizer="adamw"), 4) for mesh in ("data=1", "tensor=8")
    )
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    attention = state.params["layers"]["attention"]
    if model_type == "qwen2":
        # The biases of a head are on the device that has its columns.
        for name in ("q_proj", "k_proj", "v_proj"):
            bias, kernel = attention[name]["bias"], attention[name]["kernel"]
            assert bias.sharding.spec == jax.P(None, "tensor")
            assert bias.sharding.spec[-1] == kernel.sharding.spec[-1]
    else:
        assert attention["q_norm"]["scale"].sharding.is_fully_replicated


def random_state(run: Run) -> TrainState:
    """A state whose numbers all differ, for which no step need be compiled."""
    rng = np.random.default_rng(0)

    def random_like(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        numbers = rng.uniform(1, 100, leaf.shape).astype(leaf.dtype)
        return jax.device_put(numbers, leaf.sharding)

    return jax.tree.map(random_like, setup.abstract_state(*run))


@pytest.mark.parametrize(
    "settings",
    [{"optimizer": "apollo", "embeddings": "racs", "head": "scale"}, INT8],
    ids=["float32", "int8"],
)
def test_checkpoints_move_between_meshes_exactly(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """The meshes have eight devices, four or one, and shard along different axes."""
    before = saved = random_state(run_of("fsdp=8", **settings))
    for number, (mesh, devices) in enumerate(
        [("data=2,fsdp=2", 4), ("data=1", 1), ("tensor=8", 8), ("fsdp=2,tensor=2", 4)],
        start=1,
    ):
        with Checkpoints(
            tmp_path / str(number), keep=1, config={"corpus": ""}
        ) as checkpoints:
            checkpoints.save(number, saved, {})
            checkpoints.wait()
            restored = checkpoints.restore_newest(
                setup.abstract_state(*run_of(mesh, devices, **settings))
            )
        assert restored is not None
        saved = restored.state
        assert len(jax.tree.leaves(saved)[0].sharding.device_set) == devices
        jax.tree.map(np.testing.assert_array_equal, saved, before)


def test_evaluation_takes_batches_that_the_mesh_does_not_divide() -> None:
    tokens = np.random.default_rng(0).integers(0, WIDE.vocab_size, (2, 3, 17), np.int32)
    losses = []
    for mesh in ("data=1", "data=2,fsdp=2,tensor=2"):
        run = run_of(mesh)
        pieces = pieces_of(WIDE, setup.execution_of(run[0], WIDE, run[3]))
        losses.append(
            make_evaluator(pieces, Batch(tokens))(
                setup.initial_params(run[0], WIDE, run[3])
            )
        )
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def shards(tree: Any) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """The shape of each array and of its shard on a device, by path."""
    return {
        path_name(path): (leaf.shape, leaf.sharding.shard_shape(leaf.shape))
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.mark.parametrize(
    ("optimizer", "embeddings"),
    [
        *((optimizer, "adam") for optimizer in RECIPES),
        *(("apollo-mini", rule) for rule in EMBEDDING_RULES),
    ],
)
def test_state_is_sharded_as_far_as_its_sizes_allow(
    optimizer: str, embeddings: str
) -> None:
    """Each of 8 devices has 1/8 of the parameters and of the state of matrices."""
    run = run_of("fsdp=4,tensor=2", optimizer=optimizer, embeddings=embeddings)
    state = setup.abstract_state(*run)
    assert all(
        np.prod(part) * 8 == np.prod(shape)
        for name, (shape, part) in shards(state.params).items()
        if "norm" not in name
    )
    for name, (shape, part) in shards(state.opt_state).items():
        # The library shards a projection along one side only.
        if (
            np.prod(shape) >= WIDE.num_layers * WIDE.hidden_size * 8
            and "projection" not in name
        ):
            assert np.prod(part) * 8 == np.prod(shape), name


def test_the_axis_of_layers_is_never_sharded() -> None:
    for offload in (None, "weights"):
        run = run_of("fsdp=2,tensor=4", **INT8, offload=offload)
        for name, (shape, part) in shards(
            setup.abstract_state(*run).params["layers"]
        ).items():
            assert part[0] == shape[0] == WIDE.num_layers, name


def test_groups_of_int8_are_not_split() -> None:
    """The codes of a group are on the device that has their scale."""
    # In the last case, down_proj has six groups of inputs, and eight devices do not
    # divide six.
    for mesh, sizes in itertools.product(
        ("fsdp=8", "fsdp=4,tensor=2", "tensor=8"), ((512, 384), (512, 1024), (512, 768))
    ):
        config = dataclasses.replace(
            WIDE, hidden_size=sizes[0], intermediate_size=sizes[1]
        )
        options = run_of(mesh, **INT8)[0]
        on = setup.mesh_of(options, config)
        params = setup.storage_of(options, on).abstract(
            setup.abstract_params(config, setup.execution_of(options, config), on)
        )
        for name, (shape, part) in shards(params["layers"]).items():
            if "qvalue" in name:
                assert part[2:4] == shape[2:4], name
                assert np.prod(part) * 8 == np.prod(shape), name
        for kernel in params["layers"]["mlp"].values():
            codes, scale = (
                kernel["kernel"].qvalue.sharding.spec,
                kernel["kernel"].scale.sharding.spec,
            )
            assert (codes[1], codes[4]) == (scale[1], scale[2])


def sharding_of(model: str, mesh: str, name: str) -> tuple[Any, ...]:
    config, on = PRESETS[model], make_mesh(mesh)
    shapes = setup.abstract_params(config, setup.Execution(), on)
    leaves = {
        path_name(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)
    }
    return tuple(leaves[name].sharding.spec)


def test_both_axes_shard_every_parameter() -> None:
    mesh = make_mesh("fsdp=4,tensor=2")
    for config in PRESETS.values():
        shapes = setup.abstract_params(
            config, setup.Execution(), make_mesh("data=1", jax.devices()[:1])
        )
        for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
            spec = partition.spec_of(path_name(path), leaf.shape, mesh)
            kind = path_name(path).rpartition("/")[2]
            assert sorted(entry for entry in spec if entry) == {
                "scale": [],
                "bias": ["tensor"],
            }.get(kind, ["fsdp", "tensor"])
            assert len(spec) in (0, leaf.ndim)


@pytest.mark.parametrize(
    ("model", "mesh", "kernel", "spec"),
    [
        ("7b", "fsdp=8", "attention/q_proj", (None, "tensor", "fsdp")),
        ("7b", "fsdp=8", "attention/o_proj", (None, "tensor", "fsdp")),
        ("7b", "data=4,fsdp=2", "mlp/up_proj", (None, "tensor", "fsdp")),
        ("7b", "fsdp=8", "mlp/down_proj", (None, "fsdp", "tensor")),
        ("7b", "fsdp=4,tensor=2", "mlp/up_proj", (None, "fsdp", "tensor")),
        ("7b", "fsdp=4,tensor=2", "mlp/down_proj", (None, "tensor", "fsdp")),
        (
            "llama-2-70b",
            "fsdp=8",
            "attention/k_proj",
            (None, "fsdp", "tensor"),
        ),  # The shape is 8192 x 1024.
        (
            "1b",
            "fsdp=8",
            "mlp/up_proj",
            (None, "fsdp", "tensor"),
        ),  # It has 5461 columns.
        ("1b", "fsdp=8", "mlp/down_proj", (None, "tensor", "fsdp")),
    ],
)
def test_fsdp_shards_the_channels_that_it_divides(
    model: str, mesh: str, kernel: str, spec: tuple[Any, ...]
) -> None:
    assert sharding_of(model, mesh, f"layers/{kernel}/kernel") == spec


@pytest.mark.parametrize(
    ("mesh", "parts"),
    [
        ("data=2,fsdp=2,tensor=2", 2),
        pytest.param("fsdp=4,tensor=2", 4, marks=pytest.mark.slow),
        pytest.param("data=2,fsdp=4", 4, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("layerwise", [False, True])
def test_weights_are_gathered_over_fsdp_only(
    mesh: str, parts: int, layerwise: bool
) -> None:
    run = run_of(mesh, optimizer="adamw", layerwise=layerwise)
    (options, _, _, on), step = run, cast(Any, setup.training_step(*run))
    batch = jax.ShapeDtypeStruct((options.batch, 17), np.int32, sharding=over_data(on))
    program = (
        step.lower(setup.abstract_state(*run), Batch(batch), 1).compile().as_text()
    )
    layer = WIDE.hidden_size * WIDE.intermediate_size
    wholes = [
        each
        for each in collectives(program)
        if each.kind == "all-gather" and each.size >= layer // 2
    ]
    assert wholes
    assert max(each.group_size for each in wholes) == parts


@pytest.mark.parametrize(
    "optimizer", [pytest.param("apollo", marks=pytest.mark.slow), "apollo-mini"]
)
def test_the_update_sends_norms_only(optimizer: str) -> None:
    """Each device projects whole channels and sends one scalar per matrix."""
    for mesh in ("fsdp=8", "data=4,fsdp=2"):
        options, config, tx, on = run_of(mesh, optimizer=optimizer)
        state = setup.abstract_state(options, config, tx, on)

        def step(state: TrainState, grads: Any, tx: Any = tx) -> TrainState:
            updates, opt_state = tx.update(grads, state.opt_state, state.params)
            return TrainState(optax.apply_updates(state.params, updates), opt_state)

        jitted = jax.jit(
            step, donate_argnums=0, out_shardings=setup.shardings_of(state)
        )
        sent = collectives(jitted.lower(state, state.params).compile().as_text())
        assert sent
        assert {each.kind for each in sent} == {"all-reduce"}
        assert max(each.size for each in sent) <= WIDE.num_layers


@pytest.mark.parametrize(
    ("model", "mesh", "message"),
    [
        (
            "1b",
            "fsdp=4,tensor=2",
            "shards the feed-forward size of `model` 1b, 5461, over tensor=2, which ",
        ),
        (
            "llama-2-70b",
            "tensor=16",
            "shards the number of key and value heads of `model` llama-2-70b, 8, ",
        ),
        (
            "60m",
            "tensor=3",
            "shards the number of heads of `model` 60m, 8, over tensor=3, which does ",
        ),
        (
            "7b",
            "fsdp=3",
            "shards the hidden size of `model` 7b, 4096, over fsdp=3, which does not divide it; ",
        ),
    ],
)
def test_rejects_a_size_that_an_axis_does_not_divide(
    model: str, mesh: str, message: str
) -> None:
    options = RunOptions(out=Path("nowhere"), model=model, mesh=mesh, batch=12)
    with pytest.raises(UsageError) as error:
        partition.check_sizes(options, setup.model_config(options))
    assert str(error.value).startswith(f"`mesh` {mesh} {message}")
    partition.check_sizes(
        dataclasses.replace(options, mesh="data=4"), setup.model_config(options)
    )  # `data` shards no size of the model.


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        (
            "data=3",
            "`mesh` data=3 needs 3 devices, and the devices here are 8 (cpu); give data x fsdp x ",
        ),
        (
            "data=4,tensor=4",
            "`mesh` data=4,tensor=4 needs 16 devices, and the devices here are 8 (cpu); ",
        ),
        ("fsdp=2,fsdp=4", "`mesh` fsdp=2,fsdp=4 gives fsdp twice; give it once"),
        (
            "fsdp:8",
            "`mesh` fsdp:8 is malformed; give numbers above 0, as in data=2,fsdp=4",
        ),
        (
            "fsdp=0",
            "`mesh` fsdp=0 is malformed; give numbers above 0, as in data=2,fsdp=4",
        ),
        ("model=2", "`mesh` 'model' is unknown; choose one of: "),
    ],
)
def test_rejects_meshes(mesh: str, message: str) -> None:
    with pytest.raises(UsageError) as error:
        make_mesh(mesh)
    assert str(error.value).startswith(message)


def test_a_process_alone_has_the_whole_batch() -> None:
    for mesh in MESHES:
        assert batch_share(make_mesh(mesh), 8) == (0, 1)


TWO_SLICES = """
from jax.experimental import topologies
from examples.llama.mesh import make_mesh
from examples.llama.run.errors import UsageError

topology = topologies.get_topology_desc("v5e:2x2", platform="tpu", num_slices=2)
grid = make_mesh("data=4,fsdp=2", topology.devices).devices
print([sorted({device.slice_index for device in row.flat}) for row in grid])
try:
    make_mesh("fsdp=8", topology.devices)
except UsageError as error:
    print(error)
"""


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason="libtpu, the TPU compiler, is not installed",
)
def test_only_data_goes_over_slices_of_tpus() -> None:
    """The network between slices is slow, and `data` sends least."""
    process = subprocess.run(
        [sys.executable, "-c", TWO_SLICES],
        env=environment("v5e:2x2", 1),
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    slices, error = process.stdout.splitlines()[-2:]
    assert slices == "[[0], [0], [1], [1]]"
    assert "the devices here are of 2; give a multiple of 2 for data" in error

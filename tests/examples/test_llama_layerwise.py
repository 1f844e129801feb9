"""The layer-wise step of LLaMA computes the ordinary step's numbers.

The optimizers are those of the trainer.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import apollo_optax
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.model import (
    Batch,
    Execution,
    graphdef_of,
    init_params,
    pieces_of,
)
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import RunOptions
from examples.llama.step import (
    StepMetrics,
    TrainState,
    TrainStep,
    make_layerwise_train_step,
    make_train_step,
)
from tests.layerwise_models import assert_agree

STEPS = 20
OPTIMIZERS = ["apollo", "apollo-mini", "apollo-svd", "racs", "adamw", "lion", "muon"]
# New projections are drawn at steps 1, 8 and 15.
GAP = 7
# XLA for CPU leaves sums and products to a library. The order of its sums depends on
# the shape of the whole array, so sums of a stack differ from those of its layers in
# the last digit. In float32, that digit matters: Adam's first update of an embedding is
# a full step up or down, even if the gradient is nothing but a rounding error. Two runs
# of the ordinary step whose weights differ in the last digit end as far apart. The
# option is experimental. A jaxlib without it raises an error that names it.
SUMS_BY_XLA = {"xla_cpu_experimental_ynn_fusion_type": ""}


@pytest.fixture(autouse=True)
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def short_gap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draws projections more often than the trainer does; it has no option for that."""
    scale_by_apollo = functools.partial(
        apollo_optax.scale_by_apollo, update_proj_gap=GAP
    )
    monkeypatch.setattr(apollo_optax, "scale_by_apollo", scale_by_apollo)


def optimizer_of(
    name: str, config: LlamaConfig, **rules: Any
) -> optax.GradientTransformation:
    options = RunOptions(out=Path("no"), optimizer=name, steps=STEPS, **rules)
    return make_optimizer(with_defaults(options, config), config)[0]


def in_dtype(dtype: str, remat: str = "dots") -> Execution:
    return Execution(remat, dtype, dtype)


def initial_state(
    config: LlamaConfig, execution: Execution, tx: optax.GradientTransformation
) -> TrainState:
    params = init_params(config, execution, seed=0)
    return TrainState(params, jax.jit(tx.init)(params))


def tokens_of(config: LlamaConfig, steps: int = STEPS, batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(
        0, config.vocab_size, (steps, batch, 9), dtype=np.int32
    )


def trained(
    steps: Sequence[TrainStep], state: TrainState, tokens: np.ndarray
) -> tuple[TrainState, list[StepMetrics]]:
    """Takes the steps in turn, from a copy of the state, since steps donate it."""
    state, metrics = jax.tree.map(jnp.copy, state), []
    for number, step in enumerate(steps):
        state, of_step = step(state, Batch(tokens[number]), number + 1)
        metrics.append(of_step)
    return state, metrics


def summed_by_xla(step: Any, state: TrainState, tokens: np.ndarray) -> TrainStep:
    """Compiles the step so that sums in a stack equal those of its layers."""
    return step.lower(state, Batch(tokens[0]), 1).compile(compiler_options=SUMS_BY_XLA)


def assert_same_training(
    name: str,
    config: LlamaConfig,
    dtype: str,
    highest: float,
    remat: str = "dots",
    **rules: Any,
) -> None:
    tx, plain, execution = (
        optimizer_of(name, config, **rules),
        in_dtype(dtype, "none"),
        in_dtype(dtype, remat),
    )
    ordinary = make_train_step(graphdef_of(config, plain), tx)
    layerwise = make_layerwise_train_step(pieces_of(config, execution), tx)
    state, tokens = initial_state(config, plain, tx), tokens_of(config)
    if dtype == "float32":
        ordinary, layerwise = (
            summed_by_xla(step, state, tokens) for step in (ordinary, layerwise)
        )
    after_15, expected_metrics = trained([ordinary] * 15, state, tokens)
    expected, last_metrics = trained([ordinary] * 5, after_15, tokens[15:])
    actual, metrics = trained([layerwise] * STEPS, state, tokens)
    assert_agree(actual, expected, highest)
    np.testing.assert_allclose(
        [m.loss for m in metrics],
        [m.loss for m in expected_metrics + last_metrics],
        rtol=min(highest, 1e-5),
    )
    np.testing.assert_allclose(
        [m.grad_norm for m in metrics],
        [m.grad_norm for m in expected_metrics + last_metrics],
        rtol=max(highest, 1e-5),  # The ordinary step computes this norm in float32.
    )
    assert len({float(m.loss) for m in metrics}) == STEPS
    changing, _ = trained(
        [ordinary] * 5 + [layerwise] * 5 + [ordinary] * 5, state, tokens
    )
    assert_agree(changing, after_15, highest)


@pytest.mark.parametrize(
    ("name", "remat", "tied_head", "rules"),
    [
        ("apollo", "dots", True, {}),
        # The default tests have apollo-mini in test_in_float32.
        pytest.param("apollo-mini", "dots", False, {}, marks=pytest.mark.slow),
        pytest.param("apollo-svd", "dots", False, {}, marks=pytest.mark.slow),
        ("adamw", "none", False, {}),
        (
            "lion",
            "full",
            False,
            {"embeddings": "racs", "head": "scale", "weight_decay": 0.1},
        ),
        pytest.param(
            "muon",
            "dots",
            False,
            {"embeddings": "adafactor-momentum", "head": "flattening"},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_twenty_steps_also_if_the_kind_of_step_changes(
    name: str, remat: str, tied_head: bool, rules: dict[str, Any], small: LlamaConfig
) -> None:
    config = dataclasses.replace(small, num_kv_heads=1, tied_head=tied_head)
    # The moments are in float32. A difference in the last digit of a float64 gradient
    # can therefore change the eighth digit of a moment.
    assert_same_training(name, config, "float64", 1e-6, remat, **rules)


@pytest.mark.parametrize("model_type", ["qwen2", "qwen3"])
def test_biases_and_norms_of_heads(model_type: str, small: LlamaConfig) -> None:
    # These large weights make attention far from uniform. A bias on keys has an effect
    # only through rotary embeddings. Small weights make that effect so small that
    # rounding errors decide Adam's update of the bias.
    config = dataclasses.replace(
        small, num_kv_heads=1, initializer_range=0.3, model_type=model_type
    )
    tx, execution = optimizer_of("adamw", config), in_dtype("float64")
    state, tokens = initial_state(config, execution, tx), tokens_of(config, 3)
    (expected, expected_metrics), (actual, metrics) = (
        trained([step] * 3, state, tokens)
        for step in (
            make_train_step(graphdef_of(config, execution), tx),
            make_layerwise_train_step(pieces_of(config, execution), tx),
        )
    )
    assert_agree(actual, expected, 1e-6)
    np.testing.assert_allclose(
        [m.loss for m in metrics], [m.loss for m in expected_metrics], rtol=1e-6
    )
    before, after = (x.params["layers"]["attention"] for x in (state, actual))
    (name, leaf) = ("k_norm", "scale") if model_type == "qwen3" else ("k_proj", "bias")
    assert not np.array_equal(before[name][leaf], after[name][leaf])


@pytest.mark.slow
@pytest.mark.usefixtures("fusion_emitters")
@pytest.mark.parametrize(("dtype", "highest"), [("float64", 1e-6), ("float32", 1e-4)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_tiny_model(name: str, dtype: str, highest: float) -> None:
    assert_same_training(name, PRESETS["tiny"], dtype, highest)


@pytest.mark.usefixtures("fusion_emitters")
def test_in_float32(small: LlamaConfig) -> None:
    with jax.enable_x64(False):
        assert_same_training("apollo-mini", small, "float32", 1e-4)


def test_rematerialisation_within_a_layer(small: LlamaConfig) -> None:
    """Each policy keeps less of a layer than the next; other tests check the numbers."""
    params = jax.tree.map(lambda leaf: leaf[0], init_params(small, seed=0)["layers"])
    x = jnp.zeros((2, 8, small.hidden_size), jnp.float32)

    def kept(remat: str) -> int:
        layer = pieces_of(small, in_dtype("float32", remat)).layer
        residuals = jax.eval_shape(
            lambda x: jax.linearize(lambda x: layer(params, x), x)[1], x
        )
        return sum(leaf.size for leaf in jax.tree.leaves(residuals))

    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert kept("full") < weights + 1.1 * x.size  # The weights and the layer's input.
    assert kept("full") < kept("dots") < kept("none")


def test_attention_goes_backward_after_the_gradients_of_the_mlp(
    small: LlamaConfig,
) -> None:
    """All gradients depend on a barrier, which takes those of the MLP directly."""
    params = jax.tree.map(lambda leaf: leaf[0], init_params(small, seed=0)["layers"])
    x = jnp.zeros((2, 8, small.hidden_size), jnp.float32)
    layer = pieces_of(small, in_dtype("float32", "none")).layer
    jaxpr = jax.make_jaxpr(lambda params, x: jax.vjp(layer, params, x)[1](x)[0])(
        params, x
    ).jaxpr
    (barrier,) = (
        eqn for eqn in jaxpr.eqns if eqn.primitive.name == "optimization_barrier"
    )
    names = [
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(params)
    ]
    grads = dict(zip(names, jaxpr.outvars, strict=True))
    behind = {id(var) for var in barrier.outvars}
    for eqn in jaxpr.eqns[jaxpr.eqns.index(barrier) + 1 :]:
        if any(id(var) in behind for var in eqn.invars):
            behind.update(map(id, eqn.outvars))
    assert all(id(var) in behind for var in grads.values())
    mlp = {id(var) for name, var in grads.items() if "mlp" in name}
    assert len(mlp) == 4
    assert mlp < {id(var) for var in barrier.outvars}


@pytest.mark.slow  # test_llama_mesh.py trains layer-wise on a mesh by default.
@pytest.mark.parametrize("sharded", ["fsdp", "data"])
def test_meshes(sharded: str, small: LlamaConfig) -> None:
    """Shards batches over eight devices, and weights too if `sharded` is "fsdp"."""
    mesh = jax.make_mesh((8,), ("devices",), axis_types=(AxisType.Auto,))
    execution, tx = in_dtype("float64"), optimizer_of("apollo", small)
    state, tokens = initial_state(small, execution, tx), tokens_of(small, 3, batch=8)
    layerwise = make_layerwise_train_step(pieces_of(small, execution), tx)
    expected, expected_metrics = trained([layerwise] * 3, state, tokens)

    replicated = NamedSharding(mesh, P())

    def sharding_of(leaf: jax.Array) -> NamedSharding:
        axis = next(
            (
                axis
                for axis in range(leaf.ndim - 1, -1, -1)
                if leaf.shape[axis] % 8 == 0
            ),
            None,
        )
        if sharded == "data" or axis is None:
            return replicated
        return NamedSharding(mesh, P(*[None] * axis, "devices"))

    shardings = jax.tree.map(sharding_of, state.params)
    params = jax.device_put(state.params, shardings)
    numbers = apollo_optax.dimension_numbers_by_path(
        [(r"^layers/.*/kernel$", apollo_optax.ApolloDimensionNumbers(1, 2))]
    )
    state_shardings = apollo_optax.state_sharding(
        state.opt_state, params, weight_dimension_numbers=numbers
    )
    out = (
        TrainState(shardings, state_shardings),
        StepMetrics(replicated, replicated),
    )
    on_mesh = jax.jit(layerwise, donate_argnums=0, out_shardings=out)
    sharded_state = TrainState(params, jax.device_put(state.opt_state, state_shardings))
    metrics = None
    for number, rows in enumerate(tokens):
        sharded_state, metrics = on_mesh(
            sharded_state,
            Batch(jax.device_put(rows, NamedSharding(mesh, P("devices")))),
            number + 1,
        )
    assert_agree(jax.device_get(sharded_state), jax.device_get(expected), 1e-6)
    assert metrics is not None
    np.testing.assert_allclose(metrics[:2], expected_metrics[-1][:2], rtol=1e-6)

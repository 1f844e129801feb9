"""The Python of README and docs/recipes.md runs and gives the results stated there."""

import pathlib
import re
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import apollo_optax
from apollo_optax import apollo_mini, apollo_zero, racs, static_args

pytestmark = pytest.mark.usefixtures("quick_compilation")

ROOT = pathlib.Path(__file__).parents[1]
NOT_RUN = "elif config.opt_type"  # A part of MaxText's source, in the patch of it.


def snippets(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    return [block for block in blocks if NOT_RUN not in block]


def run(page: str, text: str, **names: Any) -> dict[str, Any]:
    """Runs the snippet that contains `text`; returns its names."""
    (code,) = (each for each in snippets(page) if text in each)
    modules = {"apollo_optax": apollo_optax, "jax": jax, "jnp": jnp, "optax": optax}
    names = modules | names
    exec(compile(code, page, "exec"), names)
    return names


def params_and_grads() -> tuple[Any, Any]:
    params = {
        "embed": jnp.ones((6, 8)),
        "layers": {"kernel": jnp.ones((8, 16)), "bias": jnp.zeros(16)},
    }
    # Random signs would cancel on a gradient whose rows are all equal.
    grads = jax.tree.map(
        lambda p: jnp.linspace(1, 2, p.size).reshape(p.shape) ** 2, params
    )
    return params, grads


def test_the_rate_of_the_kernels_is_that_of_matrices_alone() -> None:
    """Leaves under Adam have the other rate, whatever their framework calls them."""
    group = run("docs/recipes.md", "def group")["group"]
    rest = (
        {"embed_tokens": {"embedding": 0}, "lm_head": {"kernel": 0}, "norm": 0}
        | {"Embed_0": {"embedding": 0}, "LayerNorm_0": {"scale": 0, "bias": 0}}
        | {"decoder": {"logits_dense": {"kernel": 0}, "decoder_norm": {"scale": 0}}}
    )
    assert set(jax.tree.leaves(group(rest))) == {"rest"}
    kernels = {"attention": {"query": {"kernel": 0}}, "wi_0": {"kernel": 0}}
    assert set(jax.tree.leaves(group(kernels))) == {"kernels"}


def test_every_snippet_is_run_here() -> None:
    assert len(snippets("README.md")) == 1
    assert len(snippets("docs/recipes.md")) == 8


def test_readmes_first_snippet_trains_and_prints_the_state(capsys: Any) -> None:
    before, grads = params_and_grads()
    after = run("README.md", "optax.adamw", params=before, grads=grads)["params"]
    assert (after["layers"]["kernel"] < before["layers"]["kernel"]).all()
    assert "layers/kernel" in capsys.readouterr().out


def test_rules_choose_the_axes_that_their_comments_name() -> None:
    tx = run("docs/recipes.md", "router/kernel")["tx"]
    params = {
        "router": {"kernel": jnp.ones((8, 4))},
        "layers": {
            "query": {"kernel": jnp.ones((3, 8, 2, 6))},
            "up": {"kernel": jnp.ones((3, 8, 16))},
        },
        "lm_head": {"kernel": jnp.ones((8, 20))},
    }
    mu = tx.init(params)[0].mu
    assert jax.tree.map(jnp.shape, mu) == {
        "router": {"kernel": (8, 4)},
        "layers": {
            "query": {"kernel": (3, 1, 2, 6)},
            "up": {"kernel": (3, 1, 16)},
        },
        "lm_head": {"kernel": (1, 20)},
    }


def test_haikus_stacked_layers_are_matrices_and_its_head_is_none() -> None:
    tx = run("docs/recipes.md", "lm_head|/(b|scale|offset)")["tx"]
    params = {
        "embed": {"embeddings": jnp.ones((20, 8))},
        "__layer_stack_no_per_layer/layer_norm": {"offset": jnp.ones((3, 8))},
        "__layer_stack_no_per_layer/linear": {
            "b": jnp.ones((3, 16)),
            "w": jnp.ones((3, 8, 16)),
        },
        "lm_head": {"b": jnp.ones(20), "w": jnp.ones((8, 20))},
    }
    mu = tx.init(params)[0].mu
    under_adam = jax.tree.map(
        lambda leaf, moment: leaf.shape == moment.shape, params, mu
    )
    assert not under_adam["__layer_stack_no_per_layer/linear"].pop("w")
    assert jax.tree.all(under_adam)


@pytest.mark.parametrize(
    ("text", "kernel_state"),
    [("apollo_optax.racs(1e-3", 8 + 16 + 1), ("scale_by_factored_rms", 0)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_embedding_and_head_have_no_moments(
    text: str, kernel_state: int, dtype: str
) -> None:
    """The numbers of their state are in float32 whatever the parameters' dtype."""
    tx = run("docs/recipes.md", text)["tx"]
    params = {
        "embed": {"embedding": jnp.ones((20, 8), dtype)},
        "layers": {"kernel": jnp.ones((8, 16), dtype)},
        "lm_head": {"kernel": jnp.ones((8, 20), dtype)},
    }
    size = apollo_optax.state_bytes(tx, params)
    # These are the factors, and a momentum in int8 with its scales.
    momentum = 2 * (8 * 20 + 4 * (8 + 20)) if "factored" in text else 0
    assert size.embeddings_and_head == 4 * 2 * (8 + 20 + 1) + momentum
    assert size.kernels == 4 * kernel_state
    # Random signs would cancel on a gradient whose rows are all equal.
    grads = jax.tree.map(lambda p: p + jnp.arange(p.shape[0])[:, None], params)
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    assert jax.tree.all(jax.tree.map(lambda leaf: (leaf < 0).all(), updates))


def test_all_but_the_kernels_have_a_learning_rate_of_their_own() -> None:
    params, grads = params_and_grads()
    tx = run("docs/recipes.md", "def group")["tx"]
    params["layers"]["kernel"] = jnp.full_like(params["layers"]["kernel"], 0.04)
    updates, _ = tx.update(grads, tx.init(params), params)
    # Adam's first update is 1 in size. A kernel's update has an RMS of 1, times that of
    # its weights over 0.02.
    assert jnp.allclose(updates["embed"], -0.01, rtol=1e-3)
    assert jnp.allclose(updates["layers"]["bias"], -0.01, rtol=1e-3)
    rms = jnp.sqrt(jnp.mean(updates["layers"]["kernel"] ** 2))
    assert jnp.isclose(rms, 2 * 0.001, rtol=1e-3)


def test_the_state_is_created_where_its_shardings_say() -> None:
    mesh = jax.make_mesh((8,), ("fsdp",))
    spec = jax.sharding.NamedSharding(mesh, jax.P(None, "fsdp"))
    params = {"kernel": jax.device_put(jnp.ones((8, 16)), spec)}
    names = run(
        "docs/recipes.md", "state_sharding", tx=apollo_mini(0.01), params=params
    )
    assert names["state"][0].mu["kernel"].sharding.spec == spec.spec
    for leaf, target in zip(
        *map(jax.tree.leaves, (names["state"], names["target"])), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (target.shape, target.dtype)
        assert leaf.sharding == target.sharding


def test_the_state_without_adam_is_sharded_and_tabulated() -> None:
    names = run("docs/recipes.md", "scale_by_factored_rms")
    mesh = jax.make_mesh((8,), ("fsdp",))

    def sharded(shape: tuple[int, ...], *spec: str | None) -> jax.Array:
        sharding = jax.sharding.NamedSharding(mesh, jax.P(*spec))
        return jax.device_put(jnp.ones(shape), sharding)

    params = {
        "embed": {"embedding": sharded((64, 32), None, "fsdp")},
        "lm_head": {"kernel": sharded((32, 64), "fsdp")},
        "up": {"kernel": sharded((32, 128), "fsdp")},
        "norm": {"scale": sharded((32,))},
    }
    tx, numbers = names["tx"], names["embedding_and_head"]
    shardings = apollo_optax.state_sharding(
        jax.eval_shape(tx.init, params), params, weight_dimension_numbers=numbers
    )
    state = jax.jit(tx.init, out_shardings=shardings)(params)
    codes = {
        name: leaf.sharding.spec
        for leaf, name in zip(
            *map(jax.tree.leaves, (state, apollo_optax.state_owners(state, params))),
            strict=True,
        )
        if leaf.dtype == jnp.int8
    }
    assert codes == {
        "embed/embedding": jax.P(None, "fsdp"),
        "lm_head/kernel": jax.P("fsdp"),
    }
    table = apollo_optax.tabulate(tx, params, weight_dimension_numbers=numbers)
    assert "lm_head/kernel" in table


def test_hyperparameters_change_while_training() -> None:
    params, grads = params_and_grads()
    schedule = optax.linear_schedule(0.1, 0.0, 10)
    tx = run("docs/recipes.md", "inject_hyperparams", schedule=schedule)["tx"]
    state = tx.init(params)
    assert state.hyperparams["learning_rate"] == pytest.approx(0.1)
    for rate in (0.1, 0.09, 0.08):
        _, state = tx.update(grads, state, params)
        assert state.hyperparams["learning_rate"] == pytest.approx(rate)


@pytest.mark.parametrize("optimizer", [apollo_mini, apollo_zero, racs])
def test_injected_rates_give_the_updates_of_fixed_ones(optimizer: Any) -> None:
    injected = optax.inject_hyperparams(optimizer, static_args=static_args(optimizer))
    params, grads = params_and_grads()
    tx, fixed = injected(learning_rate=0.01), optimizer(0.01)
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = fixed.update(grads, fixed.init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-3)


def test_a_model_is_trained_a_layer_at_a_time() -> None:
    params = {
        "embed": jnp.ones((6, 8)),
        "layers": {"kernel": jnp.full((3, 8, 8), 0.1)},
    }

    def head(params: Any, x: jax.Array, batch: jax.Array) -> jax.Array:
        return jnp.mean((x - params["embed"].mean()) ** 2)

    before = jax.tree.map(jnp.copy, params)  # The step donates the parameters.
    names = run(
        "docs/recipes.md",
        "layerwise_step",
        tx=apollo_mini(
            0.01,
            weight_dimension_numbers={
                "embed": None,
                "layers": {"kernel": apollo_optax.ApolloDimensionNumbers(1, 2)},
            },
        ),
        params=params,
        batch=jnp.zeros(4, jnp.int32),
        embed=lambda params, batch: params["embed"][batch],
        layer=lambda layer, x, batch, constants: jnp.tanh(x @ layer["kernel"]),
        head=head,
        key=jax.random.key(0),
        number=1,
    )
    after, metrics, state = (names[name] for name in ("params", "metrics", "state"))
    assert jnp.isfinite(metrics.loss)
    assert int(state[0].count) == 1
    for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True):
        assert not np.allclose(old, new)


def test_a_small_weight_decay_survives_in_bfloat16() -> None:
    tx = run("docs/faq.md", "to_float32")["tx"]
    decay = {"kernel": jnp.full((64, 128), 0.02, jnp.bfloat16)}
    nothing = {"kernel": jnp.zeros((64, 128), jnp.bfloat16)}
    grads = {"kernel": jax.random.normal(jax.random.key(0), (64, 128), jnp.bfloat16)}
    with_decay, _ = tx.update(grads, tx.init(decay), decay)
    without, _ = tx.update(grads, tx.init(decay), nothing)
    change = np.asarray(with_decay["kernel"] - without["kernel"])
    np.testing.assert_allclose(change, -0.01 * 0.01 * 0.02, rtol=0.05)

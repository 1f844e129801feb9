import dataclasses
import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

import apollo_optax
from apollo_optax import StateBytes, state_bytes, tabulate
from examples.llama.config import LlamaConfig
from examples.llama.model import Execution, Params, init_params
from examples.llama.optimizers.embeddings import EMBEDDING_RULES, with_embedding_rules
from examples.llama.optimizers.parameters import dimension_numbers, lr_group, path_name
from examples.llama.optimizers.pipeline import make_optimizer, make_schedule
from examples.llama.optimizers.recipes import RECIPES, options_of_each, with_defaults
from examples.llama.optimizers.wrappers import clip_by_global_norm
from examples.llama.options import RunOptions, TuningOptions, differing_fields
from examples.llama.run.errors import UsageError
from tests.test_int8_trace import stored

SMALL = LlamaConfig(384, 16, 24, 2, 3)
KERNELS = 3 * (
    4 * 16 * 16 + 3 * 16 * 24
)  # Elements in the layers' kernels of the small model.
TABLES = 2 * 384 * 16  # In the embeddings and the head.
NORMS = 7 * 16


def options_for(optimizer: str, **changes: Any) -> RunOptions:
    return with_defaults(
        RunOptions(out=Path("unused"), optimizer=optimizer, **changes), SMALL
    )


@pytest.fixture(scope="module")
def params() -> Params:
    return init_params(SMALL, seed=0)


def moments(
    options: RunOptions, config: LlamaConfig, params: Params
) -> dict[str, set[Any]]:
    """Returns the shapes of the leaves of the state that belong to each parameter."""
    tx, _ = make_optimizer(options, config)
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    shapes: dict[str, set[Any]] = {name: set() for name in names}
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        jax.eval_shape(tx.init, params)
    ):
        for name in names:
            if f"/{name}/" in f"/{path_name(path)}/":
                shapes[name].add(leaf.shape)
    return shapes


def test_adamw_keeps_two_moments_of_everything(
    small: LlamaConfig, params: Params
) -> None:
    tx, _ = make_optimizer(options_for("adamw"), small)
    size = state_bytes(tx, params)
    assert size.kernels == 8 * KERNELS
    assert size.embeddings_and_head == 8 * TABLES
    assert 8 * NORMS <= size.other < 8 * NORMS + 100


@pytest.mark.parametrize("name", ["apollo", "apollo-mini", "apollo-svd"])
def test_apollo_projects_the_kernels_and_nothing_else(
    name: str, small: LlamaConfig, params: Params
) -> None:
    rank = 1 if name == "apollo-mini" else 4
    shapes = moments(options_for(name), small, params)
    assert (3, rank, 24) in shapes["layers/mlp/gate_proj/kernel"]
    assert (3, rank, 24) in shapes["layers/mlp/down_proj/kernel"]
    assert (3, rank, 16) in shapes["layers/attention/q_proj/kernel"]
    assert (3, 16, 24) not in shapes["layers/mlp/gate_proj/kernel"]
    assert shapes["embed/embedding"] - {()} == {(384, 16)}
    assert shapes["lm_head/kernel"] - {()} == {(16, 384)}
    assert shapes["layers/mlp_norm/scale"] - {()} == {(3, 16)}


def test_comparisons_leave_embeddings_of_other_optimizers_to_adam() -> None:
    names = ("apollo-mini", "adamw", "apollo-zero", "apollo-zero-momentum")
    run = RunOptions(out=Path("unused"), embeddings="apollo", head="scale")
    runs = options_of_each(names, run, SMALL)
    assert [each.optimizer for each in runs] == list(names)
    assert [each.embeddings for each in runs] == ["apollo", "adam", "adam", "adam"]
    assert {each.head for each in runs} == {"scale"}
    with pytest.raises(UsageError, match="`embeddings` apollo means nothing to adamw,"):
        options_of_each(names[1:], run, SMALL)


def test_embeddings_and_head_can_be_given_to_apollo(
    small: LlamaConfig, params: Params
) -> None:
    shapes = moments(options_for("apollo-mini", embeddings="apollo"), small, params)
    assert (1, 384) in shapes["embed/embedding"]
    assert (384, 16) not in shapes["embed/embedding"]
    assert (1, 384) in shapes["lm_head/kernel"]
    assert (16, 384) not in shapes["lm_head/kernel"]


def test_state_bytes_tell_the_groups_apart(small: LlamaConfig, params: Params) -> None:
    def size(name: str, **changes: Any) -> StateBytes:
        return state_bytes(
            make_optimizer(options_for(name, **changes), small)[0], params
        )

    adamw, apollo, mini = size("adamw"), size("apollo"), size("apollo-mini")
    assert mini.kernels < apollo.kernels < adamw.kernels
    for apollos in (mini, apollo):  # The rule may add a scalar to Adam's moments.
        assert 0 <= apollos.embeddings_and_head - adamw.embeddings_and_head <= 8
    assert (
        size("apollo-mini", embeddings="apollo").embeddings_and_head
        < mini.embeddings_and_head / 4
    )
    half = size("apollo-mini", moment_dtype="bfloat16")
    assert half.embeddings_and_head == pytest.approx(
        mini.embeddings_and_head / 2, rel=0.01
    )
    assert size("apollo-mini", rank=8).kernels > mini.kernels
    # The projections of GaLore are float32.
    galore, narrow = size("galore"), size("galore", moment_dtype="bfloat16")
    assert galore.kernels / 2 < narrow.kernels < 0.9 * galore.kernels


@pytest.mark.parametrize("name", RECIPES)
def test_learning_rates_reach_their_groups(
    name: str, small: LlamaConfig, params: Params
) -> None:
    grads = jax.tree.map(
        lambda leaf: jnp.cos(jnp.arange(leaf.size)).reshape(leaf.shape), params
    )

    options = dataclasses.replace(options_for(name), steps=10)

    def updates(**rates: float) -> dict[str, np.ndarray]:
        tx, _ = make_optimizer(dataclasses.replace(options, **rates), small)
        state = tx.init(params)
        _, state = tx.update(
            grads, state, params
        )  # The learning rate of the first warm-up step is 0.
        update, _ = tx.update(grads, state, params)
        leaves = jax.tree_util.tree_leaves_with_path(update)
        return {path_name(path): np.asarray(leaf) for path, leaf in leaves}

    base = updates(lr=1.0, lr_embeddings=1.0)
    changed = updates(lr=2.0, lr_embeddings=3.0)
    for path, update in base.items():
        factor = 2.0 if "layers" in path and path.endswith("kernel") else 3.0
        assert np.abs(update).max() > 0
        np.testing.assert_allclose(changed[path], factor * update, rtol=1e-5)


# The same optimizers in Optax. With a learning rate of 1, their updates have the
# opposite sign.
ALIASES: dict[str, optax.GradientTransformation] = {
    "adamw": optax.adamw(1.0, weight_decay=0.0),
    "galore": optax.contrib.galore(1.0, 32, scale=0.25),
    "muon": optax.contrib.muon(1.0),
    "adafactor": optax.adafactor(1.0),
    "lion": optax.lion(1.0, weight_decay=0.0),
    "sgd": optax.sgd(1.0),
}


@pytest.mark.parametrize("name", ALIASES)
def test_kernels_get_optaxs_optimizer_of_the_name_and_the_rest_gets_adam(
    name: str,
) -> None:
    config = LlamaConfig(
        64, 128, 160, 2, 2
    )  # The sides are long enough for Adafactor to factor its moments.
    params = init_params(config, seed=0)
    options = with_defaults(RunOptions(out=Path("unused"), optimizer=name), config)
    scaler, adam = RECIPES[name].scaler(options, config), optax.adam(1.0)
    update, adam_update = jax.jit(scaler.update), jax.jit(adam.update)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"]
    layer_states = [ALIASES[name].init(layer) for layer in kernel]
    state, adam_state = scaler.init(params), adam.init(params)
    for seed in range(3):
        grads = gradients(params, seed)
        updates, state = update(grads, state, params)
        adam_updates, adam_state = adam_update(grads, adam_state)
        for path in (
            ("embed", "embedding"),
            ("lm_head", "kernel"),
            ("final_norm", "scale"),
        ):
            ours, adams = updates[path[0]][path[1]], adam_updates[path[0]][path[1]]
            np.testing.assert_allclose(ours, -adams, rtol=1e-4, atol=1e-6)
        ours_LxDxF = updates["layers"]["mlp"]["up_proj"]["kernel"]
        grads_LxDxF = grads["layers"]["mlp"]["up_proj"]["kernel"]
        for layer in range(config.num_layers):
            theirs, layer_states[layer] = ALIASES[name].update(
                grads_LxDxF[layer], layer_states[layer], kernel[layer]
            )
            np.testing.assert_allclose(ours_LxDxF[layer], -theirs, rtol=1e-3, atol=1e-5)


def rms(x: np.ndarray, axis: int) -> np.ndarray:
    return np.sqrt(np.mean(np.square(x), axis, keepdims=True))


def sinkgd(gradient: np.ndarray) -> np.ndarray:
    for _ in range(5):
        gradient = gradient / rms(gradient, 1)
        gradient = gradient / rms(gradient, 0)
    return gradient


def swan(gradient: np.ndarray) -> np.ndarray:
    standardized = (gradient - gradient.mean(0)) / gradient.std(0)
    left, _, right = np.linalg.svd(standardized, full_matrices=False)
    return left @ right * np.linalg.norm(standardized) / np.sqrt(min(gradient.shape))


# The update of a kernel (in, out) by the formula of the paper, and the largest error.
STATELESS: dict[str, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    "sinkgd": (sinkgd, 1e-5),
    "scale-hidden": (lambda gradient: gradient / rms(gradient, 0), 1e-5),
    # Five of Muon's steps bring singular values to between 0.7 and 1.2.
    "swan": (swan, 0.35),
}


@pytest.mark.parametrize("name", STATELESS)
def test_kernels_get_the_rules_of_papers_without_state(
    name: str, small: LlamaConfig, params: Params
) -> None:
    scaler = RECIPES[name].scaler(options_for(name), small)
    grads = gradients(params, 0)
    state = scaler.init(params)
    kernels = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim == 3]
    assert not kernels
    updates, _ = jax.jit(scaler.update)(grads, state, params)
    rule, error = STATELESS[name]
    for matrix in ("up_proj", "down_proj"):
        ours_LxIxO = np.asarray(updates["layers"]["mlp"][matrix]["kernel"])
        for ours, gradient in zip(
            ours_LxIxO, grads["layers"]["mlp"][matrix]["kernel"], strict=True
        ):
            expected = rule(np.asarray(gradient, np.float64))
            difference = np.linalg.norm(ours - expected) / np.linalg.norm(expected)
            assert difference < error


@pytest.mark.parametrize("name", STATELESS)
def test_a_kernel_without_gradient_gets_no_update_from_a_rule_without_state(
    name: str, small: LlamaConfig, params: Params
) -> None:
    scaler = RECIPES[name].scaler(options_for(name), small)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = jax.jit(scaler.update)(zeros, scaler.init(params), params)
    assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(updates))


@pytest.mark.parametrize("name", RECIPES)
def test_no_state_of_bfloat16_parameters_is_in_bfloat16(
    name: str, small: LlamaConfig
) -> None:
    scaler = RECIPES[name].scaler(options_for(name), small)
    params = init_params(small, Execution(param_dtype="bfloat16"), seed=0)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}

    def states(params: Params) -> Any:
        before = scaler.init(params)
        return before, scaler.update(params, before, params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(states, params))
    assert all(leaf.dtype != jnp.bfloat16 for leaf in leaves)


@pytest.mark.parametrize(
    "name",
    [
        name
        if name in ("adamw", "apollo-mini")
        else pytest.param(name, marks=pytest.mark.slow)
        for name in RECIPES
    ],
)
def test_bfloat16_parameters_get_the_updates_of_float32_ones(
    name: str, small: LlamaConfig
) -> None:
    """Gradients shrink. A bfloat16 second moment would not forget the large ones."""
    options = options_for(name)
    wide = init_params(small, seed=0)
    params = {
        dtype: jax.tree.map(lambda x, d=dtype: x.astype(d), wide)
        for dtype in ("float32", "bfloat16")
    }
    scaler = RECIPES[name].scaler(options, small)
    sizes = {}
    draws = gradients(wide, 0)
    for dtype, of_dtype in params.items():

        def steps(carry: Any, scale: jax.Array, of_dtype: Any = of_dtype) -> Any:
            state, _ = carry
            grads = jax.tree.map(
                lambda g, p: (g * scale).astype(p.dtype), draws, of_dtype
            )
            updates, state = scaler.update(grads, state, of_dtype)
            return (
                state,
                jax.tree.map(lambda u: jnp.linalg.norm(u.astype(jnp.float32)), updates),
            ), None

        scales = jnp.concatenate([jnp.ones(30), jnp.full(3000, 0.01)])
        zeros = jax.tree.map(lambda _: jnp.zeros(()), of_dtype)
        (state, norms), _ = jax.jit(lambda c, s: jax.lax.scan(steps, c, s))(
            (scaler.init(of_dtype), zeros), scales
        )
        assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(state))
        sizes[dtype] = norms
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05),
        sizes["bfloat16"],
        sizes["float32"],
    )


def gradients(params: Params, seed: int) -> Params:
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    return jax.tree.unflatten(
        structure,
        [
            jax.random.normal(k, leaf.shape, leaf.dtype)
            for k, leaf in zip(keys, leaves, strict=True)
        ],
    )


def test_groups() -> None:
    assert lr_group("layers/mlp/up_proj/kernel") == "kernels"
    for path in ("lm_head/kernel", "embed/embedding", "layers/mlp_norm/scale"):
        assert lr_group(path) == "rest"


def test_schedule_warms_up_over_a_tenth_and_ends_at_a_tenth() -> None:
    schedule = make_schedule(0.5, 100, 10)
    rates = [float(np.asarray(schedule(step))) for step in (0, 5, 10, 55, 100)]
    assert rates == pytest.approx([0, 0.25, 0.5, 0.275, 0.05])
    assert np.isfinite(np.asarray(make_schedule(0.5, 1, 1)(0)))


@pytest.mark.parametrize("shape", ["cosine", "linear"])
def test_schedule_without_a_warmup_begins_at_the_peak(shape: str) -> None:
    schedule = make_schedule(0.5, 100, 0, shape)
    rates = [float(np.asarray(schedule(step))) for step in (0, 50, 100)]
    assert rates == pytest.approx([0.5, 0.275, 0.05])


def test_defaults_come_from_the_recipe_unless_set() -> None:
    mini = options_for("apollo-mini")
    assert (mini.rank, mini.scale) == (1, 128.0)
    assert (mini.lr, mini.lr_embeddings) == RECIPES["apollo-mini"][1:3]
    assert options_for("apollo").rank == 4
    assert options_for("apollo", rank=2, lr=0.5).rank == 2
    assert options_for("apollo", rank=2, lr=0.5).lr == 0.5
    assert options_for("adamw").rank is None


def second_updates_of(
    optimizer: str, params: Params, small: LlamaConfig, *variants: dict[str, Any]
) -> list[Any]:
    """Returns the second update of the whole pipeline, by options.

    The first gradients are random, and the second ones are random and ten times larger.
    """
    txs = [
        make_optimizer(options_for(optimizer, steps=10, **options), small)[0]
        for options in variants
    ]

    def second_update(tx: optax.GradientTransformation, first: Any, second: Any) -> Any:
        _, state = tx.update(first, tx.init(params), params)
        return tx.update(second, state, params)[0]

    second = jax.tree.map(lambda g: 10 * g, gradients(params, 2))
    return jax.jit(lambda *grads: [second_update(tx, *grads) for tx in txs])(
        gradients(params, 1), second
    )


@pytest.mark.parametrize(
    ("name", "factory"),
    [
        ("apollo", "scale_by_apollo"),
        ("apollo-mini", "scale_by_apollo"),
        ("apollo-svd", "scale_by_apollo"),
        ("apollo-zero", "scale_by_flattening"),
        ("apollo-zero-whitening", "scale_by_flattening"),
        ("apollo-zero-momentum", "scale_by_flattening"),
        ("racs", "scale_by_racs"),
    ],
)
def test_the_librarys_optimizers_are_made_with_the_decay_of_second_moments(
    name: str, factory: str, small: LlamaConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    decays: list[float] = []

    def stub(*_: Any, b2: float, **others: Any) -> None:
        decays.append(b2)

    monkeypatch.setattr(apollo_optax, factory, stub)
    for b2 in (None, 0.95):
        RECIPES[name].scaler(options_for(name, b2=b2), small)
    assert decays == [0.999, 0.95]


WITH_SECOND_MOMENTS = {"adamw", "apollo", "apollo-mini", "apollo-svd", "galore"}


@pytest.mark.slow  # The tests above and below are the quick ones of this.
@pytest.mark.parametrize("name", RECIPES)
def test_the_decay_of_second_moments_reaches_embeddings_and_kernels_that_have_them(
    name: str, small: LlamaConfig, params: Params
) -> None:
    default, other = second_updates_of(name, params, small, {}, {"b2": 0.9})
    changes = jax.tree.map(
        lambda a, b: jnp.linalg.norm(a - b) / jnp.linalg.norm(a), default, other
    )
    for path, change in jax.tree_util.tree_leaves_with_path(changes):
        if lr_group(path_name(path)) == "rest" or name in WITH_SECOND_MOMENTS:
            assert float(change) > 0.01
        else:
            assert float(change) == 0


def test_adamw_has_the_second_moments_that_its_decay_makes(
    small: LlamaConfig, params: Params
) -> None:
    (update,) = second_updates_of("adamw", params, small, {"b2": 0.5})
    first = np.asarray(gradients(params, 1)["embed"]["embedding"])
    second = 10 * np.asarray(gradients(params, 2)["embed"]["embedding"])
    mean = (0.09 * first + 0.1 * second) / (1 - 0.9**2)
    square = (0.25 * first**2 + 0.5 * second**2) / (1 - 0.5**2)
    # At the second step of ten, the rate has risen to its peak.
    expected = -RECIPES["adamw"].lr_embeddings * mean / np.sqrt(square)
    np.testing.assert_allclose(
        update["embed"]["embedding"], expected, rtol=1e-4, atol=1e-7
    )


def test_large_gradients_are_clipped_and_small_ones_stay(
    small: LlamaConfig, params: Params
) -> None:
    norm = 10 * float(optax.tree.norm(gradients(params, 2)))
    # The update of the kernels by SGD is in proportion to the gradient.
    plain, wide, narrow = (
        updates["layers"]["mlp"]
        for updates in second_updates_of(
            "sgd",
            params,
            small,
            {},
            {"clip_norm": 2 * norm},
            {"clip_norm": norm / 4},
        )
    )
    jax.tree.map(np.testing.assert_array_equal, wide, plain)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b / 4, rtol=1e-4), narrow, plain
    )


def test_clipping_sees_small_gradients_in_bfloat16() -> None:
    """In bfloat16, the squares of the small ones would be lost in the sum."""
    small = [jnp.full((), 1e-1, jnp.bfloat16)] * 1000
    gradients = [jnp.ones(1000, jnp.bfloat16), *small]
    clipped, _ = clip_by_global_norm(1.0).update(gradients, optax.EmptyState())
    norm = math.sqrt(1000 + 10)
    assert float(clipped[0][0]) == pytest.approx(1 / norm, rel=2e-3)
    assert clipped[0].dtype == jnp.bfloat16


def leaves_of(*trees: Any) -> Iterator[tuple[Any, ...]]:
    """Yields the path of each parameter, and its value in each tree."""
    for path, _ in jax.tree_util.tree_leaves_with_path(trees[0]):
        values = (
            np.asarray(functools.reduce(lambda node, key: node[key.key], path, tree))
            for tree in trees
        )
        yield path_name(path), *values


def test_relative_updates_are_in_proportion_to_the_weights_of_each_kernel(
    small: LlamaConfig, params: Params
) -> None:
    plain, relative = second_updates_of("muon", params, small, {}, {"relative": True})
    for path, update, before, weights in leaves_of(relative, plain, params):
        if lr_group(path) == "kernels":
            rms = np.sqrt(np.mean(weights**2, axis=(1, 2), keepdims=True))
            before = before * rms / 0.02
        np.testing.assert_allclose(update, before, rtol=1e-5)


def test_weight_decay_shrinks_kernels_by_the_learning_rate(
    small: LlamaConfig, params: Params
) -> None:
    decay = {"weight_decay": 0.1}
    plain, decayed = second_updates_of("adamw", params, small, {}, decay)
    for path, update, before, weights in leaves_of(decayed, plain, params):
        if lr_group(path) == "kernels":
            # At the second step of ten, the rate has risen to its peak.
            before = before - RECIPES["adamw"].lr * 0.1 * weights
        np.testing.assert_allclose(update, before, rtol=1e-5)


def test_weight_decay_is_not_lost_in_bfloat16(
    small: LlamaConfig, params: Params
) -> None:
    narrow = optax.tree.cast(params, jnp.bfloat16)
    # A product with a power of two is exact.
    rate = {"lr": 2.0**-9}
    plain, decayed = second_updates_of(
        "apollo-zero", narrow, small, rate, rate | {"weight_decay": 0.1}
    )
    for path, update, before, weights in leaves_of(decayed, plain, narrow):
        assert before.dtype == jnp.bfloat16 or lr_group(path) == "rest"
        if lr_group(path) == "kernels":
            decay = rate["lr"] * 0.1 * weights.astype(np.float32)
            expected = before.astype(np.float32) - decay
            np.testing.assert_allclose(update, expected, rtol=1e-6, atol=1e-9)


def test_by_default_the_state_is_as_in_earlier_checkpoints(
    small: LlamaConfig, params: Params
) -> None:
    tx, _ = make_optimizer(options_for("adamw"), small)
    assert len(jax.eval_shape(tx.init, params)) == 2


def description(
    config: LlamaConfig, options: RunOptions, began: dict[str, Any] | None
) -> dict[str, Any]:
    """Returns a run that resumes one with the description `began`, or a new one."""
    run = with_defaults(options.as_begun(began), config)
    return run.as_run() | {"corpus": "key"}


@pytest.mark.parametrize(
    ("optimizer", "new"),
    [("apollo-mini", "rademacher"), ("apollo-svd", "random"), ("adamw", "random")],
)
def test_a_resumed_run_keeps_its_projection(
    optimizer: str, new: str, small: LlamaConfig
) -> None:
    options = RunOptions(out=Path("run"), optimizer=optimizer)
    resolved = functools.partial(description, small)
    fresh = resolved(options, None)
    assert fresh["projection"] == new
    # Runs that are older than the option drew normal entries.
    before = {k: v for k, v in fresh.items() if k != "projection"}
    for began in (fresh, before, before | {"projection": "random"}):
        resumed = resolved(options, began)
        assert resumed["projection"] == began.get("projection", "random")
        assert not differing_fields(resumed, began)
    if optimizer == "apollo-mini":
        asked = dataclasses.replace(options, projection="rademacher")
        (difference,) = differing_fields(resolved(asked, before), before)
        assert difference == "projection: random -> rademacher"


@pytest.mark.parametrize(
    ("optimizer", "new"),
    [("apollo-zero", True), ("apollo-zero-momentum", True), ("apollo-mini", False)],
)
def test_a_resumed_run_keeps_whether_its_updates_are_relative(
    optimizer: str, new: bool, small: LlamaConfig
) -> None:
    options = RunOptions(out=Path("run"), optimizer=optimizer)
    resolved = functools.partial(description, small)
    fresh = resolved(options, None)
    assert fresh["relative"] is new
    before = {k: v for k, v in fresh.items() if k != "relative"}
    for began in (fresh, before, before | {"relative": False}):
        resumed = resolved(options, began)
        assert resumed["relative"] is began.get("relative", False)
        assert not differing_fields(resumed, began)
    asked = dataclasses.replace(options, relative=True)
    (difference,) = differing_fields(resolved(asked, before), before)
    assert difference == "relative: False -> True"


def test_updates_are_not_relative_by_default_in_fine_tuning(
    small: LlamaConfig,
) -> None:
    options = TuningOptions(out=Path("run"), optimizer="apollo-zero")
    assert with_defaults(options, small).relative is False
    asked = dataclasses.replace(options, relative=True)
    assert with_defaults(asked, small).relative


def test_adafactor_has_such_factors_of_its_own() -> None:
    assert options_for("adafactor", relative=False).relative is False
    with pytest.raises(UsageError, match="`relative` True means nothing to"):
        options_for("adafactor", relative=True)


def test_unknown_optimizer_lists_the_nearest_first() -> None:
    with pytest.raises(UsageError, match="'apolo' is unknown; choose one of: apollo, "):
        options_for("apolo")


RULES = ("scale", "adafactor", "adafactor-momentum", "racs", "flattening")
FACTORS: set[tuple[int, ...]] = {(384,), (16,)}
EMBEDDING_SHAPES: dict[str, set[tuple[int, ...]]] = {
    "scale": set(),
    "adafactor": FACTORS | {(1,)},
    "adafactor-momentum": FACTORS | {(1,), (384, 16)},
    "racs": FACTORS,
    "flattening": set(),
}
# Only the head has momentum in SCALE.
HEAD_SHAPES = EMBEDDING_SHAPES | {
    "scale": {(16, 384)},
    "adafactor-momentum": FACTORS | {(1,), (16, 384)},
}
ADAM_SHAPES = {"embed/embedding": {(384, 16)}, "lm_head/kernel": {(16, 384)}}


@pytest.mark.parametrize("name", RULES)
def test_rules_of_embeddings_have_no_state_but_their_own(
    name: str, small: LlamaConfig, params: Params
) -> None:
    def shapes(**rules: str) -> dict[str, set[Any]]:
        found = moments(options_for("apollo-mini", **rules), small, params)
        return {path: found[path] - {()} for path in ADAM_SHAPES}

    embedding, head = EMBEDDING_SHAPES[name], HEAD_SHAPES[name]
    both = {"embed/embedding": embedding, "lm_head/kernel": head}
    assert shapes(embeddings=name) == both
    assert shapes(embeddings=name, head="adam") == {
        **both,
        "lm_head/kernel": {(16, 384)},
    }
    assert shapes(head=name) == {**both, "embed/embedding": {(384, 16)}}
    assert shapes(embeddings="apollo", head=name) == {
        **both,
        "embed/embedding": {(1, 384)},
    }


def scale_of_head(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    momentum = 0.9 * first + second
    return momentum / rms(momentum, 0)


def adafactor(
    first: np.ndarray, second: np.ndarray, decay: float = 1 - 2**-0.8
) -> np.ndarray:
    squares = decay * first**2 + (1 - decay) * second**2
    rows, columns = squares.mean(1, keepdims=True), squares.mean(0, keepdims=True)
    update = second / np.sqrt(rows * columns / squares.mean())
    return update / max(1.0, np.sqrt(np.mean(update**2)))


def adafactor_with_momentum(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    before, _ = stored(adafactor(first, first))
    return 0.1 * (0.9 * before + adafactor(first, second))


def by_library(tx: optax.GradientTransformation) -> Callable[..., np.ndarray]:
    def rule(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        state = tx.init({"kernel": jnp.asarray(first)})
        for gradient in (first, second):
            updates, state = tx.update({"kernel": jnp.asarray(gradient)}, state)
        return np.asarray(updates["kernel"])

    return rule


# The second update of the embedding and of the head as a function of two gradients.
# "exact" is free of random projections, which depend on the parameter's name.
SECOND_UPDATES: dict[str, tuple[Callable[..., np.ndarray], ...]] = {
    "scale": (lambda first, second: second / rms(second, 0), scale_of_head),
    "adafactor": (adafactor, adafactor),
    "adafactor-momentum": (adafactor_with_momentum, adafactor_with_momentum),
    "racs": (by_library(apollo_optax.scale_by_racs()),) * 2,
}


def second_updates(config: LlamaConfig, params: Params, **changes: Any) -> Any:
    """Returns APOLLO-Mini's updates for the second of two gradients, without a rate."""
    options = options_for("apollo-mini", **changes)
    scaler = RECIPES["apollo-mini"].scaler(options, config)
    update = jax.jit(with_embedding_rules(scaler, options, config).update)
    state = with_embedding_rules(scaler, options, config).init(params)
    _, state = update(gradients(params, 1), state, params)
    return jax.tree.map(np.asarray, update(gradients(params, 2), state, params)[0])


@pytest.fixture(scope="module")
def adams(params: Params) -> Any:
    return second_updates(SMALL, params)


@pytest.mark.parametrize("name", SECOND_UPDATES)
def test_a_rule_changes_embeddings_only(
    name: str, small: LlamaConfig, params: Params, adams: Any
) -> None:
    expected = jax.tree.map(lambda leaf: leaf, adams)
    ours = second_updates(small, params, embeddings=name)
    leaves = (("embed", "embedding"), ("lm_head", "kernel"))
    for (module, leaf), rule in zip(leaves, SECOND_UPDATES[name], strict=True):
        grads = (gradients(params, seed)[module][leaf] for seed in (1, 2))
        by_rule = rule(*(np.asarray(each, np.float64) for each in grads))
        update = ours[module].pop(leaf)
        np.testing.assert_allclose(update, by_rule, rtol=1e-4, atol=1e-5)
        del expected[module][leaf]
    jax.tree.map(np.testing.assert_array_equal, ours, expected)


@pytest.mark.parametrize(("b2", "decay"), [(0.2, 0.2), (0.95, 1 - 2**-0.8)])
def test_b2_bounds_the_decay_of_adafactor(
    b2: float, decay: float, small: LlamaConfig, params: Params
) -> None:
    ours = second_updates(small, params, b2=b2, embeddings="adafactor")
    grads = (gradients(params, seed)["embed"]["embedding"] for seed in (1, 2))
    expected = adafactor(*(np.asarray(each, np.float64) for each in grads), decay)
    update = ours["embed"]["embedding"]
    np.testing.assert_allclose(update, expected, rtol=1e-4, atol=1e-5)


def test_flattened_embeddings_give_all_tokens_one_size_and_absent_ones_zeros(
    small: LlamaConfig, params: Params
) -> None:
    options = options_for("adamw", embeddings="flattening")
    tx = with_embedding_rules(RECIPES["adamw"].scaler(options, small), options, small)
    grads = gradients(params, 0)
    table = grads["embed"]["embedding"].at[100:].set(0.0)
    grads["embed"]["embedding"] = table
    updates, _ = jax.jit(tx.update)(grads, tx.init(params), params)
    ours = np.asarray(updates["embed"]["embedding"])
    assert (ours[100:] == 0).all()
    assert np.sqrt(np.mean(ours[:100] ** 2)) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("name", RULES)
def test_a_tied_embedding_is_one_leaf_with_the_rule_of_embeddings(name: str) -> None:
    tied = dataclasses.replace(SMALL, tied_head=True)
    params = jax.eval_shape(lambda: init_params(tied, seed=0))
    options = RunOptions(out=Path("unused"), embeddings=name)
    found = moments(with_defaults(options, tied), tied, params)
    assert found["embed/embedding"] - {()} == EMBEDDING_SHAPES[name]
    other = dataclasses.replace(options, head="adam")
    with pytest.raises(UsageError, match="`head` adam means nothing to a model whose"):
        with_defaults(other, tied)


@pytest.mark.parametrize(
    ("optimizer", "rules"),
    [
        *((name, ("racs", "scale")) for name in RECIPES),
        ("apollo-mini", ("flattening", "adafactor")),
    ],
)
def test_rules_of_embeddings_go_with_every_optimizer(
    optimizer: str, rules: tuple[str, str], small: LlamaConfig
) -> None:
    params = jax.eval_shape(
        lambda: init_params(small, Execution(param_dtype="bfloat16"), seed=0)
    )
    options = options_for(optimizer, embeddings=rules[0], head=rules[1])
    tx, _ = make_optimizer(options, small)
    state = jax.eval_shape(tx.init, params)
    updates, after = jax.eval_shape(tx.update, params, state, params)
    assert jax.tree.map(jnp.shape, updates) == jax.tree.map(jnp.shape, params)
    assert jax.tree.structure(after) == jax.tree.structure(state)
    assert all(leaf.dtype != jnp.bfloat16 for leaf in jax.tree.leaves(after))


@pytest.mark.parametrize(
    ("name", "treatment"),
    [
        ("scale", "no state"),
        ("adafactor", "other"),
        ("adafactor-momentum", "momentum in int8"),
        ("racs", "RACS"),
        ("flattening", "flattened"),
    ],
)
def test_rules_of_embeddings_are_tabulated(
    name: str, treatment: str, small: LlamaConfig, params: Params
) -> None:
    options = options_for("apollo-mini", embeddings=name)
    tx, _ = make_optimizer(options, small)
    numbers = dimension_numbers(options)
    table = tabulate(tx, params, weight_dimension_numbers=numbers)
    (line,) = (line for line in table.split("\n") if line.startswith("embed/"))
    assert f"  {treatment}  " in line


def test_embedding_and_head_share_the_lower_of_their_learning_rates() -> None:
    rates = {name: rule.lr for name, rule in EMBEDDING_RULES.items()}
    adam = RECIPES["adamw"].lr_embeddings
    assert options_for("adamw").lr_embeddings == adam
    for name, rate in rates.items():
        assert options_for("adamw", embeddings=name).lr_embeddings == rate
        on_head = options_for("adamw", head=name)
        assert on_head.lr_embeddings == min(rate, adam)
    mixed = options_for("adamw", embeddings="scale", head="racs")
    assert mixed.lr_embeddings == min(rates["scale"], rates["racs"])
    assert options_for("adamw", head="racs", lr_embeddings=0.5).lr_embeddings == 0.5

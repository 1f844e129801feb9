import json
import math
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import variants
from benchmarks.variants import MODELS, PARTS, VARIANTS, VariantOptions, Way
from examples.llama.config import PRESETS
from examples.llama.optimizers.recipes import RECIPES, with_defaults
from examples.llama.options import RunOptions
from examples.llama.run.errors import UsageError
from examples.llama.run.recorder import DivergedError
from examples.llama.run.setup import model_config
from tests.benchmarks.run_config import config_of

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The trainer knows the variants and their models, in these tests alone."""
    for name, recipe in VARIANTS.items():
        monkeypatch.setitem(RECIPES, name, recipe)
    for name, config in MODELS.items():
        monkeypatch.setitem(PRESETS, name, config)


def with_kernel(tree: Any, matrix: Any) -> Any:
    return tree | {"layers": {"mlp": {"up_proj": {"kernel": matrix}}}}


def params(seed: int) -> Any:
    rng = np.random.default_rng(seed)
    embedding = jnp.asarray(rng.standard_normal((5, 8)), jnp.float32)
    matrices = jnp.asarray(rng.standard_normal((2, 8, 12)), jnp.float32)
    return with_kernel({"embed": {"embedding": embedding}}, matrices)


def kernel(tree: Any) -> Any:
    return tree["layers"]["mlp"]["up_proj"]["kernel"]


def updates_of(name: str, gradients: list[Any]) -> list[Any]:
    run = RunOptions(out=Path("unused"), optimizer=name)
    config = model_config(run)
    tx = RECIPES[name].scaler(with_defaults(run, config), config)
    state, updates = tx.init(params(0)), []
    for gradient in gradients:
        update, state = tx.update(gradient, state, params(0))
        updates.append(update)
    return updates


def test_the_momentum_is_before_or_after_the_flattening_of_kernels_alone() -> None:
    gradients = [params(seed) for seed in (1, 2)]
    first, second = map(kernel, gradients)
    flat = updates_of("apollo-zero", gradients)
    averaged = kernel(updates_of("average-0.9-of-zero", gradients)[1])
    expected = (0.1 * kernel(flat[1]) + 0.09 * kernel(flat[0])) / (1 - 0.9**2)
    np.testing.assert_allclose(averaged, expected, rtol=1e-5, atol=1e-6)

    updates = updates_of("apollo-zero-momentum", gradients)
    momentum = second + 0.9 * (second + 0.9 * first)
    trees = [gradients[0], with_kernel(gradients[1], momentum)]
    expected = kernel(updates_of("apollo-zero", trees)[1])
    np.testing.assert_allclose(kernel(updates[1]), expected, rtol=1e-4, atol=1e-5)
    # The embedding has Adam in both.
    np.testing.assert_array_equal(
        updates[1]["embed"]["embedding"], flat[1]["embed"]["embedding"]
    )


def test_the_power_is_that_of_the_name() -> None:
    """At a power of 0, all singular values are equal."""
    gradients = [params(1)]

    def spectrum(name: str) -> jax.Array:
        """Returns the singular values of both matrices, over the largest of each."""
        (update,) = updates_of(name, gradients)
        values = jnp.linalg.svd(kernel(update), compute_uv=False)
        return values / values[:, :1]

    np.testing.assert_allclose(spectrum("zero-exact-0"), 1, rtol=1e-3)
    # The Newton-Schulz steps have errors of up to 17%.
    np.testing.assert_allclose(spectrum("apollo-zero-whitening"), 1, atol=0.3)
    half = spectrum("zero-exact-0.5")
    np.testing.assert_allclose(spectrum("zero-exact-0.25") ** 2, half, rtol=1e-3)
    assert half.min() < 0.7


def test_the_limit_is_that_of_the_name() -> None:
    growth = {}
    for name in ("mini-no-limit", "mini-limit-1.1", "apollo-mini"):
        first, second = updates_of(name, [params(1), params(1)])
        norms = [float(jnp.linalg.norm(kernel(each)[0])) for each in (first, second)]
        growth[name] = norms[1] / norms[0]
    # Adam's bias correction, which comes after the limiter, is the same for all. For
    # equal gradients, the norm before it grows by 0.19 / 0.1 * sqrt(0.001 / 0.001999).
    assert growth["mini-limit-1.1"] / growth["apollo-mini"] == pytest.approx(1.1 / 1.01)
    free = 1.9 * math.sqrt(0.001 / 0.001999)
    assert growth["mini-no-limit"] / growth["apollo-mini"] == pytest.approx(
        free / 1.01, rel=0.01
    )


def test_the_bound_of_relative_updates_is_that_of_the_name() -> None:
    rms = jnp.sqrt(jnp.mean(jnp.square(kernel(params(0))), (1, 2)))
    assert (rms > 0.04).all()
    gradients = [params(1)]
    (flat,) = updates_of("apollo-zero", gradients)
    (update,) = updates_of("zero-relative-max-0.04", gradients)
    # 0.02 is the RMS of weights whose updates stay as they are.
    twice = 2 * kernel(flat)
    np.testing.assert_allclose(kernel(update), twice, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(
        update["embed"]["embedding"], flat["embed"]["embedding"]
    )


def state_of(way: Way) -> tuple[int, int]:
    """Returns the bytes of state for the kernels and for the rest."""
    run = variants.run_of(VariantOptions(out=Path("unused")), way, 0)
    other = variants.other_state(run)
    return variants.all_state(run) - other, other


def test_state_in_int8_is_counted_and_a_rule_without_state_has_none() -> None:
    def state(name: str) -> int:
        return state_of(Way("", name, 1e-3, {}))[0]

    assert state("apollo-zero") < 100
    full, int8 = state("apollo-zero-momentum"), state("apollo-zero-momentum-int8")
    assert full == pytest.approx(4 * 790_528, rel=1e-3)
    assert int8 < 0.27 * full


def test_a_rule_of_an_end_replaces_adams_moments_there() -> None:
    """The embedding and the head of tiny have 2048 rows of 128 each, or share them."""
    other = {}
    for way in PARTS["embeddings"]:
        kernels, other[way.label] = state_of(way)
        assert kernels < 100
    adam = 2 * 4 * 2048 * 128
    norms = other["adam, both"] - 2 * adam
    assert 0 < norms < 20_000
    few = 4 * (2048 + 128) + 100  # A number per row and per column, and counters.
    for rule in ("adafactor", "racs", "flattening"):
        assert norms <= other[f"{rule}, both"] < norms + 2 * few
        assert adam < other[f"{rule}, embedding"] < norms + adam + few
        assert adam < other[f"{rule}, head"] < norms + adam + few
        assert norms <= other[f"{rule}, tied"] < norms + few
    assert other["adam, tied"] == pytest.approx(norms + adam, abs=100)
    momentum = adam / 2  # SCALE has one for the head alone.
    assert other["scale, both"] == pytest.approx(norms + momentum, abs=100)


def test_ways_that_differ_have_folders_of_their_own() -> None:
    options = VariantOptions()
    runs = [
        variants.run_of(options, way, seed)
        for part in PARTS.values()
        for way in part
        for seed in (0, 1)
    ]
    in_folders = {run.out: run for run in runs}
    # Two parts may have the same run.
    assert all(in_folders[run.out] == run for run in runs)
    assert all(run.resume == "auto" for run in runs)


def test_a_run_that_diverges_has_an_infinite_perplexity(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result:
        val_loss = math.log(40)

    def pretrain(run: RunOptions, stop: Any) -> Any:
        del stop
        if run.seed:
            raise DivergedError("the loss is 1e9")
        return Result

    monkeypatch.setattr(variants, "pretrain", pretrain)
    way = Way("none", "apollo-zero", 2e-3, {})
    stop: Any = None
    options = VariantOptions(seeds=(0, 1), out=tmp_path)
    assert variants.perplexities(options, way, stop) == (pytest.approx(40), math.inf)
    # It has ended, so a table of finished runs has it too.
    options = VariantOptions(seeds=(1,), out=tmp_path, finished_only=True)
    assert variants.perplexities(options, way, stop) == (math.inf,)
    options = VariantOptions(seeds=(0, 1), out=tmp_path)
    row = variants.row(options, way, (40.0, 42.0))
    assert row[:6] == ["none", "apollo-zero", "0.002", "0.03", "41.00", "1.41"]
    row = variants.row(options, way, (40.0, math.inf))
    assert row[4:6] == ["inf", ""]


@pytest.mark.parametrize(
    ("part", "tokens"),
    [
        ("momentum", "800 steps of 1,024 tokens of --data stdlib"),
        ("momentum-8k", "8,192 tokens of --data stdlib"),
        ("many-steps", "3200 steps of 1,024 tokens of --data python"),
    ],
)
def test_a_table_says_how_long_its_runs_are(
    part: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(variants, "read_result", lambda run: None)
    stop: Any = None
    options = VariantOptions(finished_only=True)
    assert f"{tokens}, seed 0\n" in variants.table(options, part, stop)
    options = VariantOptions(finished_only=True, steps=7)
    assert "7 steps of " in variants.table(options, part, stop)


def test_rows_of_runs_that_have_not_ended_can_be_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Result:
        val_loss = math.log(40)

    def read_result(run: RunOptions) -> Any:
        if (run.optimizer, run.lr) != ("apollo-zero", 4e-3):
            return None
        run.out.mkdir()
        config = {"optimizer": run.optimizer} | config_of(run.data, "2026-11-23")
        (run.out / "config.json").write_text(json.dumps(config))
        return Result

    monkeypatch.setattr(variants, "read_result", read_result)
    stop: Any = None
    options = VariantOptions(out=tmp_path, finished_only=True)
    _, made_with, _, *rows = variants.table(options, "momentum", stop).splitlines()
    assert made_with.endswith("2026-11-23")
    assert [line.split(" | ")[1:5] for line in rows[2:]] == [
        ["apollo-zero", "0.004", "0.03", "40.00"]
    ]


@pytest.mark.parametrize(
    ("options", "message"), [({"parts": ("x",)}, "--parts"), ({"seeds": ()}, "--seeds")]
)
def test_rejects_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        VariantOptions(**options)

"""Runs with weights in bfloat16, int8 and host memory, and layer-wise steps."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_optax import QuantizedArray, quantize
from examples.llama import export, pretrain
from examples.llama.config import PRESETS, LlamaConfig
from examples.llama.evaluate import make_evaluator
from examples.llama.hf.weights import load_params
from examples.llama.mesh import make_mesh
from examples.llama.model import (
    Batch,
    Execution,
    init_layer,
    init_outside_layers,
    init_params,
    pieces_of,
)
from examples.llama.optimizers.pipeline import make_optimizer
from examples.llama.optimizers.recipes import with_defaults
from examples.llama.options import RunOptions
from examples.llama.run import log as run_log
from examples.llama.run import setup
from examples.llama.run.checkpoint import Checkpoints
from examples.llama.step import TrainState
from examples.llama.storage import Storage
from examples.llama.text import loader
from examples.llama.text.windows import validation_batches
from tests.examples.test_llama_cli import (
    RESUMED,
    exits_with_message,
    interrupting,
    losses,
)

INT8 = ["--weights", "int8", "--layerwise"]


def is_quantized(leaf: Any) -> bool:
    return isinstance(leaf, QuantizedArray)


def kernels(params: Any) -> list[Any]:
    layers = params["layers"]
    return [
        layers[part][name]["kernel"]
        for part in ("attention", "mlp")
        for name in layers[part]
    ]


def assert_same_numbers(a: jax.Array, b: jax.Array) -> None:
    """Asserts equal values; scales in host memory have another dtype."""
    np.testing.assert_array_equal(np.asarray(a, np.float32), np.asarray(b, np.float32))


@pytest.mark.parametrize("execution", [Execution(), Execution(param_dtype="bfloat16")])
def test_layers_and_ends_are_drawn_as_the_whole_model_is(
    small: LlamaConfig, execution: Execution
) -> None:
    whole = init_params(small, execution, seed=3)
    layers = whole.pop("layers")
    jax.tree.map(
        np.testing.assert_array_equal,
        init_outside_layers(small, execution, seed=3),
        whole,
    )
    for index in range(small.num_layers):
        drawn = jax.jit(lambda i: init_layer(small, execution, i, seed=3))(index)
        jax.tree.map(
            np.testing.assert_array_equal,
            drawn,
            jax.tree.map(lambda x, i=index: x[i : i + 1], layers),
        )


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("int8", [False, True])
def test_storage_is_filled_a_layer_at_a_time(
    small: LlamaConfig, int8: bool, offload: bool
) -> None:
    storage = Storage(make_mesh("data=1"), int8=int8, offload=offload)
    whole = init_params(small, seed=1)
    rest = {name: leaf for name, leaf in whole.items() if name != "layers"}
    filled = storage.filled(
        jax.eval_shape(lambda: whole),
        rest,
        lambda i: jax.tree.map(lambda x: x[i : i + 1], whole["layers"]),
    )
    abstract = storage.abstract(jax.eval_shape(lambda: whole))
    assert jax.tree.structure(filled) == jax.tree.structure(abstract)
    for leaf, expected in zip(
        jax.tree.leaves(filled), jax.tree.leaves(abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (expected.shape, expected.dtype)
        assert leaf.sharding.memory_kind == (expected.sharding.memory_kind or "device")
    for kept, kernel in zip(kernels(filled), kernels(whole), strict=True):
        if int8:
            kernel = quantize(kernel, axis=-2)
            np.testing.assert_array_equal(
                kept.scale, kernel.scale.astype(kept.scale.dtype)
            )
            kept, kernel = kept.qvalue, kernel.qvalue
        assert kept.sharding.memory_kind == ("pinned_host" if offload else "device")
        np.testing.assert_array_equal(kept, kernel)
    jax.tree.map(np.testing.assert_array_equal, filled["lm_head"], whole["lm_head"])


def run_options(
    **settings: Any,
) -> tuple[RunOptions, LlamaConfig, optax.GradientTransformation]:
    options = RunOptions(out=Path("nowhere"), batch=2, seq=16, steps=20, **settings)
    config = setup.model_config(options)
    options = with_defaults(options, config)
    return options, config, make_optimizer(options, config)[0]


def stepped(options: RunOptions, config: LlamaConfig, tx: Any, steps: int = 4) -> Any:
    """The state after some steps, and the losses."""
    mesh = make_mesh("data=1")
    state = setup.initial_state(options, config, tx, mesh)
    step = setup.training_step(options, config, tx, mesh)
    seen = []
    for number in range(1, steps + 1):
        tokens = jax.random.randint(
            jax.random.key(number), (2, 17), 0, config.vocab_size
        )
        state, metrics = step(state, Batch(tokens), number)
        seen.append(float(metrics.loss))
    return state, seen


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"weights": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param({"weights": "int8"}, marks=pytest.mark.slow),
    ],
    ids=["float32", "bfloat16", "int8"],
)
@pytest.mark.usefixtures("tiny_is_small", "fusion_emitters")
def test_host_memory_changes_no_result(settings: dict[str, Any]) -> None:
    """The CPU has host memory too, though a run on a CPU does not take the option."""
    (there, there_losses), (here, here_losses) = (
        stepped(*run_options(**settings, layerwise=True, offload=offload))
        for offload in ("weights,activations", None)
    )
    assert there_losses == here_losses
    for a, b in zip(kernels(there.params), kernels(here.params), strict=True):
        code = a.qvalue if is_quantized(a) else a
        assert code.sharding.memory_kind == "pinned_host"
        jax.tree.map(assert_same_numbers, a, b)
    jax.tree.map(np.testing.assert_array_equal, there.opt_state, here.opt_state)


@pytest.mark.parametrize("offload", [None, "weights"])
@pytest.mark.usefixtures("tiny_is_small")
def test_int8_checkpoints(tmp_path: Path, offload: str | None) -> None:
    """They are restored exactly, also if scales have another dtype in memory."""
    options, config, tx = run_options(weights="int8", layerwise=True)
    params, opt_state = setup.initial_state(options, config, tx, make_mesh("data=1"))
    # A state of zeros would look the same without being restored.
    state = TrainState(params, jax.tree.map(lambda leaf: leaf + 1, opt_state))
    with Checkpoints(tmp_path, keep=1, config={"corpus": ""}) as checkpoints:
        checkpoints.save(1, state, {})
        checkpoints.wait()
        options = run_options(weights="int8", layerwise=True, offload=offload)[0]
        restored = checkpoints.restore_newest(
            setup.abstract_state(options, config, tx, make_mesh("data=1"))
        )
    assert restored is not None
    for a, b in zip(kernels(restored.state.params), kernels(state.params), strict=True):
        jax.tree.map(assert_same_numbers, a, b)
        assert a.qvalue.sharding.memory_kind == ("pinned_host" if offload else "device")
    jax.tree.map(
        np.testing.assert_array_equal, restored.state.opt_state, state.opt_state
    )


@pytest.mark.parametrize(
    "optimizer",
    [
        "apollo-mini",
        pytest.param("muon", marks=pytest.mark.slow),
        pytest.param("adafactor", marks=pytest.mark.slow),
    ],
)
def test_a_run_may_change_its_step_at_a_checkpoint(
    optimizer: str, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ["--optimizer", optimizer, *RESUMED]
    pretrain.main(["--out", str(out / "straight"), *args])
    with monkeypatch.context() as patch:
        patch.setattr(
            loader,
            "train_loader",
            interrupting(loader.train_loader, at=7, by=KeyboardInterrupt),
        )
        with pytest.raises(SystemExit):
            pretrain.main(["--out", str(out / "changed"), *args])
    pretrain.main(["--out", str(out / "changed"), *args, "--layerwise"])
    changed, straight = (losses(out / name) for name in ("changed", "straight"))
    assert [step for step, _ in changed] == [step for step, _ in straight]
    np.testing.assert_allclose(
        [loss for _, loss in changed if loss],
        [loss for _, loss in straight if loss],
        rtol=1e-5,
    )
    norms = [
        [row["grad_norm"] for row in run_log.read_metrics(out / n)]
        for n in ("changed", "straight")
    ]
    np.testing.assert_allclose(norms[0], norms[1], rtol=1e-4)


def test_an_int8_run_trains_resumes_and_is_exported(
    out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = [*INT8, *RESUMED, "--lr", "0.02", "--lr-embeddings", "0.02"]
    pretrain.main(["--out", str(out / "straight"), *args])
    with monkeypatch.context() as patch:
        patch.setattr(
            loader,
            "train_loader",
            interrupting(loader.train_loader, at=7, by=KeyboardInterrupt),
        )
        with pytest.raises(SystemExit):
            pretrain.main(["--out", str(out / "cut"), *args])
    pretrain.main(["--out", str(out / "cut"), *args])
    assert losses(out / "cut") == losses(
        out / "straight"
    )  # The draws of the rounding depend on the step's number only.
    rows = run_log.read_metrics(out / "straight")
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1

    exported = tmp_path / "exported"
    export.main(["--run", str(out / "cut"), "--to", str(exported)])
    small = PRESETS["tiny"]
    params = load_params(exported, small, "bfloat16")
    text = setup.load_corpus(RunOptions(out=out), small)
    held_out = validation_batches(text.validation, seq=16, count=128)
    computed = Execution(param_dtype="bfloat16", compute_dtype="bfloat16")
    loss = make_evaluator(pieces_of(small, computed), Batch(held_out))(params)
    assert loss == pytest.approx(rows[-1]["val_loss"], abs=1e-3)
    assert (
        json.loads((exported / "config.json").read_text())["torch_dtype"] == "bfloat16"
    )
    # The export starts another run, whose int8 weights have the same values.
    pretrain.main(
        ["--out", str(out / "tuned"), *INT8, "--init-from", str(exported), *RESUMED]
    )
    assert run_log.read_metrics(out / "tuned")[0]["loss"] == pytest.approx(
        rows[-1]["loss"], abs=0.3
    )


@pytest.mark.slow
def test_stochastic_rounding_is_a_function_of_seed_and_step(out: Path) -> None:
    args = ["--weights", "bfloat16", *RESUMED]
    for name, more in {
        "a": [],
        "b": ["--layerwise"],
        "c": ["--rounding", "nearest"],
    }.items():
        pretrain.main(["--out", str(out / name), *args, *more])
    assert losses(out / "a") == losses(out / "b")
    assert losses(out / "a") != losses(out / "c")


@pytest.mark.slow
@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.usefixtures("tiny_is_small")
def test_each_step_and_seed_rounds_anew(layerwise: bool) -> None:
    options, config, tx = run_options(weights="bfloat16", layerwise=layerwise)
    mesh = make_mesh("data=1")
    # The steps start from one state, so that they differ in nothing but the rounding.
    initial = setup.initial_state(options, config, tx, mesh)
    steps = {
        seed: setup.training_step(
            dataclasses.replace(options, seed=seed), config, tx, mesh
        )
        for seed in (0, 1)
    }
    tokens = jax.random.randint(jax.random.key(0), (2, 17), 0, config.vocab_size)

    def rounded(seed: int, number: int) -> jax.Array:
        state = jax.tree.map(jnp.copy, initial)  # The step donates its state.
        for _ in range(2):  # The learning rate of the first step is 0.
            state, _ = steps[seed](state, Batch(tokens), number)
        return kernels(state.params)[0]

    first = rounded(0, 1)
    np.testing.assert_array_equal(rounded(0, 1), first)
    for other in (rounded(0, 2), rounded(1, 1)):
        assert np.mean(np.asarray(other != first)) > 0.01


@pytest.mark.parametrize(
    ("args", "fragments"),
    [
        (["--weights", "int8"], ["--weights int8", "--layerwise"]),
        (["--weights", "int4"], ["--weights 'int4'", "int8"]),
        (["--offload", "weights"], ["--offload weights", "--layerwise"]),
        (["--layerwise", "--offload", "weight"], ["--offload 'weight'", "weights"]),
        (["--layerwise", "--offload", ""], ["--offload ''", "weights"]),
        (["--layerwise", "--offload", "weights,weights"], ["names weights twice"]),
        (["--layerwise", "--offload", "weights"], ["--offload weights", "cpu"]),
        (
            ["--layerwise", "--accumulate", "2"],
            ["--accumulate 2", "--layerwise", "--batch"],
        ),
        (["--layerwise", "--clip-norm", "1"], ["--clip-norm 1 ", "--layerwise"]),
        (["--layerwise", "--on-nonfinite", "skip"], ["--on-nonfinite skip", "limiter"]),
        (
            ["--layerwise", "--optimizer", "galore"],
            ["--layerwise", "--optimizer galore"],
        ),
        (["--rounding", "stochastic"], ["--rounding stochastic", "float32"]),
        ([*INT8, "--rounding", "nearest"], ["--rounding nearest", "int8"]),
        (["--rounding", "up"], ["--rounding 'up'", "nearest"]),
    ],
)
def test_rejects_options_in_one_line(
    args: list[str], fragments: list[str], out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = exits_with_message(pretrain.main, ["--out", str(out), *args], capsys)
    for fragment in fragments:
        assert fragment in message
    assert not out.exists()


def test_rejects_resuming_with_other_weights(
    out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pretrain.main(["--out", str(out), *RESUMED])
    message = exits_with_message(
        pretrain.main, ["--out", str(out), *RESUMED, *INT8], capsys
    )
    assert "weights: float32 -> int8" in message


def test_moments_in_bfloat16() -> None:
    _, config, tx = run_options(optimizer="adamw", moment_dtype="bfloat16")
    shapes = jax.eval_shape(
        tx.init, jax.eval_shape(lambda: init_params(config, seed=0))
    )
    moments = [leaf for leaf in jax.tree.leaves(shapes) if leaf.ndim]
    assert {leaf.dtype for leaf in moments} == {jnp.dtype("bfloat16")}

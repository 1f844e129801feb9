"""Packed sequences and weighted targets, in the ordinary and the layer-wise step."""

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from apollo_optax import layerwise_apply
from examples.llama.config import LlamaConfig
from examples.llama.evaluate import make_evaluator
from examples.llama.loss import chunked_cross_entropy
from examples.llama.mesh import device_count, make_mesh, over_data
from examples.llama.model import (
    Batch,
    graphdef_of,
    init_params,
    next_token_loss,
    pieces_of,
    positions_in_segments,
    target_weights,
)
from examples.llama.options import RunOptions
from examples.llama.run import setup

LENGTHS = (7, 5, 9)
S = 24  # The row holds the three sequences and three tokens of padding.


def drawn(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 384, shape, dtype=np.int32)


def packed(sequences: list[np.ndarray], weights: list[np.ndarray] | None) -> Batch:
    """One row with all sequences."""

    def row(parts: list[np.ndarray], dtype: Any) -> np.ndarray:
        joined = np.concatenate(parts)
        return np.pad(joined, (0, S - joined.size)).astype(dtype)[None]

    segments = [np.full(s.size, number) for number, s in enumerate(sequences, 1)]
    return Batch(
        row(sequences, np.int32),
        row(segments, np.int32),
        None if weights is None else row(weights, np.float32),
    )


def packed_rows(seed: int, rows: int) -> Batch:
    """Rows with many more targets to learn in every other row."""
    batches = []
    for number in range(rows):
        sequences = [drawn(seed + 10 * number + n, n) for n in LENGTHS]
        rng = np.random.default_rng(seed + number)
        weights = [(rng.random(n) < (0.3, 0.9)[number % 2]) * 1.0 for n in LENGTHS]
        batches.append(packed(sequences, weights))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)


@pytest.mark.parametrize("weighted", [False, True], ids=["ordinary", "layer-wise"])
def test_a_packed_batch_has_the_loss_and_gradients_of_its_sequences_alone(
    weighted: bool, small: LlamaConfig
) -> None:
    """The ordinary step has no weights of targets here, and the layer-wise one has."""
    sequences = [drawn(n, n) for n in LENGTHS]
    weights = [np.random.default_rng(n).random(n) + 0.1 for n in LENGTHS]
    pieces = pieces_of(small)
    loss = (
        layerwise_apply(pieces.embed, pieces.layer, pieces.head)
        if weighted
        else functools.partial(next_token_loss, graphdef_of(small))
    )

    def alone(parts: Any) -> np.ndarray:
        """Puts each sequence in a row, followed by padding that it does not attend to."""
        return np.stack([np.pad(part, (0, max(LENGTHS) - part.size)) for part in parts])

    ones = [np.ones(n) for n in LENGTHS]
    of_rows = alone(weights if weighted else ones).astype(np.float32)
    results = [
        jax.jit(jax.value_and_grad(loss))(init_params(small, seed=0), batch)
        for batch in (
            packed(sequences, weights if weighted else None),
            Batch(alone(sequences), None, of_rows),
        )
    ]
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-5), *results)


def test_positions_and_weights_of_segments() -> None:
    segments = np.array([[1, 1, 1, 2, 2, 3, 0, 0]])
    assert positions_in_segments(jnp.array(segments)).tolist() == [
        [0, 1, 2, 0, 1, 0, 0, 1]
    ]
    batch = Batch(segments, segments)
    assert np.asarray(target_weights(batch)).tolist() == [[1, 1, 0, 1, 0, 0, 0]]
    weighted = batch._replace(weights=np.full(segments.shape, 0.5, np.float32))
    assert np.asarray(target_weights(weighted)).tolist() == [
        [0.5, 0.5, 0, 0.5, 0, 0, 0]
    ]
    assert target_weights(Batch(segments)) is None


def test_weighted_cross_entropy_is_that_of_the_plain_one() -> None:
    with jax.enable_x64(True):
        rng = np.random.default_rng(0)
        x, head = rng.standard_normal((3, 11, 8)), rng.standard_normal((8, 37)) / 4
        targets, weights = rng.integers(0, 37, (3, 11)), rng.random((3, 11))

        def plain(x: Any, head: Any) -> jax.Array:
            losses = optax.softmax_cross_entropy_with_integer_labels(x @ head, targets)
            return jnp.sum(losses * weights) / weights.sum()

        def chunked(x: Any, head: Any) -> jax.Array:
            return chunked_cross_entropy(x, head, targets, 3, weights)

        results = [
            jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, head)
            for loss in (chunked, plain)
        ]
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-12, atol=1e-14),
            *results,
        )
        assert float(jax.jit(chunked)(x, head)) == pytest.approx(float(results[0][0]))


def test_targets_without_weight_have_no_loss_and_no_gradient() -> None:
    x, head = jnp.ones((1, 4, 2)), jnp.ones((2, 3))
    targets = jnp.zeros((1, 4), int)
    loss, grad = jax.value_and_grad(chunked_cross_entropy)(
        x, head, targets, 2, jnp.zeros((1, 4))
    )
    assert float(loss) == 0
    assert not np.asarray(grad).any()


def stepped(config: LlamaConfig, batch: Batch, **options: Any) -> Any:
    """Parameters and metrics after a step of plain gradient descent."""
    run = RunOptions(out=Path("no"), batch=4, seq=S - 1, **options)
    mesh, tx = (
        make_mesh(run.mesh, jax.devices()[: device_count(run.mesh)]),
        optax.sgd(0.1),
    )
    state = setup.initial_state(run, config, tx, mesh)
    state, metrics = setup.training_step(run, config, tx, mesh)(
        state, jax.tree.map(lambda x: jax.device_put(x, over_data(mesh)), batch), 1
    )
    return jax.device_get((state.params, metrics))


@pytest.mark.usefixtures("tiny_is_small")
def test_micro_batches_meshes_and_layers_make_the_step_of_the_batch(
    small: LlamaConfig,
) -> None:
    batch = packed_rows(0, 4)
    # A micro-batch is every other row.
    weights = target_weights(batch)
    assert weights is not None
    assert weights[1::2].sum() > 1.5 * weights[::2].sum() > 0
    expected = stepped(small, batch)
    for options in ({"accumulate": 2}, {"mesh": "data=2"}, {"layerwise": True}):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, atol=1e-6),
            stepped(small, batch, **options),
            expected,
        )


def test_evaluation_weighs_each_target_alike_over_batches(small: LlamaConfig) -> None:
    params = init_params(small, seed=0)
    rows = packed_rows(3, 4)
    batches = jax.tree.map(lambda x: x.reshape(2, 2, S), rows)
    assert make_evaluator(pieces_of(small), batches)(params) == pytest.approx(
        float(
            jax.jit(next_token_loss, static_argnums=0)(graphdef_of(small), params, rows)
        ),
        abs=1e-5,
    )

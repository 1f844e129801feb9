from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks import spectra
from benchmarks.spectra import (
    Follower,
    Rule,
    SpectraOptions,
    largest_over_median,
    over_flat,
    recorded,
    rms,
    shape_of,
    singular_values,
)
from examples.llama import config
from examples.llama.run.errors import UsageError

pytestmark = pytest.mark.usefixtures("quick_compilation")

SMALL = config.LlamaConfig(
    vocab_size=32,
    hidden_size=8,
    intermediate_size=12,
    num_heads=2,
    num_layers=3,
    max_seq_len=128,
)


def gradients(seed: int) -> Any:
    """Gradients at the paths of a model, of which two kernels are watched."""
    rng = np.random.default_rng(seed)

    def kernel(*shape: int) -> dict[str, jax.Array]:
        return {"kernel": jnp.asarray(rng.standard_normal(shape), jnp.float32)}

    return {
        "embed": {"embedding": kernel(5, 4)["kernel"]},
        "layers": {
            "attention": {"q_proj": kernel(3, 4, 4), "k_proj": kernel(3, 4, 4)},
            "mlp": {"down_proj": kernel(3, 6, 4)},
        },
    }


def test_sizes_of_known_matrices() -> None:
    matrix = np.array([[3.0, 0.0, 0.0], [0.0, -4.0, 0.0]])
    assert rms(matrix) == pytest.approx(np.sqrt(25 / 6))
    assert singular_values(matrix) == pytest.approx([4.0, 3.0])
    assert largest_over_median(np.array([1.0, 8.0, 2.0])) == 4.0


def test_a_flat_spectrum_is_1_and_a_matrix_of_rank_1_has_one_peak() -> None:
    square = np.random.default_rng(0).standard_normal((6, 6))
    orthogonal, _ = np.linalg.qr(square)
    assert over_flat(7 * orthogonal[:4]) == pytest.approx(np.ones(4))
    peak = over_flat(np.outer(np.arange(1.0, 5), np.ones(9)))
    assert peak[0] == pytest.approx(2.0)  # The square root of the smaller side.
    assert peak[1:] == pytest.approx(np.zeros(3), abs=1e-6)


def test_the_shape_of_an_update_does_not_depend_on_its_size() -> None:
    matrix = np.diag([1.0, 2.0, 8.0])
    matrix[0, 1] = 1e-9
    shape = shape_of(matrix)
    assert shape.rows == pytest.approx(4.0)
    assert shape.columns == pytest.approx(4.0)
    assert shape.largest_over_median == pytest.approx(4.0)
    assert shape.largest_over_flat == pytest.approx(8 / np.sqrt(69 / 3))
    assert shape_of(1e-6 * matrix) == pytest.approx(shape)
    tall = np.array([[3.0, 3.0, 3.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
    assert shape_of(tall).rows == pytest.approx(3.0)
    assert shape_of(tall).columns == pytest.approx(np.sqrt(11 / 10))


def test_followers_see_each_gradient_of_a_training_that_they_do_not_change() -> None:
    params = gradients(0)
    tx, alone = recorded(optax.adam(0.1)), optax.adam(0.1)
    state, alone_state = tx.init(params), alone.init(params)
    part = spectra.watched_part(params)
    follower = Follower(optax.trace(1.0), part)
    total = jax.tree.map(jnp.zeros_like, part)
    updates = None
    for seed in (1, 2, 3):
        given = gradients(seed)
        update, state = tx.update(given, state, params)
        expected, alone_state = alone.update(given, alone_state, params)
        jax.tree.map(np.testing.assert_array_equal, update, expected)
        jax.tree.map(
            np.testing.assert_array_equal, state.gradients, spectra.watched_part(given)
        )
        updates = follower.follow(state.gradients, part)
        total = jax.tree.map(jnp.add, total, state.gradients)
    # A trace that forgets nothing is the sum of all gradients.
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-6), updates, total
    )
    layers = total["layers"]
    assert set(layers) == {"attention", "mlp"}
    assert set(layers["attention"]) == {"q_proj"}


def test_the_matrices_are_those_of_the_first_and_the_last_layer() -> None:
    given = gradients(4)
    found = spectra.matrices(given)
    assert list(found) == [
        "q_proj, layer 1",
        "q_proj, layer 3",
        "down_proj, layer 1",
        "down_proj, layer 3",
    ]
    last = given["layers"]["mlp"]["down_proj"]["kernel"][2]
    np.testing.assert_array_equal(found["down_proj, layer 3"], last)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that compiles in a moment, on random tokens, with two rules."""
    monkeypatch.setitem(config.PRESETS, "tiny", SMALL)
    monkeypatch.setattr(
        spectra,
        "RULES",
        {spectra.GRADIENT: Rule("sgd"), "AdamW": Rule("adamw")},
    )

    def load_text(options: Any, shape: Any, mesh: Any) -> Any:
        del shape, mesh
        rng = np.random.default_rng(options.seed)
        batches = (rng.integers(0, 32, (2, 9)).astype(np.int32) for _ in range(3))
        return options, SimpleNamespace(batches=batches)

    monkeypatch.setattr(spectra, "load_text", load_text)


@pytest.mark.usefixtures("small")
def test_adamw_sees_the_gradients_that_are_shown() -> None:
    options = SpectraOptions(at=(1, 3))
    observed = spectra.observe(options)
    assert list(observed.updates) == [1, 3]
    first = observed.updates[1]
    for kernel, gradient in first[spectra.GRADIENT].items():
        assert rms(gradient) > 0
        # Adam's first update is the sign of the gradient, up to its epsilon.
        expected = gradient / (np.abs(gradient) + 1e-8)
        np.testing.assert_allclose(first["AdamW"][kernel], expected, rtol=1e-4)
    assert observed.sizes["AdamW"].shape == (3, 4)
    third = observed.updates[3]["AdamW"].values()
    np.testing.assert_allclose(observed.sizes["AdamW"][2], list(map(rms, third)))


def updates_of(**matrices: Any) -> Any:
    return {name: {"q_proj, layer 1": matrix} for name, matrix in matrices.items()}


def test_the_table_has_sizes_at_the_rates_of_the_trainer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(spectra, "SPECTRUM_RULES", {"adam": Rule("adamw")})
    monkeypatch.setattr(spectra, "RULES", {"adam": Rule("adamw")})
    table = spectra.spectrum_table(SpectraOptions(), updates_of(adam=np.eye(4)))
    # The rate of adamw is 2e-3, and the RMS of the identity is 0.5.
    assert table.splitlines()[-1] == (
        "| adam | 1.00 | 1.00 | 1.00 | 1.00 | 0.002 | 1.0e-03 | 0.002 |"
    )


def test_the_table_of_sizes_compares_with_the_same_rank_without_a_limit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ("rank 2, no limit", "rank 1, no limit", "rank 1, limit 3")
    monkeypatch.setattr(spectra, "SIZE_RULES", dict.fromkeys(names))
    sizes = {
        "rank 2, no limit": np.array([[8.0], [8.0]]),
        "rank 1, no limit": np.array([[1.0], [4.0], [1.0]]),
        "rank 1, limit 3": np.array([[0.5], [0.5], [0.5]]),
    }
    _, free, limited = spectra.size_table(sizes).splitlines()[-3:]
    # The mean is the cube root of 4, and the changes are plus and minus log 4.
    assert free == "| rank 1, no limit | 1.587 | 1.00 | 1.386 |"
    assert limited == "| rank 1, limit 3 | 0.500 | 0.31 | 0.000 |"


def test_the_figure_has_a_panel_for_each_kernel_and_step(tmp_path: Path) -> None:
    seen = updates_of(**{name: np.eye(3) for name in spectra.SPECTRUM_RULES})
    files = tmp_path / "one.svg", tmp_path / "other.svg"
    for file in files:
        spectra.draw({2: seen, 5: seen}, "dark", file)
    one, other = (file.read_bytes() for file in files)
    assert one.count(b'id="axes_') == 2
    assert one == other


@pytest.mark.parametrize("at", [(0, 5), (5, 5), (9, 3)])
def test_rejects_steps_out_of_order(at: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="--at"):
        SpectraOptions(at=at)

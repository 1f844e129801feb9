"""Trajectories of the authors' release; tests/data/README.md describes the arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from apollo_optax import scale_by_apollo
from benchmarks.golden import CASES, DATA, TOLERANCES, arguments, relative_error, replay


@pytest.fixture(params=["float64", "float32"])
def dtype(request):
    with jax.enable_x64(request.param == "float64"):
        yield request.param


@pytest.mark.parametrize("case", CASES)
def test_updates_are_those_of_the_release(case, dtype):
    errors, norms, state, golden = replay(case, dtype)
    tolerance = TOLERANCES[dtype]
    assert max(errors) <= tolerance
    assert relative_error(state.mu, golden["mu"]) <= tolerance
    assert relative_error(state.nu, golden["nu"]) <= tolerance
    if CASES[case]["norm_growth_limit"] is None:
        np.testing.assert_array_equal(norms, 0)
    else:
        np.testing.assert_allclose(norms, golden["norms"], rtol=tolerance)


def test_every_case_has_data():
    assert len(CASES) == 11
    assert sorted(path.stem for path in DATA.glob("*.npz")) == sorted(CASES)


@pytest.mark.parametrize("case", ["svd_wide", "svd_tall"])
def test_svd_gives_the_updates_before_the_first_refresh(case, dtype):
    # Later updates depend on the signs of the singular vectors, which the release's SVD
    # chose differently.
    golden = np.load(DATA / f"{case}.npz")
    tx = scale_by_apollo(**arguments(case, projection="svd"))
    state = tx.init(jnp.zeros(CASES[case]["shape"], dtype))
    for t in range(CASES[case]["update_proj_gap"]):
        direction, state = tx.update(jnp.asarray(golden["grads"][t], dtype), state)
        # The release computes its SVD in float32, also where the data are float64.
        assert relative_error(direction, golden["directions"][t]) <= 1e-5


@pytest.mark.parametrize("case", ["svd_wide", "svd_tall"])
def test_svd_spans_the_recorded_subspaces(case, dtype):
    golden = np.load(DATA / f"{case}.npz")
    tx = scale_by_apollo(**arguments(case, projection="svd"))
    state = tx.init(jnp.zeros(CASES[case]["shape"], dtype))
    gap = CASES[case]["update_proj_gap"]
    for t in range(CASES[case]["steps"]):
        before = state.projection
        _, state = tx.update(jnp.asarray(golden["grads"][t], dtype), state)
        if t % gap:
            np.testing.assert_array_equal(state.projection, before)
            continue
        rows = np.asarray(state.projection, np.float64)
        recorded = golden["projections"][t // gap]
        np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-5)
        np.testing.assert_allclose(rows.T @ rows, recorded.T @ recorded, atol=1e-5)
        if t == 0:
            assert all(row[np.abs(row).argmax()] > 0 for row in rows)
        else:
            assert np.all(np.sum(rows * np.asarray(before), axis=1) >= 0)

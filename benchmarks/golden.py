"""Replays the golden trajectories in tests/data, which its README.md describes."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax import ScaleByApolloState, scale_by_apollo

DATA = Path(__file__).parents[1] / "tests" / "data"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "index.json").read_text())
ARGUMENTS = (
    "rank",
    "scale_type",
    "scale",
    "update_proj_gap",
    "scale_front",
    "norm_growth_limit",
    "b1",
    "b2",
    "eps",
)
# The largest error relative to the largest entry.
TOLERANCES = {"float64": 1e-13, "float32": 1e-5}


class Replay(NamedTuple):
    """The results of a case with its recorded projections."""

    errors: list[float]  # The error of the direction at each step.
    norms: np.ndarray  # The norm that the limiter stores after each step.
    state: ScaleByApolloState
    golden: Any  # The recorded arrays, by name.


def arguments(case: str, **changed: Any) -> dict[str, Any]:
    """Returns the arguments of `scale_by_apollo` for a case."""
    return {name: CASES[case][name] for name in ARGUMENTS} | changed


def relative_error(actual: Any, expected: np.ndarray) -> float:
    difference = np.abs(np.asarray(actual, np.float64) - expected)
    return float(difference.max() / np.abs(expected).max())


def replay(case: str, dtype: str) -> Replay:
    """Runs a case with its recorded projections; `float64` takes `jax.enable_x64`."""
    golden = np.load(DATA / f"{case}.npz")
    gap, steps = CASES[case]["update_proj_gap"], CASES[case]["steps"]

    @jax.jit
    def update(
        gradient: jax.Array, state: Any, projection: jax.Array
    ) -> tuple[Any, Any]:
        tx = scale_by_apollo(
            **arguments(case, projection=lambda key, shape: projection)
        )
        return tx.update(gradient, state)

    shape = CASES[case]["shape"]
    state: Any = scale_by_apollo(**arguments(case)).init(jnp.zeros(shape, dtype))
    errors, norms = [], []
    for t in range(steps):
        projection = jnp.asarray(golden["projections"][t // gap], dtype)
        gradient = jnp.asarray(golden["grads"][t], dtype)
        direction, state = update(gradient, state, projection)
        assert direction.dtype == dtype
        errors.append(relative_error(direction, golden["directions"][t]))
        norms.append(float(state.norm))
    return Replay(errors, np.array(norms), state, golden)


def worst_error(case: str, dtype: str) -> float:
    """Returns the largest error of a case in directions, moments and norms."""
    errors, norms, state, golden = replay(case, dtype)
    found = [
        *errors,
        relative_error(state.mu, golden["mu"]),
        relative_error(state.nu, golden["nu"]),
    ]
    if CASES[case]["norm_growth_limit"] is not None:
        found.append(relative_error(norms, golden["norms"]))
    return max(found)

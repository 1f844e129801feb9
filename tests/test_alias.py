"""The whole optimizers are chains of their parts, and pass every argument on."""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import chex
import optax
import pytest

import apollo_optax
from tests.helpers import run, small_gradients, small_params

pytestmark = pytest.mark.usefixtures("quick_compilation")

NO_DECAY_OF_VECTORS = {"dense": {"kernel": True, "bias": False}, "scale": False}
UNDER_ADAM = {"dense": {"kernel": None, "bias": None}, "scale": None}

# A value of each argument that is not its default.
SHARED: dict[str, Any] = {
    "weight_decay": 0.3,
    "mask": NO_DECAY_OF_VECTORS,
    "b1": 0.8,
    "b2": 0.9,
    "eps": 1e-3,
    "weight_dimension_numbers": UNDER_ADAM,
    "moment_dtype": "bfloat16",
}
APOLLO: dict[str, Any] = SHARED | {
    "scale": 4.0,
    "update_proj_gap": 2,
    "norm_growth_limit": 1.5,
    "scale_front": True,
    "projection": "random",
    "key": 3,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "apollo": APOLLO | {"rank": 3, "scale_type": "tensor"},
    "apollo_mini": APOLLO,
    "racs": SHARED | {"b": 0.5, "iterations": 5, "norm_growth_limit": 1.5},
    "apollo_zero": SHARED
    | {
        "power": 0.25,
        "method": "exact",
        "rank": 2,
        "momentum": 0.9,
        "int8_momentum": True,
        "relative": True,
        "key": 3,
    },
}
# Arguments that the others need to have an effect.
BASE: dict[str, dict[str, Any]] = {
    "apollo": {"rank": 2, "scale": 16.0, "weight_decay": 0.1},
    "apollo_mini": {"weight_decay": 0.1},
    "racs": {"weight_decay": 0.1},
    "apollo_zero": {"weight_decay": 0.1},
}
NEEDED = {"int8_momentum": {"momentum": 0.9}}


def end(weight_decay: float, mask: Any = None) -> tuple[Any, Any]:
    decay = optax.add_decayed_weights(weight_decay, mask)
    return decay, optax.scale_by_learning_rate(0.01)


def apollo(*, weight_decay: float, mask: Any = None, **given: Any) -> Any:
    scale = apollo_optax.scale_by_apollo(**given)
    return optax.chain(scale, *end(weight_decay, mask))


def apollo_mini(*, scale: float = 128.0, **given: Any) -> Any:
    return apollo(rank=1, scale_type="tensor", scale=scale, **given)


def racs(
    *, weight_decay: float, mask: Any = None, iterations: int = 1, **given: Any
) -> Any:
    scale = apollo_optax.scale_by_racs(iterations=iterations, **given)
    return optax.chain(scale, *end(weight_decay, mask))


def apollo_zero(
    *,
    weight_decay: float,
    mask: Any = None,
    momentum: float | None = None,
    int8_momentum: bool = False,
    relative: bool = False,
    **given: Any,
) -> Any:
    numbers = given.get("weight_dimension_numbers")
    in_proportion = apollo_optax.scale_by_param_matrix_rms(
        weight_dimension_numbers=numbers
    )
    return optax.chain(
        *([apollo_optax.int8_trace(0.9, nesterov=True)] if int8_momentum else []),
        apollo_optax.scale_by_flattening(
            momentum=None if int8_momentum else momentum, **given
        ),
        # The decay is not in proportion to the weights' size, so it comes afterwards.
        in_proportion if relative else optax.identity(),
        *end(weight_decay, mask),
    )


PARTS: dict[str, Callable[..., Any]] = {
    "apollo": apollo,
    "apollo_mini": apollo_mini,
    "racs": racs,
    "apollo_zero": apollo_zero,
}


def trained(tx: Any) -> Any:
    return run(tx, small_gradients(3), small_params())


@functools.cache
def trained_without(name: str, argument: str | None = None) -> Any:
    return trained(PARTS[name](**BASE[name] | NEEDED.get(argument or "", {})))


def test_arguments_are_complete():
    for name, arguments in ARGUMENTS.items():
        signature = inspect.signature(getattr(apollo_optax, name))
        assert set(signature.parameters) == {"learning_rate", *arguments}


def assert_identical(actual: Any, expected: Any) -> None:
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


@pytest.mark.parametrize("name", ARGUMENTS)
def test_an_optimizer_is_the_chain_of_its_parts(name):
    whole = getattr(apollo_optax, name)(0.01, **BASE[name])
    assert_identical(trained(whole), trained_without(name))


@pytest.mark.parametrize(
    ("name", "argument"),
    [(name, argument) for name, given in ARGUMENTS.items() for argument in given],
)
def test_an_optimizer_passes_an_argument_on(name, argument):
    needed = NEEDED.get(argument, {})
    arguments = BASE[name] | needed | {argument: ARGUMENTS[name][argument]}
    expected = trained(PARTS[name](**arguments))
    actual = trained(getattr(apollo_optax, name)(0.01, **arguments))
    assert_identical(actual, expected)
    # The argument has an effect here, so this test would notice if it were dropped.
    without = trained_without(name, argument if needed else None)
    with pytest.raises(AssertionError):
        assert_identical(expected, without)

"""Eight CPU devices for every test, so that meshes need no hardware."""

import os

import hypothesis
import jax
import pytest

# Processes that tests start inherit this. Without it, each would look for TPUs wherever
# libtpu is installed, and only one process at a time may open libtpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)

# The same examples in every run, and no time limit while an example compiles.
hypothesis.settings.register_profile(
    "apollo", max_examples=20, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("apollo")


@pytest.fixture(scope="module")
def quick_compilation():
    """Turns most XLA optimisations off, for modules that mainly wait for compilations.

    The caches are cleared before and after, because a program that was compiled with
    other settings may give other last digits.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield

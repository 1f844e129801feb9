"""Eight CPU devices for every test, so that meshes need no hardware."""

import os

import jax
import pytest

# Also for the processes that tests start. Otherwise each would look for TPUs where libtpu is installed, and
# only one process at a time may.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module")
def quick_compilation():
    """Compiles with less care, for modules whose time goes to compiling what runs for a moment.

    What was compiled otherwise is dropped before and after: its last digits may differ.
    """
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()

"""Eight CPU devices for every test, so that meshes need no hardware."""

import jax
import pytest

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

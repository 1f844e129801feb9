"""Eight CPU devices for every test, so that meshes need no hardware."""

import gc
import os
import tempfile
from collections.abc import Iterator
from typing import Any

# The matrices of the tests are so small that OpenBLAS's threads mostly wait for each
# other, and they keep the cores busy while they wait. NumPy reads this when it is
# imported, and processes that tests start inherit it.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis
import jax
import pytest
from jax._src import compiler
from jax.experimental.compilation_cache import compilation_cache

from tests.xla_options import known_options

# XLA allocates the temporaries of a program in each execution. By default, glibc gets
# large ones from the kernel each time, which then clears them page by page. With these
# thresholds it keeps them. The workers of pytest-xdist and the processes that tests
# start read the thresholds when they begin.
os.environ.setdefault("MALLOC_MMAP_THRESHOLD_", str(2**30))
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**30))

# Processes that tests start inherit this. Without it, each would look for TPUs wherever
# libtpu is installed, and only one process at a time may open libtpu.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
jax.config.update("jax_platforms", os.environ["JAX_PLATFORMS"])
jax.config.update("jax_num_cpu_devices", 8)

# Traces and compiled programs are many objects that live long. By default, Python
# searches for cycles after every 700 new ones, which takes a tenth of the tests' time.
gc.set_threshold(100_000, 20, 20)

# The same examples in every run, and no time limit while an example compiles.
hypothesis.settings.register_profile(
    "apollo", max_examples=20, deadline=None, derandomize=True
)
hypothesis.settings.load_profile("apollo")


@pytest.fixture(scope="session", autouse=True)
def compiled_programs() -> Iterator[None]:
    """Stores compiled programs on disk, so that each process compiles a program once.

    Many tests compile the same small programs. The folder is empty when the tests
    start and is removed when they end, so no run depends on an earlier one. Processes
    don't share it, because JAX may read a file that another process is writing.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        settings = {
            "jax_compilation_cache_dir": folder,
            "jax_persistent_cache_min_compile_time_secs": 0,
        }
        before = {name: jax.config.values[name] for name in settings}
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


# XLA's fusion emitters go through several dialects of MLIR, which takes more than half
# of the time to compile a small program for CPUs. The XLA of JAX 0.11.2 and 0.12 has no
# such option.
QUICK_OPTIONS = known_options({"xla_cpu_use_fusion_emitters": False})


def flag(option: str) -> str:
    """Returns one of ``QUICK_OPTIONS`` as XLA reads it from the environment."""
    return f"--{option}={str(QUICK_OPTIONS[option]).lower()}"


@pytest.fixture(scope="module")
def quick_compilation() -> Iterator[None]:
    """Turns most XLA optimizations off, for modules that mainly wait for compilations.

    Processes that the tests start inherit this. The caches in memory are cleared before
    and after, because a program that was compiled with other settings may give other
    last digits.
    """
    get_compile_options = compiler.get_compile_options

    def quick_options(*args: Any, env_options_overrides: Any = None, **kwargs: Any):
        overrides = QUICK_OPTIONS | dict(env_options_overrides or {})
        return get_compile_options(*args, env_options_overrides=overrides, **kwargs)

    before = jax.config.values["jax_disable_most_optimizations"]
    # XLA reads its flags from the environment once, which has to be before the change.
    jax.block_until_ready(jax.numpy.zeros(1))
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "true")
        flags = [os.environ.get("XLA_FLAGS", ""), *map(flag, QUICK_OPTIONS)]
        patch.setenv("XLA_FLAGS", " ".join(flags).strip())
        # JAX has no public setting for compiler options of all programs.
        patch.setattr(compiler, "get_compile_options", quick_options)
        yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()


@pytest.fixture
def fusion_emitters(
    quick_compilation: None, monkeypatch: pytest.MonkeyPatch
) -> Iterator[None]:
    """Takes ``QUICK_OPTIONS`` back, for a test that compares bits of two programs.

    Without the emitters, XLA rounds one expression differently in two programs.
    """
    jax.clear_caches()
    for option in QUICK_OPTIONS:
        monkeypatch.setitem(QUICK_OPTIONS, option, True)
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield

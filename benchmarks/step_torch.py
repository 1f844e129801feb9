"""The authors' release and torch's fused AdamW, as contenders.

They are for `python -m benchmarks.optimizer_step --against-torch`.

The release is `apollo-torch` on PyPI, under a non-commercial licence. It is called as
its README says.
"""

import functools
import gc
import importlib
from collections.abc import Callable
from typing import Any

import jax

import apollo_optax
from benchmarks.step_contenders import (
    LEARNING_RATE,
    Measured,
    Method,
    Setting,
    adamw,
    apollo,
    timed,
)
from examples.llama.run.errors import UsageError
from examples.llama.run.machine import cores

RELEASE_GAP = 200  # The gap that the release's README and the paper use.


def imported(name: str) -> Any:
    """Returns a package that only this comparison needs."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(
            f"--against-torch needs {name} ({error}); pip install '.[bench-torch]', "
            "or make bench-step"
        ) from error


def device_type() -> str:
    """Returns torch's name of the device that JAX uses.

    Raises:
        UsageError: if torch can't use it.
    """
    backend = jax.default_backend()
    if backend == "cpu":
        return "cpu"
    if backend == "gpu" and imported("torch").cuda.is_available():
        return "cuda"
    raise UsageError(
        f"--against-torch: torch can't use this device ({backend}); leave it out"
    )


def check() -> None:
    """Raises `UsageError` if a package is missing or can't use JAX's device."""
    imported("apollo_torch")
    device_type()


class OnTorch:
    """A torch optimizer of kernels in the layout of torch, (out, in).

    Args:
        floor_bytes: the bytes that a step must move.
        kernels: shapes and dtypes in JAX.
        make: makes an optimizer from parameters and the steps between refreshes.
        refresh_every: that number; None for optimizers without projections.
    """

    def __init__(
        self,
        floor_bytes: int,
        kernels: dict[str, jax.ShapeDtypeStruct],
        make: Callable[[list[Any], int], Any],
        refresh_every: int | None = None,
    ) -> None:
        self.measured = Measured(floor_bytes, refresh_every)
        self._kernels, self._make = kernels, make
        self._torch, self._device = imported("torch"), device_type()
        self._torch.set_num_threads(cores())

    def compile(self) -> None:
        pass  # Torch steps eagerly.

    def run_block(self, seconds: float) -> None:
        try:
            if self.measured.refresh_every is not None:
                # Each step draws new projections if the gap is 1. The state exists
                # since the first step.
                self.measured.refreshes += self._times(1, 0)
            self.measured.blocks.append(self._times(RELEASE_GAP, seconds))
        except self._torch.OutOfMemoryError as error:
            raise MemoryError(str(error)) from error
        finally:
            gc.collect()  # An optimizer and its parameters refer to each other.
            if self._device == "cuda":
                self._torch.cuda.empty_cache()

    def _times(self, gap: int, seconds: float) -> list[float]:
        torch = self._torch

        def draw(leaf: jax.ShapeDtypeStruct) -> Any:
            dtype = getattr(torch, leaf.dtype.name)
            return torch.empty(
                leaf.shape[::-1], dtype=dtype, device=self._device
            ).uniform_(-1e-2, 1e-2)

        params = [torch.nn.Parameter(draw(leaf)) for leaf in self._kernels.values()]
        for param, leaf in zip(params, self._kernels.values(), strict=True):
            param.grad = draw(leaf)
        optimizer = self._make(params, gap)

        def wait() -> None:
            if self._device == "cuda":
                torch.cuda.synchronize()

        optimizer.step()
        wait()
        return timed(optimizer.step, wait, seconds)


def release(params: list[Any], gap: int, **group: Any) -> Any:
    options = {"proj": "random", "proj_type": "std", "update_proj_gap": gap}
    groups = [{"params": params, **options, **group}]
    return imported("apollo_torch").APOLLOAdamW(groups, lr=LEARNING_RATE)


def fused_adamw(params: list[Any], gap: int) -> Any:
    del gap
    return imported("torch").optim.AdamW(params, lr=LEARNING_RATE, fused=True)


def contenders(
    setting: Setting, kernels: dict[str, jax.ShapeDtypeStruct]
) -> dict[str, OnTorch]:
    """Returns torch's contenders by name.

    They have the floors of the JAX contenders with moments in the weights' dtype.
    """

    def floor_bytes(
        make: Callable[..., Any], gradient_reads: int, **options: Any
    ) -> int:
        return Method(
            "", functools.partial(make, setting, **options), gradient_reads
        ).floor_bytes(kernels)

    ours = functools.partial(floor_bytes, apollo, 2, moment_dtype=setting.dtype)
    found = {
        "torch adamw, fused": OnTorch(
            floor_bytes(adamw, 1, moments=setting.dtype), kernels, fused_adamw
        ),
        "apollo-torch, mini": OnTorch(
            ours(of=apollo_optax.apollo_mini),
            kernels,
            functools.partial(release, rank=1, scale_type="tensor", scale=128),
            RELEASE_GAP,
        ),
    }
    for rank in dict.fromkeys((setting.quarter_rank(), 256)):
        found[f"apollo-torch, rank {rank}"] = OnTorch(
            ours(of=apollo_optax.apollo, rank=rank),
            kernels,
            functools.partial(release, rank=rank, scale_type="channel", scale=1),
            RELEASE_GAP,
        )
    return found

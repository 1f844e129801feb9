"""What every integration checks: losses, the optimizer state and its checkpoint."""

import math
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

# A device holds at most this many times its equal share of the sharded state.
ALLOWED_SHARE = 1.2


def check(holds: bool, claim: str) -> None:
    """Prints `claim`, and ends the program if it does not hold."""
    print(f"{'ok  ' if holds else 'FAIL'} {claim}", flush=True)
    if not holds:
        raise SystemExit(1)


def check_losses_fall(name: str, losses: Sequence[float]) -> None:
    """Checks that the last of the `losses` is finite and smaller than the first."""
    first, last = float(losses[0]), float(losses[-1])
    claim = (
        f"{name}: the loss falls from {first:.3f} to {last:.3f} in {len(losses)} steps"
    )
    check(math.isfinite(last) and last < first, claim)


def bytes_on_a_device(leaf: jax.Array) -> int:
    """Bytes of `leaf` on the device that has the largest part of it."""
    return max(shard.data.nbytes for shard in leaf.addressable_shards)


def check_state_is_sharded(
    name: str, state: Any, vectors: Sequence[str] = ("scale", "bias")
) -> int:
    """Checks where the state of matrices lies; returns all bytes on a device.

    Args:
      name: the optimizer, for what is printed.
      state: the optimizer's state, of arrays that lie on all devices.
      vectors: parts of names of parameters that are vectors. Where layers are stacked,
        their moments have two axes, but frameworks replicate them.
    """
    total = on_a_device = of_all_leaves = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        of_all_leaves += bytes_on_a_device(leaf)
        owner = jax.tree_util.keystr(path)
        if leaf.ndim > 1 and not any(vector in owner for vector in vectors):
            total += leaf.nbytes
            on_a_device += bytes_on_a_device(leaf)
    devices = jax.device_count()
    claim = (
        f"{name}: a device holds {of_all_leaves:,} bytes of state, and of matrices' "
        f"moments {on_a_device:,} of {total:,} bytes, "
        f"{on_a_device / total * devices:.2f} times an equal share"
    )
    check(on_a_device <= ALLOWED_SHARE * total / devices, claim)
    return of_all_leaves


def check_equal(name: str, restored: Any, saved: Any) -> None:
    """Checks that two trees have equal leaves, on whatever mesh each of them lies."""
    pairs = zip(jax.tree.leaves(restored), jax.tree.leaves(saved), strict=True)
    leaves = [(_as_numpy(a), _as_numpy(b)) for a, b in pairs]
    equal = all(np.array_equal(a, b) for a, b in leaves)
    check(equal, f"{name}: a checkpoint of {len(leaves)} leaves restores unchanged")


def check_same_loss(name: str, loss: Any, expected: Any) -> None:
    """Checks the loss after a restoration, which another order of sums may round."""
    claim = (
        f"{name}: the next loss on the other mesh is {loss:.4f}, as on the first one"
    )
    check(math.isclose(float(loss), float(expected), rel_tol=1e-2), claim)


def _as_numpy(leaf: Any) -> np.ndarray:
    """`leaf` on the host; keys as the numbers they are made of."""
    is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(leaf) if is_key else leaf)


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """Abstract arrays like those of `shapes`, with a sharding each.

    The trees are joined leaf by leaf, because the boxes of one of them may be missing
    in the other.
    """
    leaves, structure = jax.tree.flatten(shapes)
    abstract = [
        jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
        for leaf, sharding in zip(leaves, jax.tree.leaves(shardings), strict=True)
    ]
    return jax.tree.unflatten(structure, abstract)


def saved_and_restored(path: pathlib.Path, saved: Any, target: Any) -> Any:
    """`saved` after a trip through Orbax, sharded as the abstract `target` says."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, saved)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, target)

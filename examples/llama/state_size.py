"""How much memory an optimizer's state takes, by what it belongs to."""

import math
import re
from typing import Any, NamedTuple

import jax
import optax

from examples.llama.optimizers import EMBEDDING, HEAD, KERNELS, path_name


class StateBytes(NamedTuple):
    kernels: int  # Of the layers.
    embeddings: int  # And of the head.
    rest: int  # Of the norms, and what belongs to no parameter: counters and keys.


def state_bytes(tx: optax.GradientTransformation, params: Any) -> StateBytes:
    """Returns the bytes of `tx`'s state for `params`, which may be shapes; allocates nothing."""
    names = [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    kernels = embeddings = rest = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(jax.eval_shape(tx.init, params)):
        # A state mirrors the parameters, so the parameter's path is a part of the leaf's.
        owner = next((name for name in names if f"/{name}/" in f"/{path_name(path)}/"), "")
        size = math.prod(leaf.shape) * leaf.dtype.itemsize
        if re.search(KERNELS, owner):
            kernels += size
        elif re.search(f"{EMBEDDING}|{HEAD}", owner):
            embeddings += size
        else:
            rest += size
    return StateBytes(kernels, embeddings, rest)

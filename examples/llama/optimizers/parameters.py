"""Which parameter is what to an optimizer.

Parameters fall into two groups: the kernels of the layers (attention and MLP), which is
where the optimizers differ, and the rest (embeddings, head, norms), which all of them
leave to Adam by default. Each group has a learning rate of its own, so that no
comparison is won by a better rate for the embeddings alone. The embedding and the head
may be given to another rule, whatever the optimizer.
"""

import re
from collections.abc import Callable
from typing import Any

import jax

import apollo_optax
from examples.llama.lora import ADAPTERS
from examples.llama.options import RunOptions

KERNELS = r"^layers/.*/kernel$"  # (L, in, out)
EMBEDDING = r"^embed/embedding$"  # (V, D)
HEAD = r"^lm_head/kernel$"  # (D, V)
ENDS = {"embedding": EMBEDDING, "head": HEAD}


def path_name(path: tuple[Any, ...]) -> str:
    """Returns a path of JAX keys as `layers/mlp/up_proj/kernel`."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def lr_group(path: str) -> str:
    of_kernels = re.search(KERNELS, path) or re.search(ADAPTERS, path)
    return "kernels" if of_kernels else "rest"


def lr_groups(params: Any) -> Any:
    """Returns "kernels" or "rest" for each leaf."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: lr_group(path_name(path)), params
    )


def are_kernels(params: Any) -> Any:
    """Returns whether each leaf has the learning rate of the kernels."""
    return jax.tree.map(lambda group: group == "kernels", lr_groups(params))


def embedding_rules(options: RunOptions) -> dict[str, str]:
    """Returns the names of the rules for "embedding" and "head"."""
    return {
        "embedding": options.embeddings,
        "head": options.head or options.embeddings,
    }


def dimension_numbers(options: RunOptions) -> Callable[[Any], Any]:
    """Returns which axes of the parameters are matrices to this library's optimizers.

    An embedding or a head is a matrix only to some of its rules.
    """
    rules = [
        (KERNELS, apollo_optax.ApolloDimensionNumbers(1, 2)),
        (ADAPTERS, None),  # Adapters have Adam.
    ]
    rules += [
        (ENDS[end], apollo_optax.ApolloDimensionNumbers(0, 1))
        for end, rule in embedding_rules(options).items()
        if rule in ("apollo", "racs", "flattening", "adafactor-momentum")
    ]
    return apollo_optax.dimension_numbers_by_path(rules)

"""Pytrees seen by path: boxes looked through, leaves named the same whatever the node types.

Parameters reach an optimizer as plain dicts (Linen), as an ``nnx.State`` of ``Variable`` boxes, as a
pure ``nnx.State`` without them, or as what a checkpoint restored. Paths of strings are what these
have in common, so everything here that must agree between two trees goes by path.
"""

from collections.abc import Container, Mapping
from typing import Any

import jax

Path = tuple[str, ...]


def is_box(node: Any) -> bool:
    """Whether `node` is a container for one value with metadata, as Flax has them.

    Known by their methods, so that Flax is never imported: NNX ``Variable`` has ``get_value``,
    Linen's ``AxisMetadata`` (``Partitioned`` and the like) has ``unbox``.
    """
    return hasattr(type(node), "get_value") or hasattr(type(node), "unbox")


def _content(box: Any) -> Any:
    """The value in `box`, read without the hooks and sharding constraints its accessors may run."""
    flattened = jax.tree_util.default_registry.flatten_one_level(box)
    if flattened is None:  # A box that is a leaf itself, as NNX's mutable Variables are.
        return box.get_value() if hasattr(type(box), "get_value") else box.unbox()
    (content,) = flattened[0]
    return content


def unbox(tree: Any) -> Any:
    """Replaces every box in `tree` by its value; leaves keep their order."""
    return jax.tree.map(lambda x: _content(x) if is_box(x) else x, tree, is_leaf=is_box)


def _name(entry: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def leaves_by_path(tree: Any, is_leaf: Any = None) -> dict[Path, Any]:
    """The leaves of `tree` in flattening order, keyed by path without box names."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(unbox(tree), is_leaf=is_leaf)
    leaves = {tuple(_name(entry) for entry in path): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError(
            "two leaves of the tree have the same path once its keys are written as strings "
            f"(as 1 and '1' do): {[jax.tree_util.keystr(path) for path, _ in pairs]}; rename one"
        )
    return leaves


def rebuild(tree: Any, leaves: Mapping[Path, Any]) -> Any:
    """New leaves, given by path, in the structure of `tree`."""
    order = leaves_by_path(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in order])


def show(path: Path) -> str:
    """`path` as error messages, tables and regular expressions see it: ``a/b/kernel``."""
    return "/".join(path)


def owner(path: Path, parameters: Container[Path]) -> Path | None:
    """The parameter that a state leaf at `path` belongs to: the longest suffix that is one."""
    return next((path[i:] for i in range(len(path) + 1) if path[i:] in parameters), None)


def apollo_prefixes(states: dict[Path, Any]) -> set[Path]:
    """Where the ScaleByApolloStates are in a flattened state, by their fields: NNX loses the type."""
    named = {path[:-1] for path in states if path[-1:] == ("key",)}
    named &= {path[:-1] for path in states if path[-1:] == ("count",)}
    return {
        prefix
        for prefix in named
        if all(
            any(path[: len(prefix) + 1] == (*prefix, field) for path in states)
            for field in ("mu", "nu", "norm")
        )
    }

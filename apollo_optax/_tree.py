"""Pytrees seen by path: boxes looked through, leaves named the same whatever the node types.

Parameters reach an optimizer as plain dicts (Linen), as an ``nnx.State`` of ``Variable`` boxes, as a
pure ``nnx.State`` without them, or as what a checkpoint restored. Paths of strings are what these
have in common, so everything here that must agree between two trees goes by path.
"""

from collections.abc import Mapping
from typing import Any

import jax

Path = tuple[str, ...]


def _children(node: Any) -> list[Any] | None:
    """The children of a node of a pytree, None for a leaf."""
    flattened = jax.tree_util.default_registry.flatten_one_level(node)
    return None if flattened is None else list(flattened[0])


def is_box(node: Any) -> bool:
    """Whether `node` is a container for one value with metadata, as Flax has them.

    Known by their methods, so that Flax is never imported: NNX ``Variable`` has ``get_value``,
    Linen's ``AxisMetadata`` (``Partitioned`` and the like) has ``unbox``. A node of several children is
    something else that happens to have such a method.
    """
    if not (hasattr(type(node), "get_value") or hasattr(type(node), "unbox")):
        return False
    children = _children(node)
    return children is None or len(children) == 1


def _content(box: Any) -> Any:
    """The value in `box`, read without the hooks and sharding constraints its accessors may run."""
    children = _children(box)
    if children is None:  # A box that is a leaf itself, as NNX's mutable Variables are.
        return box.get_value() if hasattr(type(box), "get_value") else box.unbox()
    return children[0]


def unbox(tree: Any) -> Any:
    """Replaces every box in `tree` by its value; leaves keep their order."""
    return jax.tree.map(lambda x: _content(x) if is_box(x) else x, tree, is_leaf=is_box)


def _names(entry: Any) -> tuple[str, ...]:
    """A key of a path as components: Haiku's ``a/~/b`` and flattened dicts' ``("a", "b")`` have several."""
    key = next((getattr(entry, name) for name in ("key", "name", "idx") if hasattr(entry, name)), entry)
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(name for part in parts for name in str(part).split("/"))


def leaves_by_path(tree: Any, is_leaf: Any = None) -> dict[Path, Any]:
    """The leaves of `tree` in flattening order, keyed by path without box names."""
    pairs, _ = jax.tree_util.tree_flatten_with_path(unbox(tree), is_leaf=is_leaf)
    leaves = {sum(map(_names, path), ()): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        raise ValueError(
            "two leaves of the tree have the same path once its keys are written as strings (as 1 and "
            f"'1' do, or 'a/b' and b in a): {[jax.tree_util.keystr(path) for path, _ in pairs]}; rename one"
        )
    return leaves


def rebuild(tree: Any, leaves: Mapping[Path, Any]) -> Any:
    """New leaves, given by path, in the structure of `tree`."""
    order = leaves_by_path(tree)
    return jax.tree.unflatten(jax.tree.structure(tree), [leaves[path] for path in order])


def show(path: Path) -> str:
    """`path` as error messages, tables and regular expressions see it: ``a/b/kernel``."""
    return "/".join(path)

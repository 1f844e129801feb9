"""Leaves of pytrees by path, the same for all node types and without Flax's boxes.

Parameters reach an optimizer as plain dicts (Linen), as an ``nnx.State`` of
``Variable`` boxes, as a pure ``nnx.State`` without boxes, or in the form in which a
checkpoint restored them. All of these have paths of strings, so two trees are always
matched by path.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

Path = tuple[str, ...]


def _children(node: Any) -> list[Any] | None:
    """The children of a node of a pytree; None for a leaf."""
    flattened = jax.tree_util.default_registry.flatten_one_level(node)
    return None if flattened is None else list(flattened[0])


def is_box(node: Any) -> bool:
    """Whether `node` is a Flax container of one value with metadata.

    Boxes are known by their methods, so that Flax is never imported: NNX's ``Variable``
    has ``get_value``, and Linen's ``AxisMetadata`` (``Partitioned`` and the like) has
    ``unbox``. A node with several children is no box, even if it has such a method.
    """
    if not (hasattr(type(node), "get_value") or hasattr(type(node), "unbox")):
        return False
    children = _children(node)
    return children is None or len(children) == 1


def _boxed_value(box: Any) -> Any:
    """The value in `box`, read without the hooks and constraints of its accessors."""
    children = _children(box)
    # NNX's mutable Variables are leaves of a pytree, so they have no child to read.
    if children is None:
        return box.get_value() if hasattr(type(box), "get_value") else box.unbox()
    return children[0]


def unbox(tree: Any) -> Any:
    """Replaces every box in `tree` by its value; leaves keep their order."""
    return jax.tree.map(
        lambda x: _boxed_value(x) if is_box(x) else x, tree, is_leaf=is_box
    )


def _components(entry: Any) -> tuple[str, ...]:
    """The path components in one key of a JAX path.

    Haiku's ``a/~/b`` and the tuple keys ``("a", "b")`` of flattened dicts have several.
    """
    attributes = (name for name in ("key", "name", "idx") if hasattr(entry, name))
    attribute = next(attributes, None)
    key = entry if attribute is None else getattr(entry, attribute)
    parts = key if isinstance(key, tuple) else (key,)
    return tuple(name for part in parts for name in str(part).split("/"))


def leaves_by_path(
    tree: Any, is_leaf: Any = None, *, keep_boxes: bool = False
) -> dict[Path, Any]:
    """The leaves of `tree` in flattening order, keyed by path without box names."""
    tree = tree if keep_boxes else unbox(tree)
    pairs, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    leaves = {sum(map(_components, path), ()): leaf for path, leaf in pairs}
    if len(leaves) != len(pairs):
        paths = [jax.tree_util.keystr(path) for path, _ in pairs]
        raise ValueError(
            "two leaves of the tree have the same path when their keys are written as "
            "strings (the keys 1 and '1' do, and so do 'a/b' and 'b' inside 'a'); "
            f"rename one of these leaves: {paths}"
        )
    return leaves


def names_by_path(tree: Any) -> dict[Path, Path]:
    """The name of each leaf by its path: the path without the keys of wrappers.

    A wrapper is a node with exactly one child that is neither a mapping nor a sequence,
    such as a named array or a dataclass with one field. What it holds has the name of
    the wrapper, so the array at ``bias/0`` is called ``bias``. Paths keep all keys,
    because random draws and checkpoints depend on them.
    """
    return dict(_paths_and_names(unbox(tree), (), ()))


def _paths_and_names(node: Any, path: Path, name: Path) -> Iterator[tuple[Path, Path]]:
    """The path and the name of each leaf under `node`, in flattening order."""
    if jax.tree_util.all_leaves([node]):
        yield path, name
        return
    children, _ = jax.tree_util.tree_flatten_with_path(
        node, is_leaf=lambda x: x is not node
    )
    # A masked leaf counts as a child, so a mask over the tree changes no names.
    is_wrapper = len(children) == 1 and not isinstance(node, (Mapping, Sequence))
    for keys, child in children:
        components = sum(map(_components, keys), ())
        child_name = name if is_wrapper else name + components
        yield from _paths_and_names(child, path + components, child_name)


def rebuild(tree: Any, leaves: Mapping[Path, Any]) -> Any:
    """A tree of the structure of `tree`, with new leaves given by path."""
    order = leaves_by_path(tree)
    return jax.tree.unflatten(
        jax.tree.structure(tree), [leaves[path] for path in order]
    )


def show(path: Path) -> str:
    """`path` as in error messages, tables and regular expressions: ``a/b/kernel``."""
    return "/".join(path)

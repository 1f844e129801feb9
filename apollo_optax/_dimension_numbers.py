"""Which axes of a tensor form its matrix and which are batch axes.

The algorithm works on matrices. The *contracted* side of a matrix is projected away,
and the *channel* side has the scaling factors. Which axes form these sides follows from
the caller's dimension numbers, or from a rule over names and shapes.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from apollo_optax import _check, _tree


class ApolloDimensionNumbers(NamedTuple):
    """Which axes of a tensor form the two sides of its matrix.

    All other axes are batch axes, whose elements are independent matrices. For a kernel
    applied as ``x @ kernel``, the reduction axis is the input side and the output axis
    the output side. APOLLO projects away the smaller side, or the reduction side if
    both have the same size.

    Attributes:
      reduction_axis: axis or axes of the input side; negative values count from the
        end.
      output_axis: axis or axes of the output side, disjoint from `reduction_axis`.

    Examples:
      >>> stacked = ApolloDimensionNumbers(1, 2)     # (layers, in, out)
      >>> heads = ApolloDimensionNumbers(0, (1, 2))  # (in, heads, head_dim)
    """

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


WeightDimensionNumbers = ApolloDimensionNumbers | Any | Callable[[Any], Any] | None

EMBEDDING_AND_HEAD_NAMES = (
    # Linen's and NNX's Embed call their weight "embedding". The other names are those
    # of the modules around it.
    "embedding",
    "embeddings",
    "embed",
    "embedder",
    "embed_tokens",
    "emb",
    "input_embedding",
    "token_embedder",
    "token_embedding",
    "tok_embeddings",
    "token_embed",
    "tok_emb",
    "word_emb",
    "shared_embedding",
    "wte",
    "position_embedder",
    "position_embedding",
    "pos_embedding",
    "pos_embed",
    "pos_emb",
    "wpe",
    # These are the output heads of language models and classifiers.
    "lm_head",
    "logits_dense",
    "logits",
    "output_head",
    "head",
    "unembed",
    "unembedding",
    "classifier",
)
"""Path components that name an embedding or an output head.

The default rule gives these leaves to Adam. Only whole components count, so
``MultiHeadDotProductAttention_0`` is not a head.
"""

# Leaves of these names are vectors even where layer stacking or a DenseGeneral with
# several output axes gives them two axes or more.
_VECTOR_NAMES = ("bias", "scale")


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a tensor are batch axes, the contracted side and the channel side.

    Attributes:
      shape: the sizes of all axes of the tensor.
      batch: the batch axes, in ascending order.
      contracted: the axes of the side that is projected away, in the caller's order.
      channel: the axes of the other side, in the caller's order.
      is_input_contracted: whether the contracted side is the input side.
    """

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    channel: tuple[int, ...]
    is_input_contracted: bool = True

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes in the order batch, contracted, channel."""
        return (*self.batch, *self.contracted, *self.channel)

    @property
    def contracted_size(self) -> int:
        return math.prod(self.sizes(self.contracted))

    @property
    def matrix_size(self) -> int:
        """The number of entries of one matrix."""
        return math.prod(self.sizes((*self.contracted, *self.channel)))

    def without_batch_axis(self) -> "MatrixAxes":
        """The axes of one element of the first batch axis, which lacks that axis."""
        removed = self.batch[0]

        def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - (axis > removed) for axis in axes if axis != removed)

        return dataclasses.replace(
            self,
            shape=self.shape[:removed] + self.shape[removed + 1 :],
            batch=renumbered(self.batch),
            contracted=renumbered(self.contracted),
            channel=renumbered(self.channel),
        )


def matrix_axes(
    path: _tree.Path, shape: tuple[int, ...], numbers: ApolloDimensionNumbers
) -> MatrixAxes:
    """The sides of the leaf at `path`; raises if `numbers` do not fit its `shape`."""

    def side(given: Sequence[int] | int) -> tuple[int, ...]:
        axes = tuple(given) if isinstance(given, Iterable) else (given,)
        if not all(
            isinstance(axis, (int, np.integer)) and not isinstance(axis, bool)
            for axis in axes
        ):
            raise TypeError(
                f"{numbers} for '{_tree.show(path)}' of shape {shape} must name axes "
                f"by ints or sequences of ints, got {given!r}"
            )
        if not axes or any(not -len(shape) <= axis < len(shape) for axis in axes):
            problem = f"some of the axes {axes} are missing there"
            raise ValueError(
                f"{numbers} does not fit '{_tree.show(path)}' of shape {shape}: "
                f"{problem if axes else 'it names no axis for one of the sides'}; name "
                "axes of the leaf for both sides, or give None for a leaf that is not "
                "a matrix"
            )
        return tuple(int(axis) % len(shape) for axis in axes)

    reduction, output = side(numbers.reduction_axis), side(numbers.output_axis)
    if len({*reduction, *output}) < len(reduction) + len(output):
        raise ValueError(
            f"the axes of {numbers} overlap for '{_tree.show(path)}' of shape {shape}; "
            "name each axis once, for one side only"
        )
    reduction_size = math.prod(shape[axis] for axis in reduction)
    output_size = math.prod(shape[axis] for axis in output)
    # The smaller side is projected away. On a tie that is the input side, so that the
    # channels are outputs.
    is_input_contracted = reduction_size <= output_size
    contracted, channel = (
        (reduction, output) if is_input_contracted else (output, reduction)
    )
    batch = tuple(
        axis for axis in range(len(shape)) if axis not in {*reduction, *output}
    )
    return MatrixAxes(shape, batch, contracted, channel, is_input_contracted)


def is_embedding_or_head(path: _tree.Path) -> bool:
    return any(component in EMBEDDING_AND_HEAD_NAMES for component in path)


def is_vector_by_name(path: _tree.Path, name: _tree.Path) -> bool:
    """Whether a leaf's last key, with or without wrappers, is that of a vector."""
    return any(form and form[-1] in _VECTOR_NAMES for form in (path, name))


def _may_be_matrix(path: _tree.Path, name: _tree.Path) -> bool:
    return not is_vector_by_name(path, name) and not is_embedding_or_head(path)


def default_dimension_numbers(params: Any) -> Any:
    """The default rule, in the form of the argument `weight_dimension_numbers`.

    A transformation that is given this function does not warn of kernels whose axes
    can't be guessed. It is for those in a chain in which another one warns of them.
    """
    leaves, names = _tree.leaves_by_path(params), _tree.names_by_path(params)
    numbers = [
        _default_numbers(path, names[path], jnp.shape(leaf))
        for path, leaf in leaves.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(_tree.unbox(params)), numbers)


def _default_numbers(
    path: _tree.Path, name: _tree.Path, shape: tuple[int, ...]
) -> ApolloDimensionNumbers | None:
    is_matrix = len(shape) == 2 and _may_be_matrix(path, name)
    return ApolloDimensionNumbers() if is_matrix else None


def _is_unguessable(path: _tree.Path, name: _tree.Path, shape: tuple[int, ...]) -> bool:
    """Whether a leaf may be a kernel whose matrix axes only the caller knows."""
    return len(shape) > 2 and _may_be_matrix(path, name)


def _is_inside_embedding_or_head(name: _tree.Path, shape: tuple[int, ...]) -> bool:
    """Whether a module around a kernel's own one is called like an embedding or a head.

    The kernel of a head is ``head/kernel``; that of a layer in it is
    ``head/dense/kernel``.
    """
    return (
        len(shape) == 2
        and not is_vector_by_name(name, name)
        and is_embedding_or_head(name[:-2])
        and not is_embedding_or_head(name[-2:])
    )


def dimension_numbers_by_path(
    rules: Sequence[tuple[str, ApolloDimensionNumbers | None]],
) -> Callable[[Any], Any]:
    """Dimension numbers from regular expressions over parameter paths.

    Args:
      rules: pairs of a regular expression and the :class:`ApolloDimensionNumbers` of
        the leaves whose path it matches (``re.search``), or None to give these leaves
        to Adam. A path looks like ``decoder/layers/mlp/wi/kernel``, without the names
        of Flax's boxes. An array in a node with a single child, such as a named array,
        has a path like ``bias/0``, and matches as ``bias`` too. The first rule that
        matches counts. Leaves that no rule matches get the default rule of
        :func:`scale_by_apollo`.

    Returns:
      A callable for the argument `weight_dimension_numbers`.

    Raises:
      TypeError: for a rule that is not such a pair. When the callable is called with a
        number, as by ``optax.inject_hyperparams`` without its `static_args`.
      ValueError: for an invalid regular expression. When the callable is called, for
        kernels of three or more axes that no rule matches, since the default rule can't
        know their axes. The message suggests a rule for them.

    Examples:
      >>> import jax.numpy as jnp
      >>> from apollo_optax import apollo, ApolloDimensionNumbers
      >>> rules = [
      ...     (r"layers/.*/kernel$", ApolloDimensionNumbers(1, 2)),  # (layers, in, out)
      ...     (r"router/kernel$", None),  # Adam
      ... ]
      >>> numbers = dimension_numbers_by_path(rules)
      >>> params = {"layers": {"mlp": {"kernel": jnp.ones((2, 4, 6))}}}
      >>> numbers(params)["layers"]["mlp"]["kernel"]
      ApolloDimensionNumbers(reduction_axis=1, output_axis=2)
      >>> tx = apollo(0.01, weight_dimension_numbers=numbers)
    """
    compiled = _compiled(rules)

    def weight_dimension_numbers(params: Any) -> Any:
        _refuse_count(params)
        leaves, names = _tree.leaves_by_path(params), _tree.names_by_path(params)
        numbers: list[ApolloDimensionNumbers | None] = []
        unmatched = []
        for path, leaf in leaves.items():
            name, shape = names[path], jnp.shape(leaf)
            forms = _tree.show(path), _tree.show(name)
            matches = [
                given for rule, given in compiled if any(map(rule.search, forms))
            ]
            if not matches and _is_unguessable(path, name, shape):
                unmatched.append((name, shape))
            default = _default_numbers(path, name, shape)
            numbers.append(matches[0] if matches else default)
        if unmatched:
            raise ValueError(_no_rule_matches(unmatched))
        return jax.tree.unflatten(jax.tree.structure(_tree.unbox(params)), numbers)

    return weight_dimension_numbers


def _refuse_count(params: Any) -> None:
    """Raises for a count of steps, with which Optax calls a schedule."""
    is_array = isinstance(params, int | jax.Array | np.ndarray)
    if is_array and jnp.issubdtype(jnp.result_type(params), jnp.integer):
        raise TypeError(
            f"dimension numbers are for parameters, got {params}, as if they were a "
            f"schedule; {_check.USE_STATIC_ARGS}"
        )


def _compiled(
    rules: Sequence[tuple[str, ApolloDimensionNumbers | None]],
) -> list[tuple[re.Pattern[str], ApolloDimensionNumbers | None]]:
    """The rules with compiled patterns; raises for a rule that is not a valid pair."""
    compiled = []
    for rule in rules:
        is_pair = isinstance(rule, tuple) and len(rule) == 2
        if not (is_pair and isinstance(rule[0], str)):
            raise TypeError(
                "rules must be a sequence of tuples (regular expression, "
                f"ApolloDimensionNumbers or None), got {rule!r} in it"
            )
        pattern, numbers = rule
        _check_numbers(numbers, f"the rule {pattern!r}")
        try:
            compiled.append((re.compile(pattern), numbers))
        except re.error as error:
            raise ValueError(
                f"{pattern!r} is not a regular expression: {error}"
            ) from error
    return compiled


def _no_rule_matches(leaves: Sequence[tuple[_tree.Path, tuple[int, ...]]]) -> str:
    """The error for leaves, by name and shape, with up to three rules to add."""
    shapes: dict[str, list[tuple[int, ...]]] = {}
    for name, shape in leaves:
        shapes.setdefault(_pattern_of(name), []).append(shape)
    placeholder = ApolloDimensionNumbers(reduction_axis=-2, output_axis=-1)
    lines = [
        f"({_literal(pattern)}, {placeholder}),  "
        f"# {_count_leaves(len(alike))}, the first of shape {alike[0]}"
        for pattern, alike in shapes.items()
    ]
    if len(lines) > 3:
        lines[3:] = [f"# and rules for {len(lines) - 3} more patterns"]
    rules = "".join(f"\n    {line}" for line in lines)
    return (
        f"no rule matches {_count_leaves(len(leaves))} of three or more axes, and it "
        "can't be guessed which of these axes form a matrix; add rules such as these, "
        "with the right axes instead of the placeholders -2 and -1, or with None "
        f"instead of ApolloDimensionNumbers(...) to give the leaves to Adam:{rules}"
    )


def _count_leaves(count: int) -> str:
    return "1 leaf" if count == 1 else f"{count} leaves"


def _pattern_of(name: _tree.Path) -> str:
    """A regular expression for `name` and for names that differ in numbers only."""
    literals = map(re.escape, re.split(r"\d+", _tree.show(name)))
    return "^" + r"\d+".join(literals) + "$"


def _literal(pattern: str) -> str:
    """`pattern` as a Python literal, a raw string where one can hold it."""
    is_raw = "'" not in pattern and pattern.isprintable()
    return f"r'{pattern}'" if is_raw else repr(pattern)


def dimension_numbers_from(tree: Any) -> Any:
    """Converts the dimension numbers of Optax's Muon or GaLore.

    The objects are recognised by their fields `reduction_axis` and `output_axis`, which
    mean the same here. So the objects of a framework's own Muon work as well.

    Args:
      tree: the argument `muon_weight_dimension_numbers` of ``optax.contrib.muon``, or
        `weight_dimension_numbers` of ``optax.contrib.scale_by_galore``. It is one of:
        a pytree of ``MuonDimensionNumbers`` or ``GaLoreDimensionNumbers`` in the
        structure of the parameters or of a prefix of it; a callable from the parameters
        to such a pytree; one such object for every leaf of two or more axes; or None
        for every leaf of two axes. Leaves under None and ``optax.MaskedNode`` are given
        to Adam. Flax's boxes are ignored.

    Returns:
      A value for the argument `weight_dimension_numbers`: a pytree like `tree` without
      Flax's boxes, a callable if `tree` is a callable or one object, or None if `tree`
      is None. None stands for the default rule of :func:`scale_by_apollo`, which unlike
      Muon's gives embeddings and output heads to Adam.

    Raises:
      TypeError: if `tree` contains anything other than such objects and None. If `tree`
        is a callable, this is raised when the result is called.

    Examples:
      >>> import optax
      >>> from apollo_optax import apollo, dimension_numbers_from
      >>> heads = optax.contrib.MuonDimensionNumbers(0, (1, 2))
      >>> numbers = dimension_numbers_from({"query": heads, "norm": None})
      >>> numbers["query"]
      ApolloDimensionNumbers(reduction_axis=0, output_axis=(1, 2))
      >>> tx = apollo(0.01, weight_dimension_numbers=numbers)
    """
    if tree is None:
        return None

    def weight_dimension_numbers(params: Any) -> Any:
        _refuse_count(params)
        given = tree(params) if _is_function(tree) else tree
        numbers = _converted(given)
        if not _has_sides(given):
            return numbers
        return jax.tree.map(
            lambda leaf: numbers if jnp.ndim(leaf) >= 2 else None, _tree.unbox(params)
        )

    if _is_function(tree) or _has_sides(tree):
        return weight_dimension_numbers
    return _converted(tree)


def _is_function(numbers: Any) -> bool:
    """Whether `numbers` are a function of the parameters.

    A tree of dimension numbers may be callable too, such as an Equinox module.
    """
    if not callable(numbers):
        return False
    leaves = jax.tree.leaves(numbers, is_leaf=_has_sides)
    return not any(map(_has_sides, leaves))


def _has_sides(numbers: Any) -> bool:
    """Whether `numbers` are dimension numbers, of this library or of another one."""
    return hasattr(numbers, "reduction_axis") and hasattr(numbers, "output_axis")


def _converted(tree: Any) -> Any:
    """`tree` without boxes, its entries converted to this library's numbers."""

    def is_entry(node: Any) -> bool:
        # Optax's MaskedNode is a pytree without leaves, so it has to be named here.
        return node is None or _has_sides(node) or isinstance(node, optax.MaskedNode)

    converted: list[ApolloDimensionNumbers | None] = []
    for path, entry in _tree.leaves_by_path(tree, is_leaf=is_entry).items():
        if entry is None or isinstance(entry, optax.MaskedNode):
            converted.append(None)
        elif _has_sides(entry):
            numbers = ApolloDimensionNumbers(entry.reduction_axis, entry.output_axis)
            converted.append(numbers)
        else:
            raise TypeError(
                f"dimension_numbers_from got {entry!r} for '{_tree.show(path)}'; give "
                "an object with reduction_axis and output_axis, such as "
                "optax.contrib.MuonDimensionNumbers, or None for Adam"
            )
    structure = jax.tree.structure(_tree.unbox(tree), is_leaf=is_entry)
    return jax.tree.unflatten(structure, converted)


def _check_numbers(numbers: Any, where: str) -> None:
    if numbers is None or isinstance(numbers, ApolloDimensionNumbers):
        return
    remedy = "it must be an ApolloDimensionNumbers, or None for Adam"
    if _has_sides(numbers):
        remedy += "; convert Muon's and GaLore's with dimension_numbers_from(tree)"
    raise TypeError(f"weight_dimension_numbers holds {numbers!r} for {where}; {remedy}")


def _numbers_by_prefix(
    weight_dimension_numbers: Any, tree: Any
) -> dict[_tree.Path, ApolloDimensionNumbers | None]:
    """The caller's dimension numbers by path, of a leaf or of a whole subtree."""
    if _is_function(weight_dimension_numbers):
        weight_dimension_numbers = weight_dimension_numbers(tree)
    numbers_by_prefix = _tree.leaves_by_path(
        weight_dimension_numbers,
        # Muon's and GaLore's dimension numbers count as leaves too, so that the error
        # can name them.
        is_leaf=lambda x: x is None or _has_sides(x),
    )
    for path, numbers in numbers_by_prefix.items():
        _check_numbers(numbers, f"'{_tree.show(path)}'")
    return numbers_by_prefix


def _numbers_at(
    path: _tree.Path,
    name: _tree.Path,
    numbers_by_prefix: dict[_tree.Path, ApolloDimensionNumbers | None],
) -> ApolloDimensionNumbers | None:
    """The numbers of the longest prefix of `path`, or else of `name`, that has any."""
    prefixes = (form[:end] for form in (path, name) for end in range(len(form), -1, -1))
    longest = next((prefix for prefix in prefixes if prefix in numbers_by_prefix), None)
    if longest is None:
        raise ValueError(
            f"weight_dimension_numbers has no entry for '{_tree.show(path)}'; add its "
            "ApolloDimensionNumbers, or None for Adam"
        )
    return numbers_by_prefix[longest]


def resolve(
    weight_dimension_numbers: WeightDimensionNumbers,
    tree: Any,
    *,
    with_vectors: bool = False,
) -> dict[_tree.Path, MatrixAxes | None]:
    """The axes of each leaf of `tree` by path; None for a leaf that is not a matrix.

    A matrix with a side of 1 counts as a vector, so it gets None too. Its projection
    would be one random number ``p``, and its update that of Adam times ``1 / |p|``.
    `with_vectors` gives the axes of such leaves as well.
    """
    leaves = _tree.leaves_by_path(tree)
    # Optax's placeholder trees have no leaves, and a caller's callable can't take them.
    if not leaves:
        return {}
    names = _tree.names_by_path(tree)
    if weight_dimension_numbers is None:
        weight_dimension_numbers = default_dimension_numbers
    numbers_by_prefix = _numbers_by_prefix(weight_dimension_numbers, tree)
    numbers = {
        path: _numbers_at(path, names[path], numbers_by_prefix) for path in leaves
    }
    axes: dict[_tree.Path, MatrixAxes | None] = dict.fromkeys(leaves)
    for path, leaf in leaves.items():
        given, shape = numbers[path], jnp.shape(leaf)
        # A leaf without elements is no matrix, since it has no channels to scale.
        if given is not None and 0 not in shape:
            found = matrix_axes(path, shape, given)
            if with_vectors or found.contracted_size > 1:
                axes[path] = found
    return axes


def check_batch_index(
    batch_index: Any, axes: Mapping[_tree.Path, MatrixAxes | None]
) -> None:
    """Raises if slices along the leading axis are not slices of whole matrices.

    Args:
      batch_index: the index of the first slice, or None if the leaves are whole.
      axes: of the leaves, or of slices of them, by path.
    """
    if batch_index is None:
        return
    _check.batch_index(batch_index)
    for path, leaf_axes in axes.items():
        if leaf_axes is not None and 0 not in leaf_axes.batch:
            raise ValueError(
                f"'{_tree.show(path)}' of shape {leaf_axes.shape} is a slice of "
                "layer-stacked leaves, since batch_index is given, but its axis 0 is a "
                "part of the matrix, so its layers can't be updated one by one; give "
                "weight_dimension_numbers that leave axis 0 out, or None for vectors"
            )


class Unguessed(NamedTuple):
    """What happens to kernels whose axes can't be guessed, in the words of a warning.

    Attributes:
      to_leaves: a clause, with ``{}`` in the place of the words for the leaves.
      to_vector: what happens if all parameters are in one vector, as a predicate.
      by_none: what the dimension numbers None do to a kernel, as a predicate.
    """

    to_leaves: str
    to_vector: str
    by_none: str


def warn_if_unguessable(tree: Any, outcome: Unguessed) -> None:
    """Warns of parameters that the default rule may not take for what they are.

    These are kernels of three or more axes, all parameters in one vector, and a whole
    model inside a module that is called like an embedding or a head.
    """
    leaves, names = _tree.leaves_by_path(tree), _tree.names_by_path(tree)
    shapes = {path: jnp.shape(leaf) for path, leaf in leaves.items()}
    unknown = {
        path: shape
        for path, shape in shapes.items()
        if _is_unguessable(path, names[path], shape)
    }
    inside = {
        path: shape
        for path, shape in shapes.items()
        if _is_inside_embedding_or_head(names[path], shape)
    }
    has_matrix = any(
        _default_numbers(path, names[path], shape) for path, shape in shapes.items()
    )
    root = [shape for path, shape in shapes.items() if names[path] == ()]
    if root and len(root[0]) == 1:
        message = (
            f"the parameters are one vector of shape {root[0]}, which "
            f"{outcome.to_vector}. If optax.flatten or ravel_pytree made the vector, "
            "give the tree of parameters instead, without optax.flatten around this "
            "transformation."
        )
    elif unknown:
        total = sum(map(math.prod, shapes.values()))
        message = _unguessable(unknown, total, outcome)
    elif inside and not has_matrix:
        path, shape = next(iter(inside.items()))
        kernels = f"all {len(inside)} kernels" if len(inside) > 1 else "the only kernel"
        message = (
            f"{outcome.to_leaves.format(kernels)}, because a module around them has "
            f"the name of an embedding or a head. The first: '{_tree.show(path)}' "
            f"{shape}. If they are matrices, name them with weight_dimension_numbers, "
            "for example by dimension_numbers_by_path([(r'<their path>$', "
            "ApolloDimensionNumbers())])."
        )
    else:
        return
    warnings.warn(message, UserWarning, stacklevel=3)


def _unguessable(
    unknown: dict[_tree.Path, tuple[int, ...]], total: int, outcome: Unguessed
) -> str:
    """The warning of leaves, given by shape, among `total` parameters."""
    sizes = {path: math.prod(shape) for path, shape in unknown.items()}
    share = sum(sizes.values()) / max(total, 1)
    largest = sorted(unknown, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"'{_tree.show(path)}' {unknown[path]}" for path in largest)
    leaves = (
        f"{_count_leaves(len(unknown))} of three or more axes, {share:.0%} of the "
        "parameters"
    )
    return (
        f"{outcome.to_leaves.format(leaves)}, because it can't be guessed which of "
        f"their axes form a matrix. The largest: {named}. Name the axes with "
        "weight_dimension_numbers. For layer-stacked kernels (layers, in, out), for "
        "example, pass dimension_numbers_by_path([(r'layers/.*/kernel$', "
        f"ApolloDimensionNumbers(1, 2))]). None {outcome.by_none}."
    )

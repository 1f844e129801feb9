"""Which axes of a tensor form its matrix and which are batch axes.

The algorithm speaks of a matrix with a *contracted* side, which is projected away, and a
*channel* side, along which scaling factors live. Which axes these are follows from the
caller's dimension numbers, or from a rule over names and shapes.
"""

import dataclasses
import math
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from apollo_optax import _tree


class ApolloDimensionNumbers(NamedTuple):
    """Which axes of a tensor form the two sides of its matrix; all other axes are batch axes.

    For a kernel applied as ``x @ kernel``, the reduction axis is the input side and the output axis
    the output side. Which of the two APOLLO projects away follows from their sizes: the smaller one,
    and on a tie the reduction side. Elements of the batch axes are independent matrices.

    Attributes:
      reduction_axis: axis or axes of the input side; negative values count from the end.
      output_axis: axis or axes of the output side, disjoint from `reduction_axis`.

    Examples:
      >>> stacked = ApolloDimensionNumbers(1, 2)            # (layers, in, out)
      >>> heads = ApolloDimensionNumbers(0, (1, 2))         # (in, heads, head_dim)
    """

    reduction_axis: Sequence[int] | int = 0
    output_axis: Sequence[int] | int = 1


WeightDimensionNumbers = ApolloDimensionNumbers | Any | Callable[[Any], Any] | None

EMBEDDING_AND_HEAD_NAMES = (
    # Linen's and NNX's Embed call their weight "embedding"; the modules around it are:
    *("embedding", "embeddings", "embed", "embedder", "embed_tokens", "input_embedding"),
    *("token_embedder", "token_embedding", "tok_embeddings", "shared_embedding", "wte"),
    *("position_embedder", "position_embedding", "pos_embedding", "pos_embed", "wpe"),
    # Output heads of language models and classifiers:
    *("lm_head", "logits_dense", "logits", "output_head", "head", "unembed", "unembedding"),
    *("classifier",),
)
"""Path components that mark an embedding or an output head, which the default rule gives to Adam.

Whole components count, so ``MultiHeadDotProductAttention_0`` is not a head.
"""

_VECTOR_NAMES = ("bias", "scale")  # Also when stacked, or in the shape of a DenseGeneral's output.


@dataclasses.dataclass(frozen=True)
class MatrixAxes:
    """Which axes of a tensor are batch, contracted side and channel side."""

    shape: tuple[int, ...]
    batch: tuple[int, ...]
    contracted: tuple[int, ...]
    channel: tuple[int, ...]

    def sizes(self, axes: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(self.shape[axis] for axis in axes)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes in the order batch, contracted, channel."""
        return (*self.batch, *self.contracted, *self.channel)

    @property
    def contracted_size(self) -> int:
        return math.prod(self.sizes(self.contracted))

    def without_batch_axis(self) -> "MatrixAxes":
        """The axes of one element of the first batch axis, a tensor without that axis."""
        gone = self.batch[0]

        def renumbered(axes: tuple[int, ...]) -> tuple[int, ...]:
            return tuple(axis - (axis > gone) for axis in axes if axis != gone)

        shape = self.shape[:gone] + self.shape[gone + 1 :]
        sides = map(renumbered, (self.batch, self.contracted, self.channel))
        return MatrixAxes(shape, *sides)


def matrix_axes(path: _tree.Path, shape: tuple[int, ...], numbers: ApolloDimensionNumbers) -> MatrixAxes:
    """Checks `numbers` against the `shape` of the leaf at `path` and chooses the contracted side."""

    def side(given: Sequence[int] | int) -> tuple[int, ...]:
        axes = tuple(given) if isinstance(given, Iterable) else (given,)
        if not all(isinstance(axis, (int, np.integer)) and not isinstance(axis, bool) for axis in axes):
            raise TypeError(
                f"{numbers} for '{_tree.show(path)}' of shape {shape} must name axes by ints or sequences "
                f"of ints, got {given!r}"
            )
        if not axes or any(not -len(shape) <= axis < len(shape) for axis in axes):
            raise ValueError(
                f"{numbers} does not fit '{_tree.show(path)}' of shape {shape}: axes {axes} are missing "
                "there, or none at all; both sides need axes of the leaf; a leaf that is no matrix gets None"
            )
        return tuple(int(axis) % len(shape) for axis in axes)

    reduction, output = side(numbers.reduction_axis), side(numbers.output_axis)
    if len({*reduction, *output}) < len(reduction) + len(output):
        raise ValueError(
            f"the axes of {numbers} overlap for '{_tree.show(path)}' of shape {shape}; an axis "
            "belongs to one side only, once"
        )
    reduction_size = math.prod(shape[axis] for axis in reduction)
    output_size = math.prod(shape[axis] for axis in output)
    # The smaller side is projected away; the tie goes to the input side, so channels are outputs.
    contracted, channel = (reduction, output) if reduction_size <= output_size else (output, reduction)
    batch = tuple(axis for axis in range(len(shape)) if axis not in {*reduction, *output})
    return MatrixAxes(shape, batch, contracted, channel)


def is_embedding_or_head(path: _tree.Path) -> bool:
    return any(component in EMBEDDING_AND_HEAD_NAMES for component in path)


def _may_be_matrix(path: _tree.Path) -> bool:
    return not (path and path[-1] in _VECTOR_NAMES) and not is_embedding_or_head(path)


def _default(path: _tree.Path, shape: tuple[int, ...]) -> ApolloDimensionNumbers | None:
    return ApolloDimensionNumbers() if len(shape) == 2 and _may_be_matrix(path) else None


def dimension_numbers_by_path(
    rules: Sequence[tuple[str, ApolloDimensionNumbers | None]],
) -> Callable[[Any], Any]:
    """Dimension numbers from regular expressions over parameter paths.

    Args:
      rules: pairs of a regular expression and the :class:`ApolloDimensionNumbers` (or None, for Adam)
        of the leaves it is found in (``re.search``). Paths read ``decoder/layers/mlp/wi/kernel``,
        without the names of Flax's boxes. The first match counts; leaves that no rule matches get
        the default rule of :func:`scale_by_apollo`.

    Returns:
      A callable for the argument `weight_dimension_numbers`.

    Raises:
      ValueError: for an invalid regular expression, and when called, for a kernel of three or more
        axes that no rule matches, since the default rule can't know its axes.

    Examples:
      >>> from apollo_optax import apollo, ApolloDimensionNumbers
      >>> tx = apollo(0.01, weight_dimension_numbers=dimension_numbers_by_path([
      ...     (r"layers/.*/kernel$", ApolloDimensionNumbers(1, 2)),   # (layers, in, out)
      ...     (r"router/kernel$", None),                              # Adam
      ... ]))
    """
    compiled = []
    for rule in rules:
        if not (isinstance(rule, tuple) and len(rule) == 2 and isinstance(rule[0], str)):
            raise TypeError(
                "rules must be a sequence of pairs (regular expression, ApolloDimensionNumbers or None), got "
                f"{rule!r} in it"
            )
        pattern, numbers = rule
        _check_entry(numbers, f"the rule {pattern!r}")
        try:
            compiled.append((re.compile(pattern), numbers))
        except re.error as error:
            raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error

    def of_leaf(path: _tree.Path, shape: tuple[int, ...]) -> ApolloDimensionNumbers | None:
        for pattern, numbers in compiled:
            if pattern.search(_tree.show(path)):
                return numbers
        if len(shape) > 2 and _may_be_matrix(path):
            raise ValueError(
                f"no rule matches '{_tree.show(path)}' of shape {shape}; its matrix axes can't be "
                "guessed: add a rule for it, with None to give it to Adam"
            )
        return _default(path, shape)

    def weight_dimension_numbers(params: Any) -> Any:
        leaves = _tree.leaves_by_path(params)
        numbers = [of_leaf(path, jnp.shape(leaf)) for path, leaf in leaves.items()]
        return jax.tree.unflatten(jax.tree.structure(_tree.unbox(params)), numbers)

    return weight_dimension_numbers


def _check_entry(numbers: Any, where: str) -> None:
    if numbers is not None and not isinstance(numbers, ApolloDimensionNumbers):
        raise TypeError(
            f"weight_dimension_numbers holds {numbers!r} for {where}; it must be an "
            "ApolloDimensionNumbers, or None for Adam"
        )


def _entries(weight_dimension_numbers: Any, tree: Any) -> dict[_tree.Path, ApolloDimensionNumbers | None]:
    """The caller's dimension numbers by path, or path of the subtree they stand for."""
    if callable(weight_dimension_numbers):
        weight_dimension_numbers = weight_dimension_numbers(tree)
    entries = _tree.leaves_by_path(
        weight_dimension_numbers,
        # Muon's and GaLore's dimension numbers are leaves too, to be named in the error.
        is_leaf=lambda x: x is None or hasattr(x, "reduction_axis"),
    )
    for path, numbers in entries.items():
        _check_entry(numbers, f"'{_tree.show(path)}'")
    return entries


def resolve(
    weight_dimension_numbers: WeightDimensionNumbers, tree: Any
) -> dict[_tree.Path, MatrixAxes | None]:
    """The :class:`MatrixAxes` of every leaf of `tree` by path; None for a leaf that is no matrix."""
    leaves = _tree.leaves_by_path(tree)
    if not leaves:  # Nothing to name; and Optax's placeholder trees are no trees for a callable.
        return {}
    if weight_dimension_numbers is None:
        numbers = {path: _default(path, jnp.shape(leaf)) for path, leaf in leaves.items()}
    else:
        entries = _entries(weight_dimension_numbers, tree)
        numbers = {path: _entry_for(path, entries) for path in leaves}
    axes = {}
    for path, leaf in leaves.items():
        given, shape = numbers[path], jnp.shape(leaf)
        # A leaf of no elements has no channels to scale.
        axes[path] = None if given is None or 0 in shape else matrix_axes(path, shape, given)
    return axes


def _entry_for(
    path: _tree.Path, entries: dict[_tree.Path, ApolloDimensionNumbers | None]
) -> ApolloDimensionNumbers | None:
    prefixes = (path[:i] for i in range(len(path), -1, -1))
    entry = next((prefix for prefix in prefixes if prefix in entries), None)
    if entry is None:
        raise ValueError(
            f"weight_dimension_numbers has no entry for '{_tree.show(path)}'; add its "
            "ApolloDimensionNumbers, or None for Adam"
        )
    return entries[entry]


def warn_if_unguessable(tree: Any) -> None:
    """Warns of kernels of three or more axes, which the default rule leaves to Adam."""
    leaves = _tree.leaves_by_path(tree)
    sizes = {path: math.prod(jnp.shape(leaf)) for path, leaf in leaves.items()}
    unknown = [path for path, leaf in leaves.items() if jnp.ndim(leaf) > 2 and _may_be_matrix(path)]
    if not unknown:
        return
    share = sum(sizes[path] for path in unknown) / max(sum(sizes.values()), 1)
    largest = sorted(unknown, key=lambda path: -sizes[path])[:3]
    named = ", ".join(f"'{_tree.show(path)}' {jnp.shape(leaves[path])}" for path in largest)
    warnings.warn(
        f"{len(unknown)} leaves of three or more axes, {share:.0%} of the parameters, are trained "
        f"with Adam at Adam's memory, because which of their axes form a matrix can't be guessed. "
        f"The largest: {named}. Say which with weight_dimension_numbers, for example "
        "dimension_numbers_by_path([(r'layers/.*/kernel$', ApolloDimensionNumbers(1, 2))]) if they are "
        "layer-stacked (layers, in, out); None leaves a kernel to Adam.",
        UserWarning,
        stacklevel=3,
    )

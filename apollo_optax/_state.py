"""The optimizer's state: its fields, their shapes and shardings, and their owners.

The fields of a state are declared once, in the class: a field that holds a leaf per
parameter carries a :class:`Field` in its annotation, with the rules for its shape,
sharding and dtype. Everything else here reads those rules: the zeros that ``init``
makes, the checks of ``update``, and the owners and shardings of the leaves of any
pipeline's state.

Some fields exist for matrices only, and some for all other leaves only. If a leaf lacks
a field, the field's tree has an ``optax.MaskedNode`` there, as under ``optax.masked``.
"""

import dataclasses
from collections.abc import Callable, Container, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from apollo_optax import _boxes, _check, _sharding, _tree
from apollo_optax._dimension_numbers import WeightDimensionNumbers, resolve
from apollo_optax._dtypes import saturating_cast
from apollo_optax._matrix import Matrix

State = TypeVar("State", bound=Any)
LeafState = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Field:
    """The rules for one field of a state.

    Attributes:
      shape: the field's shape for a leaf that is a matrix or a batch of them. None
        means that matrices do not have the field. The batch axes come first if
        `_batching` updates the matrices, because it may do so one by one.
      sharding: the field's sharding for the same leaves.
      like_parameter: whether the field has the parameter's shape and sharding for all
        other leaves. If not, it is a replicated scalar for them.
      is_moment: whether the argument `moment_dtype` sets the field's dtype.
      dtype: the field's dtype if it is always the same. If neither this nor
        `moment_dtype` sets it, it is that in which the leaf's norms and moments are
        computed.
      only_matrices: whether only matrices have the field.
    """

    shape: Callable[[Matrix], tuple[int, ...]] | None = None
    sharding: Callable[[Matrix], NamedSharding | None] = lambda matrix: None
    like_parameter: bool = False
    is_moment: bool = False
    dtype: Any = None
    only_matrices: bool = False


MOMENT = Field(
    shape=lambda matrix: matrix.moment_shape,
    sharding=lambda matrix: matrix.moment_sharding,
    like_parameter=True,
    is_moment=True,
)
NORM = Field(
    shape=lambda matrix: matrix.batch_shape,
    sharding=lambda matrix: matrix.norm_sharding,
)
ADAM_MOMENT = Field(like_parameter=True, is_moment=True)
# A number per row, which lies along the contracted side, and one per column.
ROW = Field(
    shape=lambda matrix: matrix.side_shape(matrix.axes.contracted),
    sharding=lambda matrix: matrix.side_sharding(matrix.axes.contracted),
    only_matrices=True,
)
COLUMN = Field(
    shape=lambda matrix: matrix.side_shape(matrix.axes.channel),
    sharding=lambda matrix: matrix.side_sharding(matrix.axes.channel),
    only_matrices=True,
)
PROJECTION = Field(
    shape=lambda matrix: matrix.projection_shape,
    sharding=lambda matrix: matrix.projection_sharding,
)


class ScaleByApolloState(NamedTuple):
    """State of :func:`scale_by_apollo`.

    `mu`, `nu`, `norm` and `projection` are trees in the structure of the parameters. An
    array is in a Flax box if the parameter's box says how to shard the parameter; norms
    never are.

    In the shapes below, ``batch`` stands for the sizes of a matrix's batch axes,
    ``channel`` for those of its channel side and ``contracted`` for those of the other
    side. ``r`` is the rank, clipped to the contracted size.

    Attributes:
      count: steps taken; an int32 scalar.
      key: raw key data, uint32; of shape ``(2,)`` for an int seed.
      mu: first moments. ``(*batch, r, *channel)`` for a matrix, the leaf's shape for
        any other leaf.
      nu: second moments, of the same shapes.
      norm: the norms that the limiter remembers, 0 where there is none yet. ``batch``
        for a matrix, a scalar for any other leaf.
      projection: the projections if they are stored, as with ``projection="svd"``;
        otherwise None. ``(*batch, r, *contracted)`` for a matrix, a scalar for any
        other leaf.
    """

    count: jax.Array  # pyright: ignore[reportIncompatibleMethodOverride]
    key: jax.Array
    mu: Annotated[optax.Updates, MOMENT]
    nu: Annotated[optax.Updates, MOMENT]
    norm: Annotated[optax.Updates, NORM]
    projection: Annotated[optax.Updates | None, PROJECTION] = None


def fields_of(kind: type[Any], *, with_optional: bool = True) -> dict[str, Field]:
    """The fields of a class of states that hold a leaf per parameter, by name.

    Optional fields are those with a default.
    """
    return {
        name: rule
        for name, hint in kind.__annotations__.items()
        for rule in getattr(hint, "__metadata__", ())
        if isinstance(rule, Field)
        and (with_optional or name not in kind._field_defaults)
    }


STATES: dict[type[Any], str] = {
    ScaleByApolloState: "APOLLO rank {rank}, {contracted} contracted"
}
"""The classes of states that are found in any pipeline's state, by field names.

Each has the words by which :func:`tabulate` says how it treats a matrix.
"""


# The state of one leaf.


def init_leaf(
    fields: Mapping[str, Field],
    leaf: Any,
    matrix: Matrix | None,
    dtype: Any,
    moment_dtype: Any,
) -> LeafState:
    """Zeros for every field of a leaf.

    `dtype` is that of fields whose rules, with `moment_dtype`, give no other.
    """
    sharding = _sharding.sharding_of(leaf)
    # A parameter that the caller has put on a device has its state there.
    device = _sharding.committed_device(leaf)
    state = {}
    for name, field in fields.items():
        shape = field_shape(field, matrix, jnp.shape(leaf))
        if shape is not None:
            given = moment_dtype if field.is_moment else field.dtype
            state[name] = jnp.zeros(
                shape,
                dtype if given is None else given,
                device=field_sharding(field, matrix, sharding) or device,
            )
    return state


def field_shape(
    field: Field, matrix: Matrix | None, leaf_shape: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The shape of a field; None if the leaf does not have the field.

    `matrix` is None for a leaf that is not a matrix.
    """
    if matrix is not None:
        return None if field.shape is None else field.shape(matrix)
    if field.only_matrices:
        return None
    return leaf_shape if field.like_parameter else ()


def field_sharding(
    field: Field, matrix: Matrix | None, leaf_sharding: NamedSharding | None
) -> NamedSharding | None:
    """The sharding of a field; `matrix` is None for a leaf that is not a matrix."""
    if matrix is None:
        scalar = _sharding.sharding_of_axes(leaf_sharding, ())
        return leaf_sharding if field.like_parameter else scalar
    return field.sharding(matrix)


def trees_of(
    fields: Mapping[str, Field],
    states: Mapping[_tree.Path, LeafState],
    matrices: Mapping[_tree.Path, Matrix],
    params: Any,
) -> dict[str, Any]:
    """The state of all leaves as one tree per field, of the structure of `params`.

    A leaf of the state is in a box if its parameter's box says how to shard it.
    """
    boxes, unboxed = _boxes.boxes_by_path(params), _tree.unbox(params)

    def entry(path: _tree.Path, name: str) -> Any:
        array = states[path].get(name)
        if array is None:
            return optax.MaskedNode()
        if path not in boxes:
            return array
        return _boxed(fields[name], matrices.get(path), boxes[path], array)

    return {
        name: _tree.rebuild(unboxed, {path: entry(path, name) for path in states})
        for name in fields
    }


def _boxed(field: Field, matrix: Matrix | None, box: Any, array: jax.Array) -> Any:
    """A field of one leaf in a box like the parameter's, or bare if it needs none."""
    if matrix is None:
        names = _boxes.partition_names(box, array.ndim)
        is_boxed = field.like_parameter and names is not None
        return _boxes.replace(box, array) if is_boxed else array
    names = _boxes.partition_names(box, len(matrix.axes.shape))
    # Values per matrix, such as norms, are too few to be worth sharding.
    if names is None or array.ndim <= len(matrix.batch_shape):
        return array
    named = _boxes.Named(box, names, matrix.sharding)
    sharding = field.sharding(dataclasses.replace(matrix, sharding=named.sharding))
    return array if sharding is None else named.replace(array, sharding)


def by_leaf(
    fields: Mapping[str, Field], state: Any, leaves: Mapping[_tree.Path, Any]
) -> dict[_tree.Path, LeafState]:
    """The state by leaf and field; checks that it has the leaves of the updates.

    A field is missing for a leaf if it is an ``optax.MaskedNode`` there.
    """
    states: dict[_tree.Path, LeafState] = {path: {} for path in leaves}
    for name in fields:
        stored = _tree.leaves_by_path(getattr(state, name), is_leaf=_is_absent)
        # Leaves that are masked out of the updates are masked out of the state.
        expected = {
            path: leaf
            for path, leaf in stored.items()
            if path in leaves or not _is_absent(leaf)
        }
        _check.same_paths(leaves, expected)
        for path, leaf in expected.items():
            if not _is_absent(leaf):
                states[path][name] = leaf
    return states


def _is_absent(node: Any) -> bool:
    return isinstance(node, optax.MaskedNode)


def with_leaves(
    fields: Mapping[str, Field], state: State, states: Mapping[_tree.Path, LeafState]
) -> State:
    """`state` with new leaves, in trees of the structure it had."""
    trees = {
        name: _tree.rebuild(
            getattr(state, name),
            {path: leaf[name] for path, leaf in states.items() if name in leaf},
        )
        for name in fields
    }
    return state._replace(**trees)


def check_leaf(
    fields: Mapping[str, Field],
    path: _tree.Path,
    leaf: Any,
    state: LeafState,
    matrix: Matrix | None,
) -> None:
    """Raises if a leaf's state does not have the shapes that its matrix requires."""
    for name, field in fields.items():
        expected = field_shape(field, matrix, jnp.shape(leaf))
        _check.state_shape(path, name, state.get(name), expected)


def updated(state: LeafState, **new: jax.Array | None) -> LeafState:
    """The state of a leaf with new values, in the dtypes of the old ones."""
    changed = {
        name: saturating_cast(value, state[name].dtype)
        for name, value in new.items()
        if value is not None
    }
    return state | changed


# The states in a pipeline's state.


class Owner(NamedTuple):
    """The parameter that a leaf of an optimizer's state belongs to."""

    parameter: _tree.Path | None  # None: it belongs to none, as a count does.
    kind: type[Any] | None = None  # The one of `STATES` that it is in.
    field: str | None = None  # The field's name in that; None outside of one.
    rule: Field | None = None  # The field's rules; None where it has none.


def owners(
    state: Mapping[_tree.Path, Any],
    parameters: Container[_tree.Path],
    shared: Container[_tree.Path] = (),
) -> dict[_tree.Path, Owner]:
    """The owner of each leaf of a state, which is given by path.

    Inside one of `STATES` the owner's path follows the field's name. Elsewhere the
    owner is the longest end of the path that names a parameter. Leaves in `shared` have
    no owner: by its path alone, Adam's `count` could be the state of a parameter of
    that name.
    """
    prefixes = _prefixes(state)

    def owner(path: _tree.Path) -> Owner:
        for end in range(len(path) - 1, -1, -1):
            if (kind := prefixes.get(path[:end])) is not None:
                field, rest = path[end], path[end + 1 :]
                rule = fields_of(kind).get(field)
                if rule is None:
                    return Owner(None, kind, field)
                # Otherwise a parameter is only called like a field of a state.
                if rest in parameters:
                    return Owner(rest, kind, field, rule)
        if path in shared:
            return Owner(None)
        ends = (path[i:] for i in range(len(path) + 1))
        return Owner(next((end for end in ends if end in parameters), None))

    return {path: owner(path) for path in state}


def _prefixes(state: Mapping[_tree.Path, Any]) -> dict[_tree.Path, type[Any]]:
    """The paths of the `STATES` in a flattened state, with their classes.

    They are found by the names of their fields, since NNX loses the type. A field
    without leaves has no name in a flattened state, so a state without matrices may
    have the same names as Optax's Adam. It is left out, because then its leaves have
    the owners and the shapes that Adam's have.
    """
    children: dict[_tree.Path, set[str]] = {}
    for path in state:
        for end, name in enumerate(path):
            children.setdefault(path[:end], set()).add(name)
    found = {}
    for kind in STATES:
        fields = fields_of(kind)
        shared = set(kind._fields) - fields.keys()  # They belong to no leaf.
        # Fields of other leaves have no leaves if all leaves are matrices.
        may_be_empty = {name for name, field in fields.items() if field.shape is None}
        required = set(kind._fields) - kind._field_defaults.keys() - may_be_empty
        for prefix, names in children.items():
            is_adam = names <= set(optax.ScaleByAdamState._fields)
            is_kind = required <= names <= set(kind._fields) and not is_adam
            if is_kind and all((*prefix, name) in state for name in shared):
                # A count with axes is the state of a parameter of that name.
                count = state.get((*prefix, "count"))
                if getattr(count, "shape", ()) == ():
                    found[prefix] = kind
    return found


def shared_state(
    init: Callable[[Any], Any], masked_params: Any
) -> Container[_tree.Path]:
    """The leaves of a state that belong to no parameter.

    These are the leaves that remain when all parameters are masked out.
    """
    return _tree.leaves_by_path(jax.eval_shape(init, masked_params)).keys()


def state_owners(state: Any, params: Any) -> Any:
    """The parameter that each leaf of an optimizer state belongs to, by name.

    Works on the state of any Optax pipeline, by the paths of its leaves.

    Args:
      state: an optimizer state, of arrays or ``jax.ShapeDtypeStruct``.
      params: the parameters, as arrays or ``jax.ShapeDtypeStruct``.

    Returns:
      A tree of the structure of `state`. Every leaf is the path of a parameter, such as
      ``"layers/mlp/kernel"``, or ``""`` if it belongs to no parameter. A parameter
      without a path, which is a single array, has the name ``""`` too. Optax's counts
      seem to belong to a parameter that has the name ``count``.

    Examples:
      >>> import jax, jax.numpy as jnp, optax
      >>> params = {"mlp": {"kernel": jnp.ones((4, 8))}}
      >>> state = jax.eval_shape(optax.adam(0.1).init, params)
      >>> state_owners(state, params)[0].mu
      {'mlp': {'kernel': 'mlp/kernel'}}
    """
    found = owners(_tree.leaves_by_path(state), _tree.leaves_by_path(params))
    names = [_tree.show(owner.parameter or ()) for owner in found.values()]
    return jax.tree.unflatten(jax.tree.structure(state), names)


def owned_matrix(
    owner: Owner, state_leaf: Any, parameter: Any, matrix: Matrix | None
) -> Matrix | None:
    """The matrix of a parameter with the rank that a state's leaf was made with.

    Args:
      owner: the leaf's owner, which must have a rule and a parameter.
      state_leaf: a leaf of a state.
      parameter: the parameter it belongs to.
      matrix: the parameter's matrix, of any rank; None if it is not a matrix.

    Raises:
      ValueError: if the leaf's shape does not follow from the matrix with any rank.
    """
    rule: Any = owner.rule
    path: Any = owner.parameter
    if matrix is not None:
        matrix = dataclasses.replace(matrix, rank=rank_in(matrix, state_leaf))
    expected = field_shape(rule, matrix, jnp.shape(parameter))
    _check.state_shape(
        path, str(owner.field), state_leaf, expected, _check.OTHER_NUMBERS
    )
    return matrix


def rank_in(matrix: Matrix, moment: Any) -> int:
    """The rank that a moment's shape shows; 0 if it has no rank axis."""
    shape, rank_axis = jnp.shape(moment), len(matrix.batch_shape)
    return shape[rank_axis] if len(shape) > rank_axis else 0


def state_sharding(
    state: Any,
    params: Any,
    *,
    weight_dimension_numbers: WeightDimensionNumbers = None,
) -> Any:
    """The sharding of every leaf of an optimizer state on its parameters' mesh.

    Works on the state of any Optax pipeline that contains states of this library:
    inside ``chain``, ``masked``, ``partition``, ``MultiSteps``, ``inject_hyperparams``,
    a Linen ``TrainState``'s ``opt_state`` or ``nnx.state(optimizer)``.

    * A state leaf takes a parameter's sharding if it has the parameter's shape and its
      path ends with the parameter's path.
    * Fields of a matrix, such as moments and norms, are recognised by their names.
      Moments are sharded over the same devices as the parameter: along the channel side
      if its size divides, else along the rank axis if that divides, and otherwise they
      are replicated. A momentum is sharded like the parameter, and a vector along a
      side, such as a factor of RACS, like that side.
    * Everything else (counts, keys, hyperparameters) is replicated.

    A leaf that belongs to a parameter has the parameter's memory kind.

    Args:
      state: an optimizer state, of arrays or ``jax.ShapeDtypeStruct`` (from
        ``jax.eval_shape(tx.init, params)``).
      params: the parameters, of arrays or ``jax.ShapeDtypeStruct`` with
        ``NamedSharding`` on one mesh; leaves without one count as replicated. Under
        ``optax.lookahead``, its fast parameters.
      weight_dimension_numbers: the dimension numbers that the optimizer was given.

    Returns:
      A tree of the structure of `state` with a ``NamedSharding`` for every leaf, for
      the ``out_shardings`` of ``jax.jit`` or for ``jax.device_put``.

    Raises:
      ValueError: if no parameter has a ``NamedSharding``, or if moments have shapes
        that do not follow from `weight_dimension_numbers`.

    Examples:
      On a mesh of eight devices, which need not be there:

      >>> import jax, jax.numpy as jnp, apollo_optax
      >>> from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec as P
      >>> by_rows = NamedSharding(AbstractMesh((8,), ("fsdp",)), P("fsdp"))
      >>> kernel = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=by_rows)
      >>> params = {"kernel": kernel}
      >>> tx = apollo_optax.apollo(0.01, rank=4)
      >>> shardings = state_sharding(jax.eval_shape(tx.init, params), params)
      >>> tuple(shardings[0].mu["kernel"].spec)
      (None, 'fsdp')
    """
    leaves = _tree.leaves_by_path(params)
    shardings = {path: _sharding.sharding_of(leaf) for path, leaf in leaves.items()}
    on_mesh = next((s for s in shardings.values() if s is not None), None)
    replicated = _sharding.replicated(on_mesh)
    if replicated is None:
        raise ValueError(
            "no parameter has a NamedSharding, so there is no mesh to place the state "
            "on; give params as arrays on a mesh, or as jax.ShapeDtypeStruct(shape, "
            "dtype, sharding=...)"
        )
    axes = resolve(weight_dimension_numbers, params)
    states = _tree.leaves_by_path(state)

    def leaf_sharding(path: _tree.Path, leaf: Any, owner: Owner) -> NamedSharding:
        if owner.parameter is None:
            return replicated
        param, shape = leaves[owner.parameter], jnp.shape(leaf)
        sharding = shardings[owner.parameter] or replicated
        matrix = None
        if (matrix_axes := axes[owner.parameter]) is not None:
            matrix = Matrix.of_parameter(param, matrix_axes, jnp.float32, 0)
        if owner.rule is not None:
            matrix = owned_matrix(owner, leaf, param, matrix)
            return field_sharding(owner.rule, matrix, sharding) or replicated
        if shape == jnp.shape(param):
            return sharding
        # The state of limit_norm_growth has a norm per matrix.
        in_norm = path[-len(owner.parameter) - 1 :][:1] == ("norm",)
        if matrix is not None and in_norm and shape == matrix.batch_shape:
            return matrix.norm_sharding or replicated
        return _sharding.sharding_of_axes(sharding, ()) or replicated

    found = owners(states, leaves)
    placed = [leaf_sharding(path, leaf, found[path]) for path, leaf in states.items()]
    return jax.tree.unflatten(jax.tree.structure(state), placed)

"""How a run stores its weights: float32, bfloat16 or int8, on the device or the host.

Int8 and host memory are for the layers' kernels; embeddings, head and norms are in the
compute dtype and on the device. Both are filled a layer at a time, since the whole
stack in bfloat16 may not fit.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import apollo_optax
from apollo_optax import QuantizedArray
from examples.llama.mesh import shard_count
from examples.llama.model import Params
from examples.llama.optimizers.parameters import KERNELS, path_name
from examples.llama.partition import spec_of


def on_mesh(value: np.ndarray, sharding: jax.sharding.Sharding) -> jax.Array:
    """Returns a sharded array from a value that every process has in full."""
    return jax.make_array_from_callback(
        value.shape, sharding, lambda index: value[index]
    )


@dataclasses.dataclass(frozen=True)
class Storage:
    """The dtype and the memory in which the layers' kernels are stored."""

    mesh: jax.sharding.Mesh
    int8: bool = False
    offload: bool = False

    @property
    def a_layer_at_a_time(self) -> bool:
        return self.int8 or self.offload

    def stored(self, params: Params) -> Params:
        """Converts parameters, traced or not; they are still on the device."""

        def convert(path: tuple[Any, ...], leaf: jax.Array) -> Any:
            return (
                self._stored_kernel(leaf)
                if re.search(KERNELS, path_name(path))
                else leaf
            )

        return jax.tree_util.tree_map_with_path(convert, params)

    def _stored_kernel(self, kernel: jax.Array) -> Any:
        if not self.int8:
            return kernel
        quantized = apollo_optax.quantize(kernel, axis=-2)
        if not self.offload:
            return quantized
        # The values stay the same. TPUs can fetch one layer of float32 from host
        # memory.
        return dataclasses.replace(quantized, scale=quantized.scale.astype(jnp.float32))

    def placed(self, params: Params) -> Params:
        """Adds shardings to the abstract parameters that `stored` returns.

        They are the shardings of the parameters that these stand for.
        """

        def place(
            x: Any, spec: jax.P, *, in_memory: bool = False
        ) -> jax.ShapeDtypeStruct:
            kind = "pinned_host" if in_memory and self.offload else None
            sharding = jax.sharding.NamedSharding(self.mesh, spec, memory_kind=kind)
            return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

        def place_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
            name = path_name(path)
            if isinstance(leaf, QuantizedArray):
                layers, groups, columns = spec = self._group_spec(name, leaf)
                # Zero points stay on the device. A TPU can fetch a layer of them only
                # if the number of groups is a multiple of four.
                return dataclasses.replace(
                    leaf,
                    qvalue=place(
                        leaf.qvalue,
                        jax.P(layers, groups, None, None, columns),
                        in_memory=True,
                    ),
                    scale=place(leaf.scale, spec, in_memory=True),
                    zero_point=place(leaf.zero_point, spec),
                )
            spec = spec_of(name, leaf.shape, self.mesh)
            return place(leaf, spec, in_memory=bool(re.search(KERNELS, name)))

        return jax.tree_util.tree_map_with_path(
            place_leaf, params, is_leaf=lambda x: isinstance(x, QuantizedArray)
        )

    def _group_spec(self, name: str, kernel: QuantizedArray) -> jax.P:
        """Returns the spec of the groups (L, groups, out) of a kernel (L, in, out).

        A group has one scale and stays on one device. Mesh axes that would split groups
        shard the outputs instead, if they divide these.
        """
        _, groups, outputs = kernel.scale.shape
        layers, rows, columns = spec = spec_of(
            name, kernel.shape, self.mesh, kernel.scale.shape
        )
        if groups % shard_count(self.mesh, rows) == 0:
            return spec
        both = (columns, rows)
        divides = outputs % shard_count(self.mesh, both) == 0
        return jax.P(layers, None, both if divides else columns)

    def abstract(self, shapes: Params) -> Params:
        """Returns the stored shapes, dtypes and shardings of parameters of `shapes`."""
        return self.placed(jax.eval_shape(self.stored, shapes))

    def filled(
        self, shapes: Params, rest: Params, layer: Callable[[int], Params]
    ) -> Params:
        """Returns the parameters, of which one layer at a time exists in full.

        Args:
            shapes: all parameters, abstract, in the dtype in which they are computed
                with.
            rest: the parameters outside the layers, at their paths.
            layer: returns the parameters of a layer, by its number, as a stack of one.
        """
        layers = self.abstract(shapes)["layers"]
        shardings = jax.tree.map(lambda x: x.sharding, layers)
        if self.offload:
            # A program would first make the stack on the device, where it may not fit.
            stack = jax.tree.map(
                lambda x: on_mesh(np.zeros(x.shape, x.dtype), x.sharding), layers
            )
        else:
            stack = jax.jit(
                lambda: jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), layers),
                out_shardings=shardings,
            )()
        with_layer = jax.jit(
            self._with_layer, donate_argnums=0, out_shardings=shardings
        )
        for index in range(jax.tree.leaves(layers)[0].shape[0]):
            stack = with_layer(stack, layer(index), np.int32(index))
        return {**rest, "layers": stack}

    def _with_layer(self, stack: Params, layer: Params, index: jax.Array) -> Params:
        def write(stack: jax.Array, row: jax.Array) -> jax.Array:
            row = jax.device_put(row, jax.typeof(stack).memory_space)
            return jax.lax.dynamic_update_slice_in_dim(stack, row, index, 0)

        return jax.tree.map(write, stack, self.stored({"layers": layer})["layers"])

"""Weights and tokenizers in Hugging Face's format: reads and writes a folder.

The folder has safetensors and JSON files. A linear layer's weight is (out, in) there,
one tensor per layer; here it is (in, out), stacked over the layers. Each tensor is thus
a transposed view of one layer of a leaf, read and written by itself. Rotary embeddings
pair (h, h + H/2) in both, so no rows change places.
"""

import contextlib
import functools
import json
import math
import shlex
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from examples.llama.config import LlamaConfig
from examples.llama.hf.config import CONFIG, hf_config, write_json
from examples.llama.hf.folder import INDEX, WEIGHTS, indexed_files
from examples.llama.hf.pretrained import Files, pass_on, with_token_ids
from examples.llama.model import Params, flatten, init_params, unflatten
from examples.llama.run.errors import UsageError, first_line, unknown_name
from examples.llama.text.decoding import DocumentError
from examples.llama.text.digests import content_digest
from examples.llama.text.hub import TOKENIZER, TOKENIZER_CONFIG

PYTORCH_WEIGHTS = ("pytorch_model.bin", "pytorch_model.bin.index.json")
DTYPES = ("float32", "bfloat16")
STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}

_D, _F, _V, _HEAD = "hidden_size", "intermediate_size", "vocab_size", "head_dim"
_Q, _KV = "num_attention_heads * head_dim", "num_key_value_heads * head_dim"
# The keys are the paths in the trees of all families. The values are the tensor's name,
# and the fields of config.json that make its shape, for errors.
NAMES: dict[str, tuple[str, tuple[str, ...]]] = {
    "embed/embedding": ("model.embed_tokens.weight", (_V, _D)),
    "layers/attention_norm/scale": ("model.layers.{}.input_layernorm.weight", (_D,)),
    "layers/attention/q_proj/kernel": (
        "model.layers.{}.self_attn.q_proj.weight",
        (_Q, _D),
    ),
    "layers/attention/k_proj/kernel": (
        "model.layers.{}.self_attn.k_proj.weight",
        (_KV, _D),
    ),
    "layers/attention/v_proj/kernel": (
        "model.layers.{}.self_attn.v_proj.weight",
        (_KV, _D),
    ),
    "layers/attention/q_proj/bias": ("model.layers.{}.self_attn.q_proj.bias", (_Q,)),
    "layers/attention/k_proj/bias": ("model.layers.{}.self_attn.k_proj.bias", (_KV,)),
    "layers/attention/v_proj/bias": ("model.layers.{}.self_attn.v_proj.bias", (_KV,)),
    "layers/attention/q_norm/scale": (
        "model.layers.{}.self_attn.q_norm.weight",
        (_HEAD,),
    ),
    "layers/attention/k_norm/scale": (
        "model.layers.{}.self_attn.k_norm.weight",
        (_HEAD,),
    ),
    "layers/attention/o_proj/kernel": (
        "model.layers.{}.self_attn.o_proj.weight",
        (_D, _Q),
    ),
    "layers/mlp_norm/scale": ("model.layers.{}.post_attention_layernorm.weight", (_D,)),
    "layers/mlp/gate_proj/kernel": ("model.layers.{}.mlp.gate_proj.weight", (_F, _D)),
    "layers/mlp/up_proj/kernel": ("model.layers.{}.mlp.up_proj.weight", (_F, _D)),
    "layers/mlp/down_proj/kernel": ("model.layers.{}.mlp.down_proj.weight", (_D, _F)),
    "final_norm/scale": ("model.norm.weight", (_D,)),
    "lm_head/kernel": ("lm_head.weight", (_V, _D)),
}
EMBEDDING, HEAD = NAMES["embed/embedding"][0], NAMES["lm_head/kernel"][0]


class HfTensor(NamedTuple):
    """A tensor of a Hugging Face model, and where in the model's tree it is."""

    name: str
    shape: tuple[int, ...]
    """(out, in) for a kernel."""
    path: str
    """The path of its leaf, such as layers/mlp/up_proj/kernel."""
    layer: int | None
    """None where the leaf is not stacked."""

    def view(self, leaf: np.ndarray) -> np.ndarray:
        """Returns this tensor as a view of `leaf`; writing to it writes to the leaf."""
        return self.oriented(leaf if self.layer is None else leaf[self.layer])

    def oriented(self, part: np.ndarray) -> np.ndarray:
        return part.T if self.path.endswith("/kernel") else part


class WeightReader:
    """Reads a model's weights from its folder, the layers one at a time.

    It reads `model.safetensors`, or the shards of `model.safetensors.index.json`, one
    tensor at a time. Host memory has the result of a method, and one tensor more.

    Args:
        folder: the folder with the weights, in float32, bfloat16 or float16.
        config: the model's shape, from `read_config`.
        param_dtype: the dtype that the weights are cast to, float32 or bfloat16.

    Raises:
        UsageError: if a file is missing or corrupt, or a tensor is missing,
            superfluous, or of another shape or dtype. Only the files' headers have been
            read by then.
    """

    def __init__(self, folder: Path, config: LlamaConfig, param_dtype: str) -> None:
        check_dtype(param_dtype)
        self.config = config
        self._dtype = jnp.dtype(param_dtype)
        self._shapes = {path: leaf.shape for path, leaf in shapes_of(config).items()}
        self._tensors = tensors_of(config)
        self._files = locate(
            folder, config, {tensor.name: tensor for tensor in self._tensors}
        )

    def outside_layers(self) -> Params:
        """Returns the parameters outside the layers, in numpy arrays.

        A tied model may come with an `lm_head.weight`, which must then be the
        embedding. Raises `UsageError` if it is not, or a file can't be read.
        """
        tensors = [tensor for tensor in self._tensors if tensor.layer is None]
        leaves = {
            tensor.path: np.empty(self._shapes[tensor.path], self._dtype)
            for tensor in tensors
        }
        self._read(tensors, leaves)
        if self.config.tied_head and HEAD in self._files:
            self._check_tied_head(leaves["embed/embedding"])
        return unflatten(leaves)

    def layer(self, index: int) -> Params:
        """Returns the parameters of a layer as a stack of one, in numpy arrays.

        Raises `UsageError` if a file can't be read.
        """
        tensors = [
            tensor._replace(layer=0)
            for tensor in self._tensors
            if tensor.layer == index
        ]
        leaves = {
            tensor.path: np.empty((1, *self._shapes[tensor.path][1:]), self._dtype)
            for tensor in tensors
        }
        self._read(tensors, leaves)
        return unflatten(leaves)["layers"]

    def _read(self, tensors: list[HfTensor], leaves: Mapping[str, np.ndarray]) -> None:
        for file in sorted({self._files[tensor.name] for tensor in tensors}):
            with opened(file) as weights:
                for tensor in tensors:
                    if self._files[tensor.name] == file:
                        leaf = tensor.view(leaves[tensor.path])
                        leaf[...] = weights.get_tensor(tensor.name)

    def _check_tied_head(self, embedding_VxD: np.ndarray) -> None:
        with opened(self._files[HEAD]) as weights:
            head_VxD = weights.get_tensor(HEAD).astype(self._dtype)
        if not np.array_equal(head_VxD, embedding_VxD):
            raise UsageError(
                f"{self._files[HEAD]}: {HEAD} is not {EMBEDDING}, though {CONFIG} says "
                "tie_word_embeddings; set that to false, or remove the tensor"
            )


def load_params(folder: Path, config: LlamaConfig, param_dtype: str) -> Params:
    """Returns all weights of `folder`, in numpy arrays.

    They have the structure and shapes of `init_params(config, ...)`. The arguments and
    errors are those of `WeightReader`. Host memory has the model once, and one layer.
    """
    reader = WeightReader(folder, config, param_dtype)
    stacks = {
        path: np.empty(leaf.shape, jnp.dtype(param_dtype))
        for path, leaf in shapes_of(config).items()
        if path.startswith("layers/")
    }
    for index in range(config.num_layers):
        for path, row in flatten(reader.layer(index)).items():
            stacks[f"layers/{path}"][index] = row[0]
    return reader.outside_layers() | unflatten(stacks)


def save_pretrained(
    params: Params,
    config: LlamaConfig,
    folder: Path,
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    tokenizer: tokenizers.Tokenizer | None = None,
    end_token: str | None = None,
    passed_on: Files = MappingProxyType({}),
) -> None:
    """Writes a folder that transformers loads as a model and its tokenizer.

    The files are written to a hidden folder next to it, which is renamed when they are
    complete. If the parameters are on devices, the host has at most one shard of them.

    Args:
        params: jax or numpy arrays, of the structure and shapes of
            `init_params(config, ...)`.
        config: the model's shape.
        folder: the folder to write, which must be empty or missing.
        dtype: the dtype of the written weights, float32 or bfloat16; by default that of
            `params`.
        max_shard_bytes: the largest size of a file, unless a single tensor is larger.
        tokenizer: a tokenizer to write too.
        end_token: the token that ends a text; transformers calls it `eos_token`.
        passed_on: files of the model that the training began from, by name; see
            `pretrained.find_files`. Those of its tokenizer are written as they are.

    Raises:
        UsageError: for an invalid argument, before anything is written, and if the
            files can't be written, with none left behind.
    """
    folder = folder.resolve()
    check_free(folder)
    leaves = flatten(params)
    check_leaves(leaves, config)
    for name in {dtype or leaf.dtype.name for leaf in leaves.values()}:
        check_dtype(name)
    if max_shard_bytes <= 0:
        raise UsageError(
            f"max_shard_bytes {max_shard_bytes} is out of range; give a number above 0"
        )
    end_id = check_tokenizer(tokenizer, end_token, config)
    with new_folder(folder) as built:
        stored = dtype or leaves["embed/embedding"].dtype.name
        fields = hf_config(config, stored, end_id)
        write_json(built / CONFIG, with_token_ids(fields, passed_on, tokenizer))
        write_weights(built, leaves, tensors_of(config), dtype, max_shard_bytes)
        if tokenizer:
            write_tokenizer(built, tokenizer, end_token, config)
        pass_on(built, passed_on, end_token)


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields a hidden folder, which becomes `folder` when the block ends.

    Raises:
        UsageError: if its files can't be written. None is left behind then.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(
            dir=folder.parent, prefix=f".{folder.name}."
        ) as temporary:
            built = Path(temporary) / folder.name
            built.mkdir()
            yield built
            built.rename(folder)
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot write {folder}: {first_line(error)}; free space or choose another "
            "folder"
        ) from error


def check_free(folder: Path) -> None:
    """Raises `UsageError` unless `folder` is empty or missing, to overwrite nothing."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"{folder} is a file; choose a folder")
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(
            f"{folder} already holds files; choose a folder that is empty or not there"
        )


def tensors_of(config: LlamaConfig) -> list[HfTensor]:
    """Returns all tensors of a model, with those of a layer next to each other.

    Neighbouring tensors are mostly in the same file.
    """
    shapes = shapes_of(config)

    def tensor(path: str, layer: int | None = None) -> HfTensor:
        shape = shapes[path].shape if layer is None else shapes[path].shape[1:]
        name = NAMES[path][0].format(layer)
        return HfTensor(
            name, shape[::-1] if path.endswith("/kernel") else shape, path, layer
        )

    stacked = [path for path in NAMES if path.startswith("layers/") and path in shapes]
    return [
        tensor("embed/embedding"),
        *(
            tensor(path, layer)
            for layer in range(config.num_layers)
            for path in stacked
        ),
        tensor("final_norm/scale"),
        *([] if config.tied_head else [tensor("lm_head/kernel")]),
    ]


def shapes_of(config: LlamaConfig) -> dict[str, Any]:
    """Returns the `jax.ShapeDtypeStruct` of each parameter, by path."""
    return flatten(jax.eval_shape(functools.partial(init_params, config, seed=0)))


def check_leaves(leaves: Mapping[str, Any], config: LlamaConfig) -> None:
    expected = {path: leaf.shape for path, leaf in shapes_of(config).items()}
    found = {path: leaf.shape for path, leaf in leaves.items()}
    for path in sorted(expected.keys() | found.keys()):
        if found.get(path) != expected.get(path):
            raise UsageError(
                f"params: {path} is {found.get(path, 'missing')}, but "
                f"{expected.get(path, 'missing')} in a model of this config; give the "
                "config that the parameters were made with"
            )


def check_dtype(dtype: str) -> None:
    if dtype not in DTYPES:
        raise unknown_name("dtype", dtype, DTYPES)


@contextlib.contextmanager
def opened(file: Path) -> Iterator[Any]:
    """Opens a safetensors file; an error in reading it or a tensor names the file."""
    try:
        with safe_open(file, framework="np") as weights:
            yield weights
    except (OSError, SafetensorError) as error:
        raise UsageError(
            f"cannot read {file}: {first_line(error)}; download it again"
        ) from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of `folder`.

    Raises `UsageError` if one is missing.
    """
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        raise no_safetensors(folder)
    files = [folder / name for name in indexed_files(folder)]
    for file in files:
        if not file.exists():
            raise UsageError(
                f"{file} is not there, though {INDEX} names it; download it"
            )
    return files


def weights_digest(folder: Path) -> str:
    """Returns a digest of a model's weights. Unchanged files are not read again.

    Raises `UsageError` if the weights cannot be read.
    """
    files = {file.name: file for file in weight_files(folder)}
    try:
        return content_digest(f"weights of {folder.resolve()}", files)
    except DocumentError as error:
        raise UsageError(str(error)) from error


def no_safetensors(folder: Path) -> UsageError:
    for name in PYTORCH_WEIGHTS:
        if (folder / name).exists():
            # Reading such a file needs PyTorch, and can run code that is in the file.
            new = f"{folder.resolve()}-safetensors"
            return UsageError(
                f"{folder} has its weights in {name}, not in {WEIGHTS}; convert them "
                f"with `{conversion(folder, new)}` where transformers and torch are "
                f"installed, and give {new}"
            )
    return UsageError(
        f"{folder} holds neither {WEIGHTS} nor {INDEX}; give a folder that "
        "save_pretrained wrote, or convert its weights to safetensors"
    )


def conversion(folder: Path, new: str) -> str:
    """Returns a command line that writes a model and its tokenizer as safetensors."""
    old, new = json.dumps(str(folder)), json.dumps(new)
    code = (
        "from transformers import AutoModelForCausalLM as M, AutoTokenizer as T; "
        f'M.from_pretrained({old}, torch_dtype="auto")'
        f".save_pretrained({new}, safe_serialization=True); "
        f"T.from_pretrained({old}).save_pretrained({new})"
    )
    return f"python -c {shlex.quote(code)}"


def locate(
    folder: Path, config: LlamaConfig, tensors: Mapping[str, HfTensor]
) -> dict[str, Path]:
    """Returns the file of each tensor, and of a tied model's head if there is one.

    Reads only the files' headers. Raises `UsageError` for the first tensor that differs
    from `tensors`.
    """
    # Early versions stored constants of the rotary embeddings, `inv_freq`, which are
    # ignored.
    expected = dict(tensors)
    if config.tied_head:
        expected[HEAD] = tensors[EMBEDDING]
    files: dict[str, Path] = {}
    for file in weight_files(folder):
        with opened(file) as weights:
            for name in weights.keys():  # noqa: SIM118 (a safetensors file can't be iterated over)
                if name.endswith("rotary_emb.inv_freq"):
                    continue
                if name not in expected:
                    raise UsageError(
                        f"{file}: {name} is no tensor of a {config.model_type} of "
                        f"{config.num_layers} layers; correct num_hidden_layers or "
                        f"model_type in {CONFIG}, or choose another model"
                    )
                if name in files:
                    raise UsageError(
                        f"{file}: {name} is also in {files[name]}; remove one of the "
                        "two"
                    )
                check_stored(file, name, weights.get_slice(name), expected[name])
                files[name] = file
    missing = [name for name in tensors if name not in files]
    if missing:
        others = f" and {len(missing) - 1} other tensors" if len(missing) > 1 else ""
        raise UsageError(
            f"{folder} lacks {missing[0]}{others}; download the rest, or correct "
            f"num_hidden_layers {config.num_layers} or tie_word_embeddings "
            f"{str(config.tied_head).lower()} in {CONFIG}"
        )
    return files


def check_stored(file: Path, name: str, stored: Any, tensor: HfTensor) -> None:
    """Raises `UsageError` unless `stored` has a known dtype and `tensor`'s shape."""
    shape, dtype = tuple(stored.get_shape()), stored.get_dtype()
    if dtype not in STORED_DTYPES:
        supported = ", ".join(STORED_DTYPES.values())
        raise UsageError(
            f"{file}: {name} is of dtype {dtype}; convert it to one of: {supported}"
        )
    if shape != tensor.shape:
        raise UsageError(
            f"{file}: {name} is {shape}, but {tensor.shape} by "
            f"({', '.join(NAMES[tensor.path][1])}) in {CONFIG}; correct that, or "
            "choose the weights that belong to it"
        )


def write_weights(
    folder: Path,
    leaves: Mapping[str, Any],
    tensors: list[HfTensor],
    dtype: str | None,
    max_shard_bytes: int,
) -> None:
    """Writes one file, or shards and an index if it would exceed `max_shard_bytes`."""
    sizes = [
        math.prod(t.shape) * jnp.dtype(dtype or leaves[t.path].dtype).itemsize
        for t in tensors
    ]
    shards = cut_into_shards(tensors, sizes, max_shard_bytes)
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = (
            f"model-{number:05}-of-{len(shards):05}.safetensors"
            if len(shards) > 1
            else WEIGHTS
        )
        save_file(
            {
                tensor.name: fetch(leaves[tensor.path], tensor, dtype)
                for tensor in shard
            },
            folder / file,
            # transformers 4 refuses files without this field.
            metadata={"format": "pt"},
        )
        # Some versions of safetensors write files that no other user can read.
        (folder / file).chmod((folder / CONFIG).stat().st_mode)
        weight_map |= {tensor.name: file for tensor in shard}
    if len(shards) > 1:
        write_json(
            folder / INDEX,
            {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map},
        )


def cut_into_shards(
    tensors: Iterable[HfTensor], sizes: Iterable[int], max_shard_bytes: int
) -> list[list[HfTensor]]:
    """Returns the tensors in order, in groups whose size in bytes is limited."""
    shards: list[list[HfTensor]] = []
    left = -1
    for tensor, size in zip(tensors, sizes, strict=True):
        if size > left:
            shards.append([])
            left = max_shard_bytes
        shards[-1].append(tensor)
        left -= size
    return shards


def fetch(leaf: Any, tensor: HfTensor, dtype: str | None) -> np.ndarray:
    """Returns one contiguous tensor; only its layer is copied from a device."""
    part = np.asarray(leaf if tensor.layer is None else leaf[tensor.layer])
    return np.ascontiguousarray(tensor.oriented(part), jnp.dtype(dtype or part.dtype))


def check_tokenizer(
    tokenizer: tokenizers.Tokenizer | None, end_token: str | None, config: LlamaConfig
) -> int | None:
    """Returns the id of the token that ends a text.

    Raises `UsageError` if the model has no such token.
    """
    ids = tokenizer.get_vocab(with_added_tokens=True).values() if tokenizer else ()
    if (largest := max(ids, default=0)) >= config.vocab_size:
        raise UsageError(
            f"tokenizer has a token of id {largest}, but the model's vocab_size is "
            f"{config.vocab_size}; give the tokenizer it was trained with"
        )
    if end_token is None:
        return None
    end_id = tokenizer.token_to_id(end_token) if tokenizer else None
    if end_id is None:
        raise UsageError(
            f"end_token {end_token!r} is no token of the tokenizer; give one that is"
        )
    return end_id


def write_tokenizer(
    folder: Path,
    tokenizer: tokenizers.Tokenizer,
    end_token: str | None,
    config: LlamaConfig,
) -> None:
    (folder / TOKENIZER).write_text(tokenizer.to_str(pretty=True), "utf-8")
    fields = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": end_token,
        "model_max_length": config.max_seq_len,
        # Otherwise transformers 4 would drop spaces before punctuation.
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / TOKENIZER_CONFIG, fields)

"""config.json of a Hugging Face model of a known family, read and written."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar

from examples.llama.config import FAMILIES, LlamaConfig, RopeScaling
from examples.llama.run.errors import UsageError
from examples.llama.text.decoding import DocumentError, decode, parse_json

CONFIG = "config.json"
# Fields that Transformers reads for all or some families. The model supports only these
# values, so any other value is rejected.
FIXED: dict[str, dict[str, Any]] = {
    "llama": {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False},
    "qwen2": {"hidden_act": "silu", "use_sliding_window": False},
    "qwen3": {
        "hidden_act": "silu",
        "attention_bias": False,
        "use_sliding_window": False,
    },
    "mistral": {"hidden_act": "silu"},
}

# Values that mean the same: the class's name in the first conversions of LLaMA, and
# another name of silu in Transformers.
SYNONYMS = {"LlamaForCausalLM": "LLaMAForCausalLM", "silu": "swish"}


class Defaults(NamedTuple):
    """The defaults of Transformers for missing fields of a config.json."""

    max_seq_len: int
    num_kv_heads: int | None = None
    """None means as many as there are heads."""
    head_size: int = 0
    """0 means the hidden size divided by the number of heads."""
    sliding_window: int | None = None
    """None means that the family has no field `sliding_window`, or does not use it."""


DEFAULTS = {
    "llama": Defaults(2048),
    "qwen2": Defaults(32_768, num_kv_heads=32),
    "qwen3": Defaults(32_768, num_kv_heads=32, head_size=128),
    "mistral": Defaults(131_072, num_kv_heads=8, sliding_window=4096),
}

Number = TypeVar("Number", int, float)


def read_config(folder: Path) -> LlamaConfig:
    """Returns the shape that `folder/config.json` describes.

    Rotary embeddings are read from `rope_parameters`, which transformers 5 writes, and
    from `rope_theta` and `rope_scaling`, which earlier versions write. A field that is
    missing or null has transformers' default, except for the sizes, which every model
    sets.

    Raises:
        UsageError: if the file or one of its fields is missing or unusable, or if the
            model's family is not one that `model.py` supports.
    """
    fields = Fields(folder / CONFIG, read_json(folder / CONFIG))
    if "model_config" in fields.values:
        raise UsageError(
            f"{folder} is a run's folder; give an export of it, which "
            "python -m examples.llama.export writes"
        )
    model_type = read_family(fields)
    defaults = DEFAULTS[model_type]
    num_heads = fields.number("num_attention_heads", int)
    max_seq_len = fields.number(
        "max_position_embeddings", int, default=defaults.max_seq_len
    )
    rope_theta, rope_scaling = read_rope(fields, max_seq_len)
    try:
        return LlamaConfig(
            vocab_size=fields.number("vocab_size", int),
            hidden_size=fields.number("hidden_size", int),
            intermediate_size=fields.number("intermediate_size", int),
            num_heads=num_heads,
            num_layers=fields.number("num_hidden_layers", int),
            num_kv_heads=read_kv_heads(fields, num_heads, defaults.num_kv_heads),
            head_size=fields.number("head_dim", int, default=defaults.head_size),
            max_seq_len=max_seq_len,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            rms_norm_eps=fields.number("rms_norm_eps", float, default=1e-6),
            initializer_range=fields.number("initializer_range", float, default=0.02),
            tied_head=read_tied_head(fields),
            model_type=model_type,
            sliding_window=read_window(fields, defaults.sliding_window),
        )
    except ValueError as error:
        raise UsageError(f"{fields.path}: {error}; correct it") from error


def read_family(fields: "Fields") -> str:
    """Returns the model's family, a key of `FAMILIES`.

    Raises `UsageError` for an unknown family, and for values that are not supported for
    this family.
    """
    family = named_family(fields)
    for name, supported in FIXED[family].items():
        if fields.values.get(name) not in (None, supported, SYNONYMS.get(supported)):
            raise fields.unsupported(name, supported)
    kinds = fields.values.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else ():
        if kind != "full_attention":
            raise UsageError(
                f"{fields.path}: {kind!r} in layer_types is not supported; choose a "
                "model with 'full_attention' in all layers"
            )
    return family


def named_family(fields: "Fields") -> str:
    """Returns the family that `model_type` and `architectures` name, if both agree."""
    model_type = fields.values.get("model_type")
    if model_type is not None and model_type not in tuple(FAMILIES):
        raise fields.unsupported("model_type", *FAMILIES)
    architectures = fields.values.get("architectures")
    if architectures is None:
        # Some early conversions of LLaMA have neither field.
        return model_type or "llama"
    candidates = FAMILIES if model_type is None else [model_type]
    for name in candidates:
        architecture = FAMILIES[name].architecture
        if architectures in ([architecture], [SYNONYMS.get(architecture)]):
            return name
    known = ([FAMILIES[name].architecture] for name in candidates)
    raise fields.unsupported("architectures", *known)


def read_kv_heads(fields: "Fields", num_heads: int, default: int | None) -> int:
    """Returns the number of heads of keys and values.

    In transformers, null means as many as there are query heads in all families, but a
    missing field has the family's default.
    """
    missing = "num_key_value_heads" not in fields.values
    return fields.number(
        "num_key_value_heads",
        int,
        default=default if missing and default else num_heads,
    )


def read_tied_head(fields: "Fields") -> bool:
    tied_head = fields.values.get("tie_word_embeddings")
    if not isinstance(tied_head, bool | NoneType):
        raise UsageError(
            f"{fields.path}: tie_word_embeddings is {tied_head!r}; give true or false"
        )
    return bool(tied_head)


def read_window(fields: "Fields", default: int | None) -> int | None:
    """Returns the window of attention; here null means that there is none."""
    if default is None:
        return None
    if fields.values.get("sliding_window", default) is None:
        return None
    return fields.number("sliding_window", int, default=default)


def hf_config(config: LlamaConfig, dtype: str, end_id: int | None) -> dict[str, Any]:
    """Returns the fields of config.json, as transformers 4 and 5 both read them.

    A Mistral's window is written even if it is null, since a missing field means the
    default.
    """
    scaling = config.rope_scaling
    window = (
        {"sliding_window": config.sliding_window}
        if DEFAULTS[config.model_type].sliding_window
        else {}
    )
    return {
        "architectures": [FAMILIES[config.model_type].architecture],
        "model_type": config.model_type,
        **FIXED[config.model_type],
        **window,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_size,
        "max_position_embeddings": config.max_seq_len,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
        "rms_norm_eps": config.rms_norm_eps,
        "initializer_range": config.initializer_range,
        "tie_word_embeddings": config.tied_head,
        "torch_dtype": dtype,
        # The field is written even if empty. Otherwise transformers takes tokens 1 and
        # 2.
        "bos_token_id": None,
        "eos_token_id": end_id,
    }


class Fields(NamedTuple):
    """A JSON object; errors name its file, and its field by the prefix."""

    path: Path
    values: dict[str, Any]
    prefix: str = ""

    def number(
        self, name: str, kind: type[Number], default: Number | None = None
    ) -> Number:
        """Returns a number above 0; null counts as missing, as in transformers."""
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise UsageError(f"{self.path} lacks {self.prefix}{name}; add it")
            return default
        types = (int, float) if kind is float else int
        if (
            not isinstance(value, types)
            or isinstance(value, bool)
            or not 0 < value < math.inf
        ):
            noun = "number" if kind is float else "whole number"
            raise UsageError(
                f"{self.path}: {self.prefix}{name} is {value!r}; give a {noun} above 0"
            )
        return kind(value)

    def unsupported(self, name: str, *supported: object) -> UsageError:
        values = " or ".join(map(repr, supported))
        return UsageError(
            f"{self.path}: {self.prefix}{name} {self.values[name]!r} is not supported; "
            f"choose a model with {values}"
        )


def read_rope(fields: Fields, max_seq_len: int) -> tuple[float, RopeScaling | None]:
    """Returns theta and the scaling.

    If fields contradict each other, the fields that transformers 5 uses count.
    """
    name = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    values = fields.values.get(name) or {}
    if not isinstance(values, dict):
        raise UsageError(f"{fields.path}: {name} is {values!r}; give an object or null")
    rope = Fields(fields.path, values, f"{name}.")
    theta = rope.number(
        "rope_theta",
        float,
        default=fields.number("rope_theta", float, default=10_000.0),
    )
    key = "rope_type" if "rope_type" in values else "type"
    if values.get(key) in (None, "default"):
        return theta, None
    if values[key] != "llama3":
        raise rope.unsupported(key, "default", "llama3")
    scaling = RopeScaling(
        factor=rope.number("factor", float),
        low_freq_factor=rope.number("low_freq_factor", float),
        high_freq_factor=rope.number("high_freq_factor", float),
        original_max_seq_len=rope.number(
            "original_max_position_embeddings", int, default=max_seq_len
        ),
    )
    if scaling.low_freq_factor >= scaling.high_freq_factor:
        raise UsageError(
            f"{fields.path}: {name}.low_freq_factor {scaling.low_freq_factor} is not "
            f"below high_freq_factor {scaling.high_freq_factor}; correct them"
        )
    return theta, scaling


def read_json(path: Path) -> dict[str, Any]:
    """Returns the JSON object in a file; raises `UsageError` if there is none."""
    again = "download it again"
    try:
        value = parse_json(decode(path.read_bytes()), str(path), again)
    except FileNotFoundError:
        raise UsageError(
            f"{path} is not there; give a folder that save_pretrained wrote"
        ) from None
    except OSError as error:
        raise UsageError(
            f"cannot read {path}: {error.strerror}; give a file that can be read"
        ) from error
    except DocumentError as error:
        raise UsageError(str(error)) from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not JSON ({error}); {again}") from error
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object; {again}")
    return value


def write_json(path: Path, fields: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", "utf-8")

"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors."""

import re
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
import numpy as np
import tokenizers
from safetensors.numpy import save_file

from examples.llama.config import LlamaConfig
from examples.llama.hf.config import write_json
from examples.llama.hf.folder import GENERATION_CONFIG
from examples.llama.hf.pretrained import Files, pass_on
from examples.llama.hf.weights import (
    NAMES,
    check_dtype,
    check_free,
    check_tokenizer,
    new_folder,
    write_tokenizer,
)
from examples.llama.lora import ADAPTERS
from examples.llama.model import Params, flatten

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def save_adapters(
    adapters: Params,
    config: LlamaConfig,
    folder: Path,
    *,
    base: str,
    dtype: str | None = None,
    tokenizer: tokenizers.Tokenizer,
    end_token: str | None = None,
    passed_on: Files = MappingProxyType({}),
) -> None:
    """Writes a folder that `peft` loads together with the adapters' model.

    Args:
        adapters: jax or numpy arrays.
        config: the shape with the adapters.
        folder: the folder to write, which must be empty or missing.
        base: the model, a folder or OWNER/NAME[@REVISION], which the files name.
        dtype: float32 or bfloat16; by default the dtype of the adapters.
        tokenizer: the tokenizer, which is written too, like `end_token` and the
            tokenizer's files in `passed_on`; see `weights.save_pretrained`.
        end_token: the token that ends a text.
        passed_on: files of the model, by name.

    Raises:
        UsageError: if something would be overwritten or can't be written.
    """
    folder = folder.resolve()
    check_free(folder)
    if dtype:
        check_dtype(dtype)
    check_tokenizer(tokenizer, end_token, config)
    tensors = peft_tensors(adapters, dtype)
    with new_folder(folder) as built:
        write_json(built / ADAPTER_CONFIG, peft_config(config, base, tensors))
        save_file(tensors, built / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        # Some versions of safetensors write files that no other user can read.
        mode = (built / ADAPTER_CONFIG).stat().st_mode
        (built / ADAPTER_WEIGHTS).chmod(mode)
        write_tokenizer(built, tokenizer, end_token, config)
        files = {name: x for name, x in passed_on.items() if name != GENERATION_CONFIG}
        pass_on(built, files, end_token)


def peft_tensors(adapters: Params, dtype: str | None) -> dict[str, np.ndarray]:
    """Returns a tensor per layer and matrix by PEFT's names: A (r, in), B (out, r)."""
    tensors = {}
    for path, leaf in flatten(adapters).items():
        kernel, letter = re.findall(ADAPTERS, path)[0]
        name = NAMES[f"{kernel}/kernel"][0].removesuffix(".weight")
        for layer, matrix in enumerate(np.asarray(leaf)):
            key = f"base_model.model.{name.format(layer)}.lora_{letter.upper()}.weight"
            tensors[key] = np.ascontiguousarray(
                matrix.T, jnp.dtype(dtype or matrix.dtype)
            )
    return tensors


def peft_config(
    config: LlamaConfig, base: str, tensors: dict[str, np.ndarray]
) -> dict[str, Any]:
    """Returns the fields of adapter_config.json."""
    # A folder may have an @ in its name.
    name, _, revision = (base, "", "") if Path(base).exists() else base.partition("@")
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": name,
        "revision": revision or None,
        "inference_mode": True,
        "r": config.lora_rank,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": sorted({key.split(".")[-3] for key in tensors}),
    }

"""Writes a run's weights in Hugging Face's format.

Run it with `python -m examples.llama.export --run R --to D`.
"""

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import tokenizers

from apollo_optax import dequantize
from examples.llama.config import LlamaConfig, RopeScaling
from examples.llama.hf import pretrained
from examples.llama.hf import weights as hf_weights
from examples.llama.hf.adapters import save_adapters
from examples.llama.hf.folder import weights_folder
from examples.llama.lora import merge
from examples.llama.mesh import make_mesh
from examples.llama.model import Execution, Params
from examples.llama.options import CHOICES, parse
from examples.llama.run.checkpoint import restore_params
from examples.llama.run.errors import (
    UsageError,
    device_memory_is_full,
    exit_on_usage_error,
    first_line,
    notice,
    unknown_name,
)
from examples.llama.run.log import BEST, CHECKPOINTS, CONFIG, TOKENIZER, read_config
from examples.llama.run.setup import abstract_params, trained
from examples.llama.storage import Storage
from examples.llama.text.decoding import decode


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """A run's checkpoint, for `transformers`, vLLM and other readers of its format."""

    run: Path
    """Folder of the run."""
    to: Path
    """Folder to write config.json, *.safetensors and the tokenizer to. It must be empty
    or not exist."""
    step: int | None = None
    """The checkpoint's step; by default the newest."""
    best: bool = False
    """Take the weights with the lowest validation loss, which a fine-tuning keeps."""
    dtype: str | None = None
    """The dtype of the exported weights, float32 or bfloat16. The default is that of
    the run's weights. int8 weights are dequantized."""
    adapter: bool = False
    """For a run with --lora: write only the adapters, in the format of PEFT."""
    merge: bool = False
    """For a run with --lora: write the whole model, with the adapters merged into its
    weights."""

    def __post_init__(self) -> None:
        if self.dtype not in (None, *CHOICES["--compute-dtype"]):
            raise unknown_name("--dtype", str(self.dtype), CHOICES["--compute-dtype"])
        if self.best and self.step is not None:
            raise UsageError(
                f"--best and --step {self.step} both say which weights to take; give "
                "one of them"
            )
        if self.adapter and self.merge:
            raise UsageError(
                "--adapter writes the adapters alone, and --merge the whole model; "
                "give one of them"
            )
        hf_weights.check_free(self.to)


def config_of_run(folder: Path) -> tuple[LlamaConfig, dict[str, Any]]:
    """Returns the shape of a run's model, and all of its config.json.

    Raises:
        UsageError: if there is no run, or one of another version.
    """
    run = read_config(folder)
    with of_this_version(folder):
        shape = dict(run["model_config"])
        if shape["rope_scaling"]:
            shape["rope_scaling"] = RopeScaling(**shape["rope_scaling"])
        return LlamaConfig(**shape), run


@contextlib.contextmanager
def of_this_version(folder: Path) -> Iterator[None]:
    """Raises `UsageError` if a run's configuration lacks a field or has another one."""
    try:
        yield
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder / CONFIG} is not of this version ({type(error).__name__}: "
            f"{error}); export with the version that made the run"
        ) from error


@contextlib.contextmanager
def memory_explained() -> Iterator[None]:
    """Raises `UsageError` with the remedy if the weights do not fit in memory."""
    try:
        yield
    except Exception as error:
        on_device = device_memory_is_full(error)
        if not (on_device or isinstance(error, MemoryError)):
            raise
        remedy = (
            "export in the host's memory, with JAX_PLATFORMS=cpu"
            if on_device and jax.default_backend() != "cpu"
            else "use a machine with more memory"
        )
        raise UsageError(
            f"the weights do not fit in memory ({first_line(error)}); {remedy}"
        ) from error


@memory_explained()
def export(options: ExportOptions) -> None:
    """Writes the weights.

    Raises:
        UsageError: if there is no such run or checkpoint, if something would be
            overwritten, if --adapter or --merge does not fit the run, or if memory is
            too small.
    """
    config, run = config_of_run(options.run)
    check_adapters(options, config)
    with of_this_version(options.run):
        int8, end_token = run["weights"] == "int8", run["end_token"]
        dtype = run["compute_dtype"] if int8 else run["weights"]
    path = options.run / TOKENIZER
    try:
        tokenizer = tokenizers.Tokenizer.from_str(decode(path.read_bytes()))
    except Exception as error:  # The library raises nothing more specific.
        raise UsageError(
            f"{path} cannot be read ({first_line(error)}); put it back"
        ) from error
    mesh = make_mesh("data=1")
    shapes = trained(
        config, abstract_params(config, Execution(param_dtype=dtype), mesh)
    )
    params = restore_params(
        options.run,
        Storage(mesh, int8=int8).abstract(shapes),
        options.step,
        BEST if options.best else CHECKPOINTS,
    )
    arguments: dict[str, Any] = {
        "dtype": options.dtype,
        "tokenizer": tokenizer,
        "end_token": end_token,
        "passed_on": passed_on(options.run, run),
    }
    if options.adapter:
        save_adapters(params, config, options.to, base=run["init_from"], **arguments)
        return
    if options.merge:
        params = with_adapters(options.run, run, params, config, dtype)
    hf_weights.save_pretrained(dequantize(params), config.base, options.to, **arguments)


def check_adapters(options: ExportOptions, config: LlamaConfig) -> None:
    """Raises `UsageError` if the options do not fit the run's parameters."""
    if config.lora_rank and not (options.adapter or options.merge):
        raise UsageError(
            f"{options.run} has LoRA adapters and no whole model; give --adapter to "
            "write them in PEFT's format, or --merge to write the model with what "
            "they add"
        )
    flag = "--adapter" if options.adapter else "--merge"
    if not config.lora_rank and (options.adapter or options.merge):
        raise UsageError(
            f"{flag} is for a run with --lora, and {options.run} has a whole model; "
            "leave it out"
        )


def with_adapters(
    folder: Path,
    run: dict[str, Any],
    adapters: Params,
    config: LlamaConfig,
    dtype: str,
) -> Params:
    """Returns the weights of the model that a run began from, with its adapters merged.

    Raises `UsageError` if the model is gone, or has other weights than it had.
    """
    try:
        model = weights_folder(run["init_from"])
        digest = hf_weights.weights_digest(model)
        params = hf_weights.load_params(model, config.base, dtype)
    except UsageError as error:
        raise UsageError(
            f"--merge needs the model that {folder} began from: {error}"
        ) from error
    # Runs of an earlier version do not say which weights they began from.
    if run.get("base_weights", digest) != digest:
        raise UsageError(
            f"the weights in {model} have changed since {folder} began from them; put "
            "the old ones back, or write the adapters with --adapter"
        )
    merge(params, adapters, config)
    return params


def passed_on(folder: Path, run: dict[str, Any]) -> pretrained.Files:
    """Returns the files that a run has kept for its exports.

    A run of an earlier version did not keep them. Its files are those of the model that
    it began from, if they still exist.
    """
    if files := pretrained.kept_files(folder):
        return files
    tokenizer, init_from = run.get("tokenizer"), run.get("init_from")
    if tokenizer and init_from and not Path(init_from).exists():
        init_from = None  # The tokenizer's files may still be there.
    try:
        return pretrained.find_files(tokenizer, init_from)
    except UsageError as error:
        notice(
            f"the chat template and the special tokens of what {folder} began from are "
            f"not exported ({error})"
        )
        return {}


def main(args: list[str] | None = None) -> None:
    def command() -> None:
        options = parse(ExportOptions, args, "python -m examples.llama.export")
        export(options)
        print(f"weights and tokenizer in {options.to}")

    exit_on_usage_error(command)


if __name__ == "__main__":
    main()

"""The folder of the model to start from: one on this machine, or a copy from the hub.

Models of the hub are in Hugging Face's own cache. The configuration and the tokenizer
are downloaded first, because a plan of a run needs nothing else.
"""

import re
from pathlib import Path

from examples.llama.hf.config import CONFIG, read_json
from examples.llama.run.errors import UsageError
from examples.llama.text.hub import NAME_AND_REVISION, TOKENIZER_FILES, model_snapshot

GENERATION_CONFIG = "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SMALL_FILES = (CONFIG, GENERATION_CONFIG, INDEX, *TOKENIZER_FILES)


def config_folder(init_from: str) -> Path:
    """Returns a folder with the model's configuration and tokenizer.

    Raises:
        UsageError: if `init_from` is neither a folder nor the name of a model that is
            in the cache or can be downloaded.
    """
    if Path(init_from).exists():
        return Path(init_from)
    if not re.fullmatch(rf"[\w.-]+/{NAME_AND_REVISION}", init_from):
        raise UsageError(
            f"`init_from` {init_from!r} does not exist; give a folder that "
            "save_pretrained wrote, or OWNER/NAME[@REVISION] of a model on the hub"
        )
    return model_snapshot(
        "`init_from`",
        init_from,
        SMALL_FILES,
        is_complete=lambda folder: (folder / CONFIG).exists(),
    )


def weights_folder(init_from: str) -> Path:
    """Returns a folder that also has the weights; raises like `config_folder`."""
    folder = config_folder(init_from)
    if Path(init_from).exists():
        return folder
    # A folder in the cache is named by its commit. The branch may have moved since the
    # configuration was downloaded, so the weights are those of the same commit.
    name = f"{init_from.partition('@')[0]}@{folder.name}"

    def has_weights(folder: Path) -> bool:
        return (folder / WEIGHTS).exists() or (folder / INDEX).exists()

    folder = model_snapshot(
        "`init_from`", name, (*SMALL_FILES, WEIGHTS), is_complete=has_weights
    )
    if (folder / WEIGHTS).exists() or not (folder / INDEX).exists():
        return folder
    # Only the files that the index names are downloaded: some models are on the hub
    # twice, in another format too.
    files = indexed_files(folder)
    return model_snapshot(
        "`init_from`",
        name,
        files,
        is_complete=lambda folder: all((folder / file).exists() for file in files),
    )


def indexed_files(folder: Path) -> list[str]:
    """Returns the names of the files that the index in `folder` lists."""
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(name, str) for name in weight_map.values()
    ):
        raise UsageError(
            f"{folder / INDEX} has no weight_map from tensors to files; "
            "download it again"
        )
    return sorted(set(weight_map.values()))

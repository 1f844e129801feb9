"""The files, besides weights, of the model or tokenizer that a run begins from.

An export copies them: the tokenizer's files unchanged, with the chat template, and the
ids of special tokens. A run keeps copies, since the model may be gone by then.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tokenizers

from examples.llama.hf.config import CONFIG, read_json, write_json
from examples.llama.hf.folder import GENERATION_CONFIG, config_folder
from examples.llama.run.log import PRETRAINED
from examples.llama.text.decoding import decode, mark_and_encoding
from examples.llama.text.hub import (
    SPECIAL_TOKENS_MAP,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_FILES,
)
from examples.llama.text.tokenizer import special_token, tokenizer_path

EOS, EOS_ID = "eos_token", "eos_token_id"
TOKEN_IDS = {"bos_token": "bos_token_id", "pad_token": "pad_token_id"}

Files = Mapping[str, Path]  # The keys are paths within the model's folder.


def find_files(tokenizer: str | None, init_from: str | Path | None) -> dict[str, Path]:
    """Returns the files that an export copies.

    Args:
        tokenizer: path or name of the tokenizer; None for the model's own.
        init_from: path or name of the model that the training begins from. The ids in
            its configuration are those of its own tokenizer, so they count only if
            `tokenizer` is the same.

    Raises:
        UsageError: if there is no such tokenizer or model.
    """
    model = config_folder(str(init_from)) if init_from else None
    name = tokenizer or (str(model) if model else None)
    if name is None:
        return {}
    path = tokenizer_path(name)
    found = {
        file.relative_to(path.parent).as_posix(): file
        for pattern in TOKENIZER_FILES
        for file in sorted(path.parent.glob(pattern))
    }
    found[TOKENIZER] = path  # The file may have another name than an export needs.
    if model and is_tokenizer_of(path, model):
        configs = {name: model / name for name in (CONFIG, GENERATION_CONFIG)}
        found |= {name: file for name, file in configs.items() if file.exists()}
    return found


def is_tokenizer_of(path: Path, model: Path) -> bool:
    own = model / TOKENIZER
    return own.exists() and own.read_bytes() == path.read_bytes()


def keep(files: Files, run_folder: Path) -> None:
    """Copies the files to a run's folder, all or none, unless it has them already."""
    if not files or (run_folder / PRETRAINED).exists():
        return
    with tempfile.TemporaryDirectory(
        dir=run_folder, prefix=f".{PRETRAINED}."
    ) as temporary:
        copied = Path(temporary) / PRETRAINED
        copy(files, copied)
        copied.rename(run_folder / PRETRAINED)


def kept_files(run_folder: Path) -> dict[str, Path]:
    """Returns the files that a run has kept; none if an older version began the run."""
    folder = run_folder / PRETRAINED
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path for path in paths}


def copy(files: Files, folder: Path) -> None:
    for name, path in files.items():
        content = path.read_bytes()
        # A byte-order mark is more than transformers can read.
        if mark_and_encoding(content)[0]:
            content = decode(content).encode()
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def pass_on(folder: Path, files: Files, end_token: str | None) -> None:
    """Copies the files into an export, except for config.json, which it has itself.

    If the files do not say which token ends a text, `end_token` is added to them.
    """
    copy({name: path for name, path in files.items() if name != CONFIG}, folder)
    configs = [folder / TOKENIZER_CONFIG, folder / SPECIAL_TOKENS_MAP]
    found = [read_json(path) for path in configs if path.exists()]
    if end_token and files and not any(fields.get(EOS) for fields in found):
        write_json(configs[0], {**read_json(configs[0]), EOS: end_token})


def with_token_ids(
    config: dict[str, Any], files: Files, tokenizer: tokenizers.Tokenizer | None
) -> dict[str, Any]:
    """Returns an export's config.json with the ids of special tokens.

    They are the ids of the model that the training began from. Without such a model,
    they are those of the tokens that tokenizer_config.json names. The end token of the
    training text is kept, even if that model's configuration has a different one.

    Args:
        config: the fields, with the id of the text's end.
        files: the files that the export copies.
        tokenizer: the tokenizer of the export.
    """
    if CONFIG in files:
        fields = read_json(files[CONFIG])
        # A field that is not there stays so, and has transformers' default.
        ids = {field: fields[field] for field in TOKEN_IDS.values() if field in fields}
        ends = fields.get(EOS_ID)
        if config[EOS_ID] in (ends if isinstance(ends, list) else [ends]):
            ids[EOS_ID] = ends
        others = {key: x for key, x in config.items() if key not in TOKEN_IDS.values()}
        return others | ids
    ids = {}
    if tokenizer and TOKENIZER_CONFIG in files:
        fields = read_json(files[TOKENIZER_CONFIG])
        for name, field in TOKEN_IDS.items():
            if isinstance(token := special_token(fields, name), str):
                ids[field] = tokenizer.token_to_id(token)
    return config | ids

"""Digests of the user's files, to notice changes without reading all files again."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from tqdm import tqdm

from examples.llama.run.errors import first_line
from examples.llama.text.cache import cache_folder, write_whole
from examples.llama.text.decoding import DocumentError


def content_digest(source: str, files: Mapping[str, Path]) -> str:
    """Returns a digest of the names and bytes of files.

    A file is not read again while its size and time of modification stay as they are,
    so that starting a run on 100 GB takes only as long as listing the files. The
    digests of one source's files are one file of the cache.

    Raises:
        DocumentError: if a file cannot be read.
        OSError: if the cache cannot be written.
    """
    memo = (
        cache_folder()
        / "digests"
        / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.json"
    )
    known = json.loads(memo.read_text()) if memo.exists() else {}
    # The bar shows only where this takes long, and only to a person.
    bar = tqdm(files.values(), desc="hashing", unit="file", delay=2, disable=None)
    found = {
        str(path.absolute()): file_digest(path, known.get(str(path.absolute())))
        for path in bar
    }
    if found != known:
        write_whole(memo, json.dumps(found))
    content = [(name, found[str(path.absolute())][-1]) for name, path in files.items()]
    return hashlib.sha256(repr(content).encode()).hexdigest()


def file_digest(path: Path, known: list[str | int] | None) -> list[str | int]:
    """Returns a file's size, time of modification and SHA-256.

    If the first two are those of `known`, it returns `known` and reads nothing.
    """
    try:
        status = path.stat()
        state: list[str | int] = [status.st_size, status.st_mtime_ns]
        if known and known[:-1] == state:
            return known
        with path.open("rb") as file:
            return [*state, hashlib.file_digest(file, "sha256").hexdigest()]
    except OSError as error:
        raise unreadable(path, error) from error


def unreadable(path: Path, error: OSError) -> DocumentError:
    return DocumentError(
        f"{path} cannot be read ({first_line(error)}); make it readable, "
        "or leave it out"
    )

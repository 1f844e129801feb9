"""Documents in files: plain text, JSON lines and Parquet, each read as a stream."""

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# The field with the text in a JSON line, a Parquet file or a hub data set, as in C4,
# FineWeb and the Pile.
FIELD = "text"
LONG_FILE_BYTES = 2**16
PIECE_BYTES = 2**14
PARQUET_ROWS = 1024  # The rows that are read at once.


class Document(NamedTuple):
    """A text, with the name by which it falls into training or validation.

    The name is a file's path relative to the source, or a digest of the text for what
    has no file of its own: documents that are added, removed or reordered move no
    others.
    """

    name: str
    text: str


class DocumentError(Exception):
    """Documents that cannot be read; the message names the place and the remedy."""


def named_by_text(text: str) -> Document:
    # JSON can spell half a character (a lone surrogate).
    encoded = text.encode(errors="replace")
    return Document(hashlib.sha256(encoded).hexdigest(), encoded.decode())


def read_file(name: str, path: Path) -> Iterator[Document]:
    """Yields the documents of a file that have text, by the format its suffix says.

    Raises:
        DocumentError: where the file is not in that format, naming the line or row.
        OSError: where it cannot be read.
    """
    if path.name.endswith((".jsonl", ".jsonl.gz", ".json.gz")):
        documents = (named_by_text(text) for text in read_json_lines(path))
    elif path.suffix == ".parquet":
        documents = (named_by_text(text) for text in read_parquet(path))
    elif path.stat().st_size > LONG_FILE_BYTES:
        documents = (named_by_text(text) for text in read_pieces(path))
    else:
        documents = iter([Document(name, "".join(map(decode, text_lines(path))))])
    return (document for document in documents if document.text.strip())


def read_pieces(path: Path) -> Iterator[str]:
    """Cuts a text file after blank lines into pieces of at least `PIECE_BYTES`.

    So that a book, or a corpus in one file, can be split by document.
    """
    # The last lines are held back, so that a rest that is too short can join them.
    last: list[bytes] = []
    piece: list[bytes] = []
    size = 0
    for line in text_lines(path):
        piece.append(line)
        size += len(line)
        if size >= PIECE_BYTES and not line.strip():
            if last:
                yield decode(b"".join(last))
            last, piece, size = piece, [], 0
    if size >= PIECE_BYTES and last:
        yield decode(b"".join(last))
        last = []
    yield decode(b"".join([*last, *piece]))


def text_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        for line in file:
            if b"\0" in line:
                raise DocumentError(
                    f"{path} is binary, not text (it has NUL bytes); leave it out, as "
                    f"with a glob such as {str(path.parent / '*.txt')!r}"
                )
            yield line


def decode(text: bytes) -> str:
    """Returns UTF-8 as text.

    In other encodings, a replacement character does little harm.
    """
    return text.decode(errors="replace").replace("\r\n", "\n")


def read_json_lines(path: Path) -> Iterator[str]:
    with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as file:
        try:
            for number, line in enumerate(file, 1):
                place = f"{path}:{number}"
                if line.strip():
                    yield row_text(parse_json(line, place), place)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise DocumentError(
                f"{path} is not a whole gzip file ({error}); make or get it again"
            ) from error


def parse_json(line: bytes, place: str) -> object:
    try:
        return json.loads(decode(line))
    except json.JSONDecodeError as error:
        raise DocumentError(
            f"{place} is not JSON ({error}); give one JSON object a line"
        ) from error


def row_text(row: object, place: str) -> str:
    """Returns a row's text; `place` is where the row is, for errors."""
    if not isinstance(row, dict):
        raise DocumentError(
            f"{place} is a {type(row).__name__}; give JSON objects with a field "
            f"{FIELD!r}"
        )
    text = row.get(FIELD)
    if not isinstance(text, str):
        fields = ", ".join(
            f"{name} ({type(value).__name__})" for name, value in row.items()
        )
        raise DocumentError(
            f"{place} has no string called {FIELD!r}; its fields are: "
            f"{fields or 'none'}; name the one with the text {FIELD!r}"
        )
    return text


def read_parquet(path: Path) -> Iterator[str]:
    try:
        import pyarrow  # The import is here since it is slow and few need it.
        from pyarrow import parquet
    except ImportError as error:
        raise DocumentError(
            f"{path} needs pyarrow to be read; run pip install 'apollo-optax[examples]'"
        ) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            if FIELD not in columns:
                raise DocumentError(
                    f"{path} has no column {FIELD!r}; its columns are: "
                    f"{', '.join(columns)}; name the one with the text {FIELD!r}"
                )
            batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=[FIELD])
            texts = (text for batch in batches for text in batch.column(0).to_pylist())
            for number, text in enumerate(texts, 1):
                yield row_text({FIELD: text}, f"{path} row {number}")
    except pyarrow.ArrowException as error:
        raise DocumentError(
            f"{path} is not a readable Parquet file ({error}); make or get it again"
        ) from error

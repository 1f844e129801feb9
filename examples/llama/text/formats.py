"""Which reader a file has by its name, or why it has none.

A suffix counts in either case. What holds text may be compressed.
"""

import bz2
import contextlib
import enum
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from examples.llama.text.decoding import DocumentError, decode
from examples.llama.text.readers import (
    named_by_text,
    needs_pyarrow,
    read_csv,
    read_json,
    read_parquet,
    read_text,
    read_tsv,
)
from examples.llama.text.rows import Document, Row, row_texts


class Sort(enum.IntEnum):
    """The sorts of files; only the first sort that occurs in a folder is read.

    A README.md or a JSON file next to Parquet files is not part of the text. In a
    folder of text files, a README.md is.
    """

    DATA_SET = 0
    TABLE = 1
    TEXT = 2
    METADATA = 3


# Yields the rows of an open file; the fields are those that are wanted.
ReadRows = Callable[[Path, io.BufferedReader, Sequence[str]], Iterator[Row]]


class Format(NamedTuple):
    """A format of files: its reader, or advice on how to convert it."""

    noun: str
    sort: Sort
    read_rows: ReadRows | None = None
    remedy: str | None = None  # Given where there is no reader.
    compressible: bool = True


PLAIN_TEXT = Format("plain text", Sort.TEXT)
JSON_LINES = Format("JSON lines", Sort.DATA_SET, read_json)
JSON = Format("JSON", Sort.TABLE, read_json)
PARQUET = Format("Parquet", Sort.DATA_SET, read_parquet, compressible=False)
HUB_METADATA = Format("metadata of a data set", Sort.METADATA, read_json)

TO_TEXT = "convert it to plain text"
TO_ROWS = "write it as Parquet or JSON lines"
UNPACK = "unpack it"
DECOMPRESS = "decompress it, or compress it with gzip, bzip2, xz or zstd"


def refused(noun: str, remedy: str, *suffixes: str, sort: Sort) -> dict[str, Format]:
    return dict.fromkeys(suffixes, Format(noun, sort, remedy=remedy))


FORMATS: dict[str, Format] = {
    ".jsonl": JSON_LINES,
    ".ndjson": JSON_LINES,
    ".json": JSON,
    ".csv": Format("CSV", Sort.TABLE, read_csv),
    ".tsv": Format("TSV", Sort.TABLE, read_tsv),
    ".parquet": PARQUET,
    ".parq": PARQUET,
    ".pq": PARQUET,
    **refused("a PDF", f"{TO_TEXT}, as with pdftotext", ".pdf", sort=Sort.TEXT),
    **refused(
        "a document of a word processor",
        TO_TEXT,
        ".doc",
        ".docx",
        ".odt",
        ".rtf",
        ".pptx",
        ".ppt",
        ".odp",
        sort=Sort.TEXT,
    ),
    **refused("an e-book", TO_TEXT, ".epub", ".mobi", ".azw3", ".djvu", sort=Sort.TEXT),
    **refused("a PostScript file", TO_TEXT, ".ps", ".eps", sort=Sort.TEXT),
    **refused(
        "a Jupyter notebook",
        f"{TO_TEXT}, as with jupyter nbconvert --to script",
        ".ipynb",
        sort=Sort.TEXT,
    ),
    **refused("a spreadsheet", TO_ROWS, ".xls", ".xlsx", ".ods", sort=Sort.TABLE),
    **refused(
        "an Arrow file",
        f"{TO_ROWS}, as with datasets.load_from_disk(FOLDER).to_parquet(FILE)",
        ".arrow",
        ".feather",
        ".ipc",
        sort=Sort.TABLE,
    ),
    **refused("a table", TO_ROWS, ".orc", ".avro", ".lance", sort=Sort.TABLE),
    **refused(
        "a database", TO_ROWS, ".db", ".sqlite", ".sqlite3", ".duckdb", sort=Sort.TABLE
    ),
    **refused(
        "a file of arrays or objects",
        TO_ROWS,
        ".h5",
        ".hdf5",
        ".npy",
        ".npz",
        ".pkl",
        ".pickle",
        ".pt",
        ".pth",
        ".safetensors",
        ".msgpack",
        ".tfrecord",
        sort=Sort.TABLE,
    ),
    **refused("an archive", UNPACK, ".zip", ".7z", ".rar", ".tgz", sort=Sort.TABLE),
    **refused("an archive", UNPACK, ".tar", ".tbz2", ".txz", ".tzst", sort=Sort.TABLE),
    **refused(
        "compressed in a way",
        DECOMPRESS,
        ".lz4",
        ".z",
        ".br",
        ".snappy",
        ".lzo",
        ".lz",
        sort=Sort.TABLE,
    ),
}
# Suffixes of rows that are text, so that some programs add .txt to them.
ROWS_IN_TEXT = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")
METADATA_NAMES = frozenset(
    ("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json")
)


def open_zstd(path: Path) -> Any:
    try:
        import pyarrow  # The import is here since it is slow and few need it.
    except ImportError as error:
        raise needs_pyarrow(path) from error
    return pyarrow.input_stream(str(path), compression="zstd")


COMPRESSIONS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    ".gz": ("gzip", gzip.open),
    ".bz2": ("bzip2", bz2.open),
    ".xz": ("xz", lzma.open),
    ".lzma": ("lzma", lzma.open),
    ".zst": ("zstd", open_zstd),
    ".zstd": ("zstd", open_zstd),
}
HEAD_BYTES = 4096
# The first bytes of files that are not what their name says. The first entry is what a
# clone has in place of large files if Git LFS is not installed.
LFS_POINTER = rb"version https://git-lfs\.github\.com/spec/"
CONTENTS = (
    (rb"%PDF-", "a PDF", f"{TO_TEXT}, as with pdftotext,"),
    (rb"\{\\rtf", "RTF", f"{TO_TEXT},"),
    (rb"PAR1", "Parquet", "name it .parquet,"),
    (rb"\x1f\x8b", "gzip's output", "add .gz to its name,"),
    (rb"BZh[1-9]1AY&SY", "bzip2's output", "add .bz2 to its name,"),
    (rb"\xfd7zXZ\0", "xz's output", "add .xz to its name,"),
    (rb"\x28\xb5\x2f\xfd", "zstd's output", "add .zst to its name,"),
    (rb"PK\x03\x04", "a ZIP archive", f"{UNPACK},"),
)
# An array of objects, or an object, which may be the first of several lines.
JSON_START = r'\s*(\[\s*\{|\{\s*"[^"\n]*"\s*:)'


def format_of(path: Path) -> tuple[Format, str | None]:
    """Returns a file's format by its name, and the suffix of its compression, if any.

    A file without a known suffix is plain text.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compression = suffixes.pop() if suffixes and suffixes[-1] in COMPRESSIONS else None
    if suffixes[-1:] == [".txt"] and suffixes[-2:-1] and suffixes[-2] in ROWS_IN_TEXT:
        suffixes.pop()
    if path.name.lower() in METADATA_NAMES:
        return HUB_METADATA, compression
    found = FORMATS.get(suffixes[-1], PLAIN_TEXT) if suffixes else PLAIN_TEXT
    # A compressed file is taken for a data set: the shards of C4 are lines in .json.gz.
    return (JSON_LINES if found is JSON and compression else found), compression


def has_rows(path: Path) -> bool:
    return format_of(path)[0].read_rows is not None


def check_format(path: Path) -> None:
    """Raises `DocumentError` for a file whose format, by its name, has no reader."""
    found, compression = format_of(path)
    if found.remedy:
        raise DocumentError(
            f"{path} is {found.noun} that is not read here; {found.remedy}, or leave "
            f"it out, as with a glob such as {str(path.parent / '*.txt')!r}"
        )
    if compression and not found.compressible:
        raise DocumentError(
            f"{path} is a compressed {found.noun} file that is not read here; "
            "decompress it"
        )


def read_file(name: str, path: Path, field: str) -> Iterator[Document]:
    """Yields the documents of a file, including those without text.

    Args:
        name: the name of the document if the file is a single document.
        path: the path of the file, whose name says the format.
        field: the field with the text if the file has rows.

    Raises:
        DocumentError: if the file is not in that format. The message names the line or
            row.
        OSError: if the file cannot be read.
    """
    if has_rows(path):
        yield from map(named_by_text, row_texts(read_rows(path, (field,)), field))
        return
    check_format(path)
    found, compression = format_of(path)
    with opened(path, compression) as stream:
        check_content(path, stream.peek(HEAD_BYTES), found)
        yield from read_text(name, path, stream)


def read_rows(path: Path, fields: Sequence[str]) -> Iterator[Row]:
    """Yields the rows of a file, like `read_file`.

    Args:
        path: the path of the file.
        fields: the fields to read. Other columns of Parquet are not read.

    Raises:
        DocumentError: if the file has no rows, or is not in the format of its name.
        OSError: if the file cannot be read.
    """
    check_format(path)
    found, compression = format_of(path)
    if found.read_rows is None:
        raise DocumentError(
            f"{path} is {found.noun}, which has no rows; give .jsonl or .parquet"
        )
    with opened(path, compression) as stream:
        check_content(path, stream.peek(HEAD_BYTES), found)
        yield from found.read_rows(path, stream, fields)


@contextlib.contextmanager
def opened(path: Path, compression: str | None) -> Iterator[io.BufferedReader]:
    """Opens a file, decompressed; errors while it is read name the file."""
    with path.open("rb") as file:
        if re.match(LFS_POINTER, file.peek(HEAD_BYTES)):
            raise DocumentError(
                f"{path} is a pointer of Git LFS, not the file itself; run git lfs "
                "pull in its folder"
            )
        if compression is None:
            yield file
            return
    noun, open_compressed = COMPRESSIONS[compression]
    try:
        with open_compressed(path) as file:
            yield io.BufferedReader(file)
    except (EOFError, zlib.error, lzma.LZMAError, OSError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # The system's, not the decompressor's.
        raise DocumentError(
            f"{path} is not a whole {noun} file ({error}); make or get it again"
        ) from error


def check_content(path: Path, head: bytes, expected: Format) -> None:
    """Raises `DocumentError` for a file that begins like another format."""
    if expected is PARQUET:
        return  # Its own reader checks it.
    for start, noun, remedy in CONTENTS:
        if re.match(start, head):
            raise DocumentError(
                f"{path} holds {noun}, not {expected.noun}; {remedy} or leave it out"
            )
    if expected is PLAIN_TEXT and re.match(JSON_START, decode(head, "replace")):
        raise DocumentError(
            f"{path} holds JSON, not {expected.noun}; name it .json (an array) or "
            ".jsonl (an object per line), so that its rows are read, or leave it out"
        )

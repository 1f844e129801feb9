"""Readers of plain text, JSON, CSV and Parquet, each as a stream.

`formats.py` says which reader a file has.
"""

import csv
import hashlib
import io
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from examples.llama.text.decoding import (
    DocumentError,
    decode_line,
    parse_json,
    utf8_lines,
)
from examples.llama.text.rows import Document, Row

LONG_FILE_BYTES = 2**16
PIECE_BYTES = 2**14
PARQUET_ROWS = 1024  # The rows that are read at once.
# The csv module's own limit, 128 KiB, is less than a long document.
csv.field_size_limit(2**31 - 1)


def named_by_text(text: str) -> Document:
    # JSON can spell half a character (a lone surrogate).
    encoded = text.encode(errors="replace")
    return Document(hashlib.sha256(encoded).hexdigest(), encoded.decode())


def read_text(name: str, path: Path, stream: io.BufferedReader) -> Iterator[Document]:
    """Yields a text file as one document, or as several if it is long."""
    lines = text_lines(path, stream)
    start: list[bytes] = []
    size = 0
    for line in lines:
        start.append(line)
        size += len(line)
        if size > LONG_FILE_BYTES:
            for piece in pieces(itertools.chain(start, lines)):
                yield named_by_text(piece)
            return
    yield Document(name, decode_line(b"".join(start)))


def pieces(lines: Iterable[bytes]) -> Iterator[str]:
    """Cuts text after blank lines into pieces of at least `PIECE_BYTES`.

    This way, a book or a corpus in one file can be split by document.
    """
    # The last lines are held back, so that a rest that is too short can join them.
    last: list[bytes] = []
    piece: list[bytes] = []
    size = 0
    for line in lines:
        piece.append(line)
        size += len(line)
        if size >= PIECE_BYTES and not line.strip():
            if last:
                yield decode_line(b"".join(last))
            last, piece, size = piece, [], 0
    if size >= PIECE_BYTES and last:
        yield decode_line(b"".join(last))
        last = []
    yield decode_line(b"".join([*last, *piece]))


def text_lines(path: Path, stream: io.BufferedReader) -> Iterator[bytes]:
    for line in utf8_lines(stream):
        if b"\0" in line:
            raise DocumentError(
                f"{path} is binary, not text (it has NUL bytes); leave it out, as with "
                f"a glob such as {str(path.parent / '*.txt')!r}, or save it as UTF-8 "
                "if it is text"
            )
        yield line


def read_json(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[Row]:
    """Yields the objects of a JSON file: one per line, or those of an array.

    An array is read into memory completely, like a single object of several lines.
    """
    lines = utf8_lines(stream)
    numbered = ((n, line) for n, line in enumerate(lines, 1) if line.strip())
    first = next(numbered, None)
    if first is None:
        return
    number, line = first
    if line.lstrip().startswith(b"[") or line.strip() == b"{":
        # The blank lines keep the line numbers of errors right.
        text = decode_line(b"".join([b"\n" * (number - 1), line, *lines]))
        value = parse_json(text, str(path), "mend it, or give one JSON object a line")
        items = value if isinstance(value, list) else [value]
        yield from (Row(f"{path} item {n}", item) for n, item in enumerate(items, 1))
        return
    for number, line in itertools.chain([first], numbered):
        place = f"{path}:{number}"
        value = parse_json(decode_line(line), place, "give one JSON object a line")
        yield Row(place, value)


def read_csv(
    path: Path,
    stream: io.BufferedReader,
    fields: Sequence[str],
    delimiter: str = ",",
) -> Iterator[Row]:
    """Yields the rows of a table whose first line names the columns."""
    lines = map(decode_line, utf8_lines(stream))
    table = csv.reader(lines, delimiter=delimiter, strict=True)
    try:
        header = next(table, [])
        for row in table:
            place = f"{path}:{table.line_num}"
            if len(row) > len(header):
                raise DocumentError(
                    f"{place} ends a row of {len(row)} cells, and the header has "
                    f"{len(header)}; put cells that hold the delimiter in quotes"
                )
            if row:
                yield Row(place, dict(zip(header, row, strict=False)))
    except csv.Error as error:
        raise DocumentError(
            f"{path}:{table.line_num} is not CSV ({error}); put the text in quotes, "
            "with each quote in it doubled, or write the table as JSON lines"
        ) from error


def read_tsv(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[Row]:
    return read_csv(path, stream, fields, delimiter="\t")


def read_parquet(
    path: Path, stream: io.BufferedReader, fields: Sequence[str]
) -> Iterator[Row]:
    """Yields the rows of a table; only the columns of `fields` are read."""
    try:
        import pyarrow  # The import is here since it is slow and few need it.
        from pyarrow import parquet
    except ImportError as error:
        raise needs_pyarrow(path) from error
    try:
        with parquet.ParquetFile(path) as file:
            columns = file.schema_arrow.names
            wanted = [field for field in fields if field in columns]
            if not wanted:
                raise no_column(path, fields, columns)
            batches = file.iter_batches(batch_size=PARQUET_ROWS, columns=wanted)
            rows = (row for batch in batches for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                yield Row(f"{path} row {number}", row)
    except pyarrow.ArrowException as error:
        raise DocumentError(
            f"{path} is not a readable Parquet file ({error}); make or get it again"
        ) from error


def no_column(
    path: Path, fields: Sequence[str], columns: Sequence[str]
) -> DocumentError:
    remedy = "name the one with the text with `text_field`"
    if len(fields) > 1:
        remedy = "rename them"
    return DocumentError(
        f"{path} has no column {' or '.join(map(repr, fields))}; its columns are: "
        f"{', '.join(columns)}; {remedy}"
    )


def needs_pyarrow(path: Path) -> DocumentError:
    return DocumentError(
        f"{path} needs pyarrow to be read; run pip install '.[examples]' in the clone"
    )

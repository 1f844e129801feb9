"""The text of a row, and the counts of documents that have none or a broken one."""

import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from examples.llama.run.errors import notice
from examples.llama.text.decoding import DocumentError

# The field with the text in C4, FineWeb and the Pile, and so the default.
FIELD = "text"
# Rows that are read before a field that none of them has is taken for a wrong name. A
# stream may have no end to wait for.
ROWS_WITHOUT_FIELD = 1000


class Row(NamedTuple):
    place: str  # The file and line, or the number of the row, for errors.
    value: object


class Document(NamedTuple):
    """A text, with the name that decides whether it is for training or validation.

    The name is a file's path relative to the source, or a digest of the text if it has
    no file of its own. So adding, removing or reordering documents does not move
    others to the other split.
    """

    name: str
    text: str


def row_texts(rows: Iterable[Row], field: str) -> Iterator[str]:
    """Yields the text of each row; a null, or a row without the field, is "".

    Args:
        rows: the rows of one file or of one split.
        field: the name of the field with the text.

    Raises:
        DocumentError: for a row that is not an object, for a text that is not a string,
            and if no row has the field.
    """
    rows = iter(rows)
    lacking: list[Row] = []
    for row in itertools.islice(rows, ROWS_WITHOUT_FIELD):
        if field in fields_of(row, field):
            rows = itertools.chain(lacking, [row], rows)
            break
        lacking.append(row)
    else:
        if lacking:
            raise no_text(lacking[0], field)
    for row in rows:
        yield row_text(row, field)


def fields_of(row: Row, field: str) -> Mapping[str, object]:
    if not isinstance(row.value, Mapping):
        raise DocumentError(
            f"{row.place} is a {type(row.value).__name__}; give JSON objects with a "
            f"field {field!r}"
        )
    return row.value


def row_text(row: Row, field: str) -> str:
    text = fields_of(row, field).get(field)
    # Pandas writes a missing text as NaN, which is the one value that differs from
    # itself.
    if text is None or text != text:
        return ""
    if not isinstance(text, str):
        raise no_text(row, field)
    return text


def no_text(row: Row, field: str) -> DocumentError:
    fields = ", ".join(
        f"{name} ({type(value).__name__})"
        for name, value in fields_of(row, field).items()
    )
    return DocumentError(
        f"{row.place} has no string called {field!r}; its fields are: "
        f"{fields or 'none'}; name the one with the text with `text_field`"
    )


# What decoding puts in the place of bytes that are not of the encoding.
REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Tally:
    """Skips documents without text, and counts these and those with a broken text."""

    def __init__(self) -> None:
        self._source = ""
        self._read = self._skipped = self._broken = 0
        self._said: set[str] = set()

    def with_text(
        self, documents: Iterable[Document], source: str
    ) -> Iterator[Document]:
        """Yields the documents that have text; `source` names their source."""
        self._source = source
        self._read = self._skipped = self._broken = 0
        for document in documents:
            self._read += 1
            self._broken += REPLACEMENT in document.text
            if document.text.strip():
                yield document
            else:
                self._skipped += 1
        self.say()

    def say(self) -> None:
        """Prints how many of the documents had no text, and how many a broken one.

        Nothing is printed about documents without text if none had any, which is a
        separate error. A line that was printed before, as after a first reading, is not
        printed again.
        """
        of_all = f"of {self._read:,} documents"
        lines: list[str] = []
        if 0 < self._skipped < self._read:
            lines.append(
                f"skipped {self._skipped:,} {of_all}, which have no text (an empty or "
                "null text, or no field for it)"
            )
        if self._broken:
            lines.append(
                f"{self._broken:,} {of_all} have replacement characters "
                f"({REPLACEMENT}), which stand for bytes that are not UTF-8; if the "
                "text is in another encoding, save it as UTF-8"
            )
        for line in lines:
            if line not in self._said:
                notice(f"{self._source}: {line}")
                self._said.add(line)

"""How the bytes of a user's file become text and JSON, for every place that reads one.

A file is UTF-8, with or without a byte-order mark, or UTF-16 or UTF-32 with one.
"""

import codecs
import io
import json
import sys
from collections.abc import Iterator

# UTF-32's mark begins with that of UTF-16, so it comes first.
ENCODINGS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
MARK_BYTES = max(len(mark) for mark, _ in ENCODINGS)


class DocumentError(Exception):
    """A file that cannot be read; the message names the place and the remedy."""


def mark_and_encoding(start: bytes) -> tuple[bytes, str]:
    """Returns the byte-order mark that a file starts with, if any, and its encoding."""
    return next(
        (found for found in ENCODINGS if start.startswith(found[0])), (b"", "utf-8")
    )


def decode(content: bytes, errors: str = "strict") -> str:
    """Returns the text of a whole file, without its byte-order mark.

    Raises:
        UnicodeDecodeError: if it is not text and `errors` is "strict".
    """
    mark, encoding = mark_and_encoding(content)
    return content[len(mark) :].decode(encoding, errors)


def utf8_lines(file: io.BufferedReader) -> Iterator[bytes]:
    """Yields the lines of a text file in UTF-8, without its byte-order mark."""
    mark, encoding = mark_and_encoding(file.peek(MARK_BYTES))
    file.read(len(mark))
    if encoding == "utf-8":
        yield from file
        return
    # A line ends with \n alone, as in the bytes of UTF-8.
    with io.TextIOWrapper(file, encoding, errors="replace", newline="\n") as text:
        for line in text:
            yield line.encode(errors="replace")


def decode_line(line: bytes) -> str:
    """Returns lines of UTF-8 as text.

    In other encodings, a replacement character does little harm.
    """
    return line.decode(errors="replace").replace("\r\n", "\n")


def parse_json(text: str, place: str, remedy: str) -> object:
    """Returns the value of a JSON text.

    Args:
        text: the JSON.
        place: the name of the text in errors, such as FILE or FILE:LINE.
        remedy: what to do about text that is not JSON.

    Raises:
        DocumentError: if it is not JSON, or is JSON that Python cannot read.
    """
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno} " if "\n" in text.strip() else ""
        reason = f"{error.msg}: {line}column {error.colno}"
        raise DocumentError(f"{place} is not JSON ({reason}); {remedy}") from error
    except RecursionError as error:
        raise DocumentError(
            f"{place} is JSON with brackets nested too deep to be read; remove that "
            "value"
        ) from error
    except ValueError as error:
        # Python converts no integer that is longer than this.
        raise DocumentError(
            f"{place} is JSON with a number of more than "
            f"{sys.get_int_max_str_digits()} digits, too long to be read; remove that "
            "value"
        ) from error

"""Where documents come from, by the name of a data set, a file, folder or glob."""

import dataclasses
import glob
import hashlib
import io
import itertools
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from examples.llama.run.errors import UsageError, notice, unknown_name
from examples.llama.text.decoding import DocumentError, decode
from examples.llama.text.digests import content_digest, unreadable
from examples.llama.text.formats import (
    Sort,
    check_format,
    format_of,
    has_rows,
    read_file,
)
from examples.llama.text.hub import PREFIX, HubSource
from examples.llama.text.readers import read_text
from examples.llama.text.rows import FIELD, Document, Tally

# Part of the cache key of files: raise it when the same files make other documents.
READING = 4
MOST_NAMES = 5  # The files that a notice names before it counts the rest.

# Installed packages differ between machines. Tests and tables are copies of one
# another. pydoc_data is one English text so long that its split would be mostly about
# it.
SKIPPED_FOLDERS = frozenset(
    (
        "site-packages",
        "dist-packages",
        "test",
        "tests",
        "idlelib",
        "lib2to3",
        "encodings",
        "pydoc_data",
    )
)

# The tests of packages hold tables of numbers in .txt files.
TEST_FOLDERS = frozenset(("test", "tests"))
PROSE_SUFFIXES = (".rst", ".md", ".txt")
METADATA = "METADATA"  # The file of a .dist-info folder that describes the package.
LISTS_OF_SETUPTOOLS = frozenset(
    (
        "top_level.txt",
        "entry_points.txt",
        "SOURCES.txt",
        "requires.txt",
        "dependency_links.txt",
        "installed-files.txt",
        "namespace_packages.txt",
    )
)


class Source(Protocol):
    """Documents that are read lazily, any number of times."""

    def __iter__(self) -> Iterator[Document]:
        """Yields at least one document, or raises `UsageError`."""
        ...

    def fingerprint(self) -> str:
        """Returns a string that changes with the documents, or at least their name."""
        ...

    def has_rows(self) -> bool:
        """Whether documents are rows with fields, one of which is the text."""
        ...

    def say_skipped(self) -> None:
        """Prints how many of the documents had no text, unless it was printed before.

        A reading that reaches the end prints this by itself.
        """
        ...

    def held_out(self) -> Iterable[Document] | None:
        """Returns the validation documents that come with the source, if any do."""
        ...


@dataclasses.dataclass(frozen=True)
class FileSource:
    """The documents of files on disk; errors name them by `option` and `data`."""

    option: str
    data: str
    files: dict[str, Path]  # The paths by document name, in reading order.
    read: Callable[[str, Path, str], Iterable[Document]]
    field: str = FIELD  # The field with the text, in files that have rows.
    tally: Tally = dataclasses.field(default_factory=Tally, compare=False)
    skips_empty: bool = True  # Whether documents without text are left out.

    def __iter__(self) -> Iterator[Document]:
        empty, documents = True, self._read()
        if self.skips_empty:
            documents = self.tally.with_text(documents, f"{self.option} {self.data!r}")
        for document in documents:
            empty = False
            yield document
        if empty:
            raise UsageError(
                f"{self.option} {self.data!r} has no text in its {len(self.files)} "
                "files; give files with text"
            )

    def _read(self) -> Iterator[Document]:
        for name, path in self.files.items():
            try:
                yield from self.read(name, path, self.field)
            except DocumentError as error:
                raise self._error(error) from error
            except OSError as error:
                raise self._error(unreadable(path, error)) from error

    def fingerprint(self) -> str:
        try:
            digest = content_digest(self.data, self.files)
        except DocumentError as error:
            raise self._error(error) from error
        # The reader is part of it, since the same files may make other documents:
        # modules of the standard library stay whole.
        return f"{self.read.__name__} {READING} {self.field!r} {digest}"

    def has_rows(self) -> bool:
        return any(map(has_rows, self.files.values()))

    def say_skipped(self) -> None:
        self.tally.say()

    def held_out(self) -> None:
        return None

    def _error(self, error: DocumentError) -> UsageError:
        return UsageError(f"{self.option} {self.data!r}: {error}")


def open_source(option: str, data: str, field: str = FIELD) -> Source:
    """Returns the documents that `data` names.

    It is one of

    * `stdlib`: the `.py` files of the running Python's standard library;
    * `python`: those, and the `.py` files of all installed packages;
    * `package-docs`: the `.rst`, `.md` and `.txt` files of these packages, and their
      descriptions;
    * a file, a folder (with the folders in it, hidden ones aside) or a glob such as
      `corpus/**/*.txt`. A row of JSON, Parquet, CSV or TSV is a document, its text in
      `field`. A file of any other name is text in UTF-8 or UTF-16; one of more than
      64 KiB is split after blank lines into documents of at least 16 KiB.
      `formats.FORMATS` says how each format is read, or that it is rejected. If a
      folder has rows, files of other formats are left out, and a line says which;
    * `hf:OWNER/NAME[/CONFIG][@REVISION]`: a data set of Hugging Face's hub, its split
      `train`, read as it downloads; or `hf:/FOLDER[/CONFIG]`, a copy of one on disk.

    Documents without text are skipped.

    Args:
        option: the name in errors of the option with the value `data`, as "`data`".
        data: the name of the documents.
        field: the field of rows that has their text.

    Raises:
        UsageError: if there is no such source, and while reading, if it has no text.
    """
    if data == "stdlib":
        return stdlib(option)
    if data == "python":
        return installed_python(option)
    if data == "package-docs":
        return package_docs(option)
    if data.startswith(PREFIX):
        return HubSource.parse(option, data, field)
    if files := find_files(data):
        return FileSource(option, data, chosen(option, data, files), read_file, field)
    raise no_files(option, data, ["stdlib", "python", "package-docs"])


def no_files(option: str, data: str, names: Sequence[str] = ()) -> UsageError:
    """Returns the error for a value that names no file; `names` are other values."""
    if Path(data).expanduser().is_dir():
        return UsageError(
            f"{option} {data!r} is a folder without files; give one with text"
        )
    if glob.has_magic(data):
        return UsageError(
            f"{option} {data!r} matches no file; give a glob that does, "
            "such as 'corpus/**/*.txt'"
        )
    found = (
        f"{unknown_name(option, data, names)}, or give"
        if names
        else f"{option} {data!r} does not exist; give"
    )
    return UsageError(
        f"{found} a file, folder or glob that exists, or hf:OWNER/NAME for a data set "
        "of the hub"
    )


def stdlib_folder() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def stdlib(option: str = "`data`") -> FileSource:
    """Returns the `.py` files of the running Python's standard library, by path."""
    folder = stdlib_folder()
    paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    kept = [path for path in paths if not SKIPPED_FOLDERS.intersection(path.parts)]
    files = {path.as_posix(): folder / path for path in kept}
    # The measured results count empty modules as documents.
    return FileSource(option, "stdlib", files, read_module, skips_empty=False)


def read_module(name: str, path: Path, field: str) -> list[Document]:
    # A few files declare another encoding. A replacement character in a comment does no
    # harm.
    text = decode(path.read_bytes(), errors="replace")
    return [Document(name, io.StringIO(text, newline=None).read())]


@dataclasses.dataclass(frozen=True)
class WithoutRepeats:
    """The documents of a source without the repetitions that `kept` removes.

    Packages vendor copies of one another, and thousands of files hold the same licence.
    A model would spend its tokens on learning those by heart.
    """

    source: FileSource
    kept: Callable[[Iterable[Document]], Iterator[Document]]

    def __iter__(self) -> Iterator[Document]:
        return self.kept(self.source)

    def fingerprint(self) -> str:
        return f"without repeats {self.source.fingerprint()}"

    def held_out(self) -> None:
        return None

    def has_rows(self) -> bool:
        return False

    def say_skipped(self) -> None:
        self.source.say_skipped()


def modules_once(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields each module once, and each comment that modules open with once."""
    is_new = first_sight()
    for document in documents:
        opening, body = split_opening_comment(document.text)
        text = opening + body if opening and is_new(opening) else body
        if body.strip() and is_new(body):
            yield Document(document.name, text)


def paragraphs_once(documents: Iterable[Document]) -> Iterator[Document]:
    """Yields the documents with each paragraph where it first appears.

    Paragraphs that differ only in whitespace are the same.
    """
    is_new = first_sight()
    for document in documents:
        paragraphs = re.split(r"\n(?:[ \t]*\n)+", document.text.strip("\n"))
        new = [each for each in paragraphs if each.strip() and is_new(words_of(each))]
        if new:
            yield Document(document.name, "\n\n".join(new) + "\n")


def words_of(text: str) -> str:
    return " ".join(text.split())


def first_sight() -> Callable[[str], bool]:
    """Returns a function that tells whether it is given a text for the first time."""
    seen: set[bytes] = set()

    def is_new(text: str) -> bool:
        digest = hashlib.sha256(text.encode()).digest()
        known = digest in seen
        seen.add(digest)
        return not known

    return is_new


def split_opening_comment(text: str) -> tuple[str, str]:
    """Returns the comment at the start of a module, with blank lines between its lines.

    Also returns the rest of the module.
    """
    lines = text.splitlines(keepends=True)
    opening = list(
        itertools.takewhile(
            lambda line: line.startswith("#") or not line.strip(), lines
        )
    )
    return "".join(opening), "".join(lines[len(opening) :])


def site_folders() -> dict[str, Path]:
    """Returns the folders of installed packages, by the prefix of document names."""
    folders = {name: Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")}
    return (
        folders
        if folders["purelib"] != folders["platlib"]
        else {"purelib": folders["purelib"]}
    )


def installed_python(option: str = "`data`") -> WithoutRepeats:
    """Returns the `.py` files of the running Python and of all installed packages.

    With PyTorch and JAX installed, they are hundreds of megabytes. They need no
    network. Tests are included, because there are too few other files for a model of
    60M parameters.
    """
    library = stdlib(option)
    files = {f"stdlib/{name}": path for name, path in library.files.items()}
    for start, folder in site_folders().items():
        paths = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
        files |= {f"{start}/{path.as_posix()}": folder / path for path in paths}
    return WithoutRepeats(
        FileSource(option, "python", files, read_module), modules_once
    )


def package_docs(option: str = "`data`") -> WithoutRepeats:
    """Returns the English text of installed packages, by path.

    It consists of their `.rst`, `.md` and `.txt` files and of the descriptions in their
    metadata, which most packages fill with their README. Each paragraph is taken once,
    because most of the text would otherwise be copies of a few licences. The text
    depends on which packages are installed.
    """
    files = {
        f"{start}/{path.as_posix()}": folder / path
        for start, folder in site_folders().items()
        for path in sorted(path.relative_to(folder) for path in folder.rglob("*"))
        if is_prose(path) and (folder / path).is_file()
    }
    source = FileSource(option, "package-docs", files, read_prose)
    return WithoutRepeats(source, paragraphs_once)


def is_prose(path: Path) -> bool:
    """Whether an installed file is prose, by its name."""
    if TEST_FOLDERS.intersection(path.parts) or path.name in LISTS_OF_SETUPTOOLS:
        return False
    is_metadata = path.name == METADATA and path.parent.suffix == ".dist-info"
    return is_metadata or path.suffix in PROSE_SUFFIXES


def read_prose(name: str, path: Path, field: str) -> Iterator[Document]:
    """Yields the text of a file with prose, split like other files if it is long."""
    (document,) = read_module(name, path, field)
    text = document.text
    if path.name == METADATA:
        # The description follows the fields after a blank line, as the body of a mail.
        _, _, text = text.partition("\n\n")
    if "\0" not in text:  # Some data files are called .txt too.
        content: Any = io.BytesIO(text.encode())
        yield from read_text(name, path, io.BufferedReader(content))


def find_files(data: str) -> dict[str, Path]:
    """Returns the files of a file, folder or glob, sorted by relative path."""
    path = Path(data).expanduser()
    if path.is_file():
        return {path.name: path}
    # Hidden files in a folder, such as those of .git, are left out, as by a glob's `*`.
    root, pattern = (
        (path, glob.escape(str(path)) + "/**")
        if path.is_dir()
        else (glob_root(path), str(path))
    )
    found = (Path(name) for name in glob.iglob(pattern, recursive=True))
    names = sorted(
        found_path.relative_to(root) for found_path in found if found_path.is_file()
    )
    return {name.as_posix(): root / name for name in names}


def chosen(option: str, data: str, files: dict[str, Path]) -> dict[str, Path]:
    """Returns the files to read, and prints those that are left out.

    It also prints if files are read in several formats. From a folder, the files of the
    first sort that occurs in it are read, in the order of `formats`: the rows of a data
    set, but not its README.md. From a glob, which the user can narrow, all files are
    read.

    Raises:
        UsageError: if the format of one of them is not supported.
    """
    sorts = {name: format_of(path)[0].sort for name, path in files.items()}
    kept = files
    if Path(data).expanduser().is_dir():
        first = min(sorts.values())
        kept = {name: path for name, path in files.items() if sorts[name] == first}
    for path in kept.values():
        try:
            check_format(path)
        except DocumentError as error:
            raise UsageError(f"{option} {data!r}: {error}") from error
    left_out = [name for name in files if name not in kept]
    texts = [name for name in kept if sorts[name] is Sort.TEXT]
    rows = {name: path for name, path in kept.items() if has_rows(path)}
    if left_out:
        notice(
            f"{option} {data!r}: files that are read: {len(kept)} of {len(files)}, "
            f"those of {formats_of(kept)}; left out: {listed(left_out)}; to read "
            f"others, give a glob, such as {str(Path(data) / '**')!r}"
        )
    elif texts and rows:
        notice(
            f"{option} {data!r}: files that are read as rows: {len(rows)}, of "
            f"{formats_of(rows)}; as plain text: {listed(texts)}"
        )
    return kept


def formats_of(files: Mapping[str, Path]) -> str:
    """Returns the names of the formats of files, in words."""
    return ", ".join(sorted({format_of(path)[0].noun for path in files.values()}))


def listed(names: Sequence[str]) -> str:
    rest = len(names) - MOST_NAMES
    more = f" and {rest} more" if rest > 0 else ""
    return ", ".join(names[:MOST_NAMES]) + more


def glob_root(pattern: Path) -> Path:
    """Returns the folder in which a glob begins to vary.

    The files' names are relative to it.
    """
    return next(parent for parent in pattern.parents if not glob.has_magic(str(parent)))

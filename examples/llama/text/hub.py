"""Hugging Face's hub: data sets as streams, and the files of a tokenizer."""

import contextlib
import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from examples.llama.run.errors import UsageError, first_line
from examples.llama.text.decoding import DocumentError
from examples.llama.text.digests import content_digest
from examples.llama.text.readers import named_by_text
from examples.llama.text.rows import FIELD, Document, Row, Tally, row_texts

PREFIX = "hf:"
# A pattern of a model's name on the hub, after its owner, with a revision or without.
NAME_AND_REVISION = r"[\w.-]+(@[\w./-]+)?"
TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL_TOKENS_MAP = "special_tokens_map.json"
TEMPLATE = "chat_template.jinja"
# The files of a tokenizer in a model's folder. The last is a pattern.
TOKENIZER_FILES = (
    TOKENIZER,
    TOKENIZER_CONFIG,
    SPECIAL_TOKENS_MAP,
    "added_tokens.json",
    "tokenizer.model",
    TEMPLATE,
    "additional_chat_templates/*.jinja",
)


def text_documents(rows: Iterable[Row], field: str) -> Iterator[Document]:
    return map(named_by_text, row_texts(rows, field))


@dataclasses.dataclass(frozen=True)
class HubSource:
    """The splits `train` and, if there is one, `validation` of a hub data set."""

    option: str
    data: str
    path: str  # OWNER/NAME, or a folder.
    config: str | None
    revision: str | None = None
    field: str = FIELD  # The field of rows that has their text.
    tallies: dict[str, Tally] = dataclasses.field(default_factory=dict, compare=False)
    documents_of: Callable[[Iterable[Row], str], Iterable[Document]] = text_documents

    @classmethod
    def parse(
        cls,
        option: str,
        data: str,
        field: str = FIELD,
        documents_of: Callable[
            [Iterable[Row], str], Iterable[Document]
        ] = text_documents,
    ) -> "HubSource":
        """Returns the source that `data` names.

        The name is `hf:OWNER/NAME[/CONFIG][@REVISION]` or `hf:/FOLDER[/CONFIG]`.
        `documents_of` makes documents of a split's rows, given the field.
        """
        name = data.removeprefix(PREFIX)
        if name.startswith(("/", "./", "../", "~")):
            path, config = local_parts(Path(name).expanduser().absolute())
            return cls(
                option, data, path, config, field=field, documents_of=documents_of
            )
        name, _, revision = name.partition("@")
        owner, *rest = name.split("/")
        if not owner or not all(rest) or len(rest) not in (1, 2):
            raise UsageError(
                f"{option} {data!r} is no name of a data set; give hf:OWNER/NAME, "
                "hf:OWNER/NAME/CONFIG, or hf:/FOLDER for one on disk"
            )
        return cls(
            option,
            data,
            f"{owner}/{rest[0]}",
            rest[1] if len(rest) == 2 else None,
            revision or None,
            field,
            documents_of=documents_of,
        )

    def __iter__(self) -> Iterator[Document]:
        if "train" not in self._splits:
            raise UsageError(
                f"{self.option} {self.data!r} has no split 'train'; its splits are: "
                f"{', '.join(self._splits)}; give a data set or configuration that has "
                "one"
            )
        return self._read("train")

    def held_out(self) -> Iterator[Document] | None:
        return self._read("validation") if "validation" in self._splits else None

    def fingerprint(self) -> str:
        """Returns a digest of the name, and of the files if the data set is a folder.

        The content behind a name on the hub is known only after reading it. A REVISION
        fixes the content.
        """
        folder = Path(self.path)
        paths = sorted(folder.rglob("*")) if folder.is_absolute() else []
        files = {
            str(path.relative_to(folder)): path for path in paths if path.is_file()
        }
        try:
            content = [
                self.path,
                self.config,
                self.revision,
                content_digest(self.data, files),
            ]
            if self.field != FIELD:
                content.append(self.field)
        except DocumentError as error:
            raise UsageError(f"{self.option} {self.data!r}: {error}") from error
        return hashlib.sha256(repr(content).encode()).hexdigest()

    def has_rows(self) -> bool:
        return True

    def say_skipped(self) -> None:
        for tally in self.tallies.values():
            tally.say()

    @functools.cached_property
    def _splits(self) -> "dict[str, Iterable[Any]]":
        try:
            import datasets  # The import is here since it is slow and few need it.
        except ImportError as error:
            raise UsageError(
                f"{self.option} {self.data!r} needs Hugging Face's datasets; "
                "run pip install '.[examples]' in the clone"
            ) from error
        with self._one_line_errors():
            splits = datasets.load_dataset(
                self.path, self.config, revision=self.revision, streaming=True
            )
        return {str(name): split for name, split in splits.items()}

    def _read(self, split: str) -> Iterator[Document]:
        empty = True
        rows = (
            Row(f"row {number} of split {split!r}", row)
            for number, row in enumerate(self._splits[split], 1)
        )
        documents = self.documents_of(rows, self.field)
        tally = self.tallies.setdefault(split, Tally())
        source = f"{self.option} {self.data!r}, split {split!r}"
        with self._one_line_errors():
            for document in tally.with_text(documents, source):
                empty = False
                yield document
        if empty:
            raise UsageError(
                f"{self.option} {self.data!r} has no text in its split {split!r}; "
                "give another"
            )

    @contextlib.contextmanager
    def _one_line_errors(self) -> Iterator[None]:
        from datasets.exceptions import DatasetsError

        try:
            yield
        except DocumentError as error:
            raise UsageError(f"{self.option} {self.data!r}: {error}") from error
        # An unknown configuration or a malformed row is a ValueError. A data set that
        # is a script, which is no longer run, is a RuntimeError.
        except (*network_errors(), ValueError, RuntimeError, DatasetsError) as error:
            raise UsageError(
                f"{self.option} {self.data!r} cannot be read ({first_line(error)}); "
                "check the name, the network and, for a data set with terms to agree "
                "to, `hf auth login`"
            ) from error


def network_errors() -> tuple[type[BaseException], ...]:
    """Returns the errors of the hub, of its HTTP client and of the system."""
    from huggingface_hub.errors import HfHubHTTPError

    # Which HTTP client the hub has depends on its version. The client's errors are the
    # bases of the hub's.
    return OSError, *HfHubHTTPError.__bases__


def local_parts(path: Path) -> tuple[str, str | None]:
    """Returns the folder and the configuration of a path.

    A README.md marks the folder. That of the folder above counts only if it begins with
    a block of metadata, which names the configurations, since many projects have a
    README.md.
    """
    above = path.parent / "README.md"
    if (path / "README.md").exists() or not above.exists():
        return str(path), None
    with above.open(encoding="utf-8", errors="replace") as file:
        has_metadata = file.readline().strip() == "---"
    return (str(path.parent), path.name) if has_metadata else (str(path), None)


def tokenizer_folder(name: str, option: str) -> Path:
    """Returns a folder with a hub model's tokenizer; raises like `model_snapshot`."""
    return model_snapshot(
        option,
        name,
        TOKENIZER_FILES,
        is_complete=lambda folder: (folder / TOKENIZER).exists(),
    )


def model_snapshot(
    option: str,
    name: str,
    patterns: Iterable[str],
    *,
    is_complete: Callable[[Path], bool],
) -> Path:
    """Returns a folder with files of a hub model, downloaded when they are first used.

    Args:
        option: the name in errors of the option for the model, as "`init_from`".
        name: the model's name on the hub, or NAME@REVISION.
        patterns: patterns of the files' names.
        is_complete: whether a folder in the cache has the files that are needed.

    Raises:
        UsageError: if the files are not in Hugging Face's cache and not available.
    """
    import huggingface_hub  # The import is here since it is slow and few need it.
    from huggingface_hub.errors import LocalEntryNotFoundError

    model, _, revision = name.partition("@")

    def download(*, local_files_only: bool) -> Path:
        folder = huggingface_hub.snapshot_download(
            model,
            revision=revision or None,
            allow_patterns=list(patterns),
            local_files_only=local_files_only,
        )
        return Path(folder)

    try:
        # A downloaded copy is used as it is, so that runs do not change under a user
        # and need no network.
        with contextlib.suppress(LocalEntryNotFoundError):
            folder = download(local_files_only=True)
            if is_complete(folder):
                return folder
        return download(local_files_only=False)
    except (*network_errors(), ValueError) as error:
        raise UsageError(
            f"{option} {name!r} is no file or folder here, nor to be had from the "
            f"hub ({first_line(error)}); check the name, the network and, for a model "
            "with terms to agree to, `hf auth login`"
        ) from error

"""Which documents are held out for validation."""

import hashlib
from collections.abc import Iterable, Iterator

from examples.llama.run.errors import UsageError
from examples.llama.text.rows import Document

TRAIN, VALIDATION = "train", "validation"
VALIDATION_SHARE = 1 / 20

Labelled = tuple[str, Document]  # A document after the split that it falls into.


def in_validation(name: str) -> bool:
    """Whether a document is held out, by a hash of its name alone.

    So adding documents does not move others to the other split.
    """
    return draw(name) < VALIDATION_SHARE * 2**64


def draw(name: str) -> int:
    """Returns a number below 2**64 that depends only on the name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def split(documents: Iterable[Document], data: str) -> Iterator[Labelled]:
    """Yields the documents in reading order with their splits, at least one in each.

    If the hash would leave a split empty, which happens with few documents only, the
    document whose number is closest to the split is moved there.

    Raises:
        UsageError: if there is only one document; the message names `data`.
    """
    # These documents wait until it is known that neither split stays empty.
    waiting: list[Document] = []
    found: set[bool] = set()
    for document in documents:
        waiting.append(document)
        found.add(in_validation(document.name))
        if len(found) == 2:
            yield from (
                (VALIDATION if in_validation(d.name) else TRAIN, d) for d in waiting
            )
            waiting.clear()
    if len(found) == 2:
        return
    names = {document.name for document in waiting}
    if len(names) < 2:
        raise UsageError(
            f"`data` {data!r} has 1 document, repetitions aside, and training and "
            "validation need one each; add documents (a long text is cut at its blank "
            "lines), or give `validation`"
        )
    if found == {False}:
        nearest, its_split, others = min(names, key=draw), VALIDATION, TRAIN
    else:
        nearest, its_split, others = max(names, key=draw), TRAIN, VALIDATION
    # Documents of one name have the same text, so they go to the same split.
    yield from (
        (its_split if document.name == nearest else others, document)
        for document in waiting
    )

"""A part's tables, on disk as Markdown and as JSON after every row."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.report import markdown
from examples.llama.text.cache import write_whole


class Table:
    """The rows of a table by name; a row that is put again is replaced.

    Args:
        report: the report, which is written after each row.
        title: the line above the table.
        head: the columns.
        numbers_from: the first column to align to the right.
    """

    def __init__(
        self, report: "Report", title: str, head: Sequence[str], numbers_from: int
    ) -> None:
        self._report, self.title = report, title
        self._head, self._numbers_from = head, numbers_from
        self._cells: dict[str, Sequence[str]] = {}
        self._values: dict[str, Any] = {}

    def put(self, name: str, cells: Sequence[str], values: Any = None) -> None:
        """Adds a row: its cells, and for the JSON the values behind them."""
        self._cells[name] = [*cells, *[""] * (len(self._head) - len(cells))]
        self._values[name] = values
        self._report.write()

    def as_markdown(self) -> str:
        rows = markdown(self._head, self._cells.values(), self._numbers_from)
        return f"{self.title}\n\n{rows}"

    def as_json(self) -> dict[str, Any]:
        rows = [
            {"name": name, "cells": dict(zip(self._head, cells, strict=True))}
            | {"values": self._values[name]}
            for name, cells in self._cells.items()
        ]
        return {"title": self.title, "rows": rows}


class Report:
    """The results of a part: OUT/PART.md for people and OUT/PART.json for programs.

    Args:
        folder: OUT.
        part: the name of the part.
        made_with: the card, the versions and the date.
    """

    def __init__(self, folder: Path, part: str, made_with: str) -> None:
        self.folder, self.part = folder, part
        self._made_with = made_with
        self._tables: list[Table] = []
        self._notes: list[str] = []

    def table(self, title: str, head: Sequence[str], numbers_from: int) -> Table:
        self._tables.append(Table(self, title, head, numbers_from))
        return self._tables[-1]

    def note(self, text: str) -> None:
        """Adds a paragraph below the tables."""
        self._notes.append(text)
        self.write()

    def as_markdown(self) -> str:
        paragraphs = (table.as_markdown() for table in self._tables)
        head = f"`python -m benchmarks.gpu {self.part}` ({self._made_with})"
        return "\n\n".join([head, *paragraphs, *self._notes]) + "\n"

    def write(self) -> None:
        tables = [table.as_json() for table in self._tables]
        found = {"part": self.part, "made_with": self._made_with, "tables": tables}
        found["notes"] = self._notes
        write_whole(self.folder / f"{self.part}.md", self.as_markdown())
        write_whole(
            self.folder / f"{self.part}.json", json.dumps(found, indent=1) + "\n"
        )

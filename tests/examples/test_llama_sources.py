import gzip
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from examples.llama.run.errors import UsageError
from examples.llama.text import hub, readers, sources

README = """\
---
configs:
- config_name: en
  data_files:
  - split: train
    path: en/c4-train.*.json.gz
  - split: validation
    path: en/c4-validation.*.json.gz
- config_name: fr
  data_files:
  - split: train
    path: fr/*.json.gz
- config_name: held-out
  data_files:
  - split: validation
    path: en/c4-validation.*.json.gz
---
"""


def write(path: str, content: str | bytes) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_bytes(content if isinstance(content, bytes) else content.encode())


def json_lines(*texts: str) -> bytes:
    return "".join(
        json.dumps({"text": text, "url": "x"}) + "\n" for text in texts
    ).encode()


def write_hub_dataset(folder: Path) -> None:
    """Writes a data set in the layout of allenai/c4."""
    write(f"{folder}/README.md", README)
    for shard in range(2):
        name = f"{folder}/en/c4-train.{shard:05}-of-00002.json.gz"
        write(
            name,
            gzip.compress(json_lines(*(f"train {shard} {row}" for row in range(30)))),
        )
    write(
        f"{folder}/en/c4-validation.00000-of-00001.json.gz",
        gzip.compress(json_lines("held", "out")),
    )
    write(
        f"{folder}/fr/c4-train.00000-of-00001.json.gz",
        gzip.compress(json_lines("un", "deux", "")),
    )


def texts(data: str) -> list[str]:
    return [document.text for document in sources.open_source("`data`", data)]


def names(data: str) -> list[str]:
    return [document.name for document in sources.open_source("`data`", data)]


def run(code: str, **environment: str) -> list[str]:
    """Returns the lines that a new Python process prints; it reads its environment."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.splitlines()


def test_stdlib_documents_are_sorted_and_tests_skipped(stdlib: Path) -> None:
    found = names("stdlib")
    assert found == sorted(found)
    assert len(found) == 40
    assert "module0.py" in found


def test_the_real_stdlib_is_read() -> None:
    found = set(names("stdlib"))
    assert {"json/decoder.py", "dataclasses.py"} <= found
    assert not any("site-packages" in name for name in found)


def test_stdlib_needs_no_slow_imports(tmp_path: Path) -> None:
    code = "; ".join(
        (
            "import sys",
            "from examples.llama.text import corpus, loader, sources",
            "next(iter(sources.open_source('`data`', 'stdlib')))",
            "print(sorted({'datasets', 'pyarrow', 'huggingface_hub'} & set(sys.modules)))",
        )
    )
    assert run(code) == ["[]"]


def test_text_files_are_documents_named_by_their_relative_path(folder: Path) -> None:
    write("corpus/b.txt", "bee\r\nsea\n")
    write("corpus/deep/a.md", "grüße 🚀\n")
    write("corpus/deep/latin", "caf\xe9\n".encode("latin-1"))
    write("corpus/blank.txt", " \n")
    write("corpus/.git/config", "hidden\n")
    expected = [
        ("b.txt", "bee\nsea\n"),
        ("deep/a.md", "grüße 🚀\n"),
        ("deep/latin", "caf\N{REPLACEMENT CHARACTER}\n"),
    ]
    assert list(sources.open_source("`data`", "corpus")) == expected
    assert list(sources.open_source("`data`", str(folder / "corpus"))) == expected
    assert list(sources.open_source("`data`", "corpus/**")) == expected
    assert list(sources.open_source("`data`", "corpus/*.txt")) == expected[:1]
    assert list(sources.open_source("`data`", "corpus/b.txt")) == expected[:1]


def test_an_existing_file_may_have_a_name_like_a_glob(folder: Path) -> None:
    write("a[1]/b*.txt", "found\n")
    write("a1/b.txt", "other\n")
    assert texts("a[1]") == texts("a[1]/b*.txt") == ["found\n"]
    assert texts("a?/b.txt") == ["other\n"]


def test_documents_can_be_read_again(folder: Path) -> None:
    write("one.txt", "one\n")
    documents = sources.open_source("`data`", "one.txt")
    assert list(documents) == list(documents) == [("one.txt", "one\n")]


def test_long_text_is_split_after_blank_lines(folder: Path) -> None:
    paragraphs = [f"{number} ".ljust(1000, "x") + "\n\n" for number in range(100)]
    write("book.txt", "".join(paragraphs))
    pieces = texts("book.txt")
    assert "".join(pieces) == "".join(paragraphs)
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert all(
        readers.PIECE_BYTES <= len(piece) < readers.PIECE_BYTES + 1002
        for piece in pieces[:-1]
    )
    assert readers.PIECE_BYTES <= len(pieces[-1]) < 2 * (readers.PIECE_BYTES + 1002)
    # The name of a piece is a digest of its text, so most names stay the same when text
    # is added in front.
    before = set(names("book.txt"))
    write("book.txt", "y" * readers.PIECE_BYTES + "\n\n" + "".join(paragraphs))
    assert before < set(names("book.txt"))


def test_text_of_one_paragraph_or_of_moderate_length_stays_whole(folder: Path) -> None:
    write("line.txt", "x" * 2 * readers.LONG_FILE_BYTES)
    write("moderate.txt", "x\n\n" * (readers.LONG_FILE_BYTES // 3))
    assert [len(text) for text in texts("line.txt")] == [2 * readers.LONG_FILE_BYTES]
    assert names("moderate.txt") == ["moderate.txt"]


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.jsonl.gz", "rows.json.gz"])
def test_json_lines(folder: Path, name: str) -> None:
    content = json_lines("one\ntwo", "", "grüße 🚀") + b'\n{"text": "half \\ud83d"}\n'
    write(name, gzip.compress(content) if name.endswith(".gz") else content)
    assert texts(name) == ["one\ntwo", "grüße 🚀", "half ?"]
    assert all(len(found) == 64 for found in names(name))


def test_parquet(folder: Path) -> None:
    rows = [f"row {number}" for number in range(3000)]
    for column_type in (pa.string(), pa.large_string()):
        table = pa.table({"id": list(range(3000)), "text": pa.array(rows, column_type)})
        parquet.write_table(table, "rows.parquet", row_group_size=700)
        assert texts("rows.parquet") == rows


def test_rows_are_named_by_their_text(folder: Path) -> None:
    write("a.jsonl", json_lines("one", "two"))
    parquet.write_table(pa.table({"text": ["two", "one"]}), "b.parquet")
    assert names("a.jsonl") == names("b.parquet")[::-1]


def test_a_glob_may_mix_formats(folder: Path) -> None:
    write("mixed/a.jsonl", json_lines("row"))
    write("mixed/b.txt", "text\n")
    parquet.write_table(pa.table({"text": ["column"]}), "mixed/c.parquet")
    assert texts("mixed/*") == ["row", "text\n", "column"]


def test_hub_dataset(folder: Path) -> None:
    write_hub_dataset(folder / "c4")
    source = sources.open_source("`data`", f"hf:{folder}/c4/en")
    assert [document.text for document in source][:2] == ["train 0 0", "train 0 1"]
    assert len(list(source)) == len({document.name for document in source}) == 60
    assert [document.text for document in source.held_out() or ()] == ["held", "out"]


def test_hub_dataset_without_a_validation_split(folder: Path) -> None:
    write_hub_dataset(folder / "c4")
    source = sources.open_source("`data`", "hf:./c4/fr")
    assert [document.text for document in source] == ["un", "deux"]
    assert source.held_out() is None


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("hf:allenai/c4/en", ("allenai/c4", "en", None)),
        ("hf:allenai/c4", ("allenai/c4", None, None)),
        ("hf:allenai/c4/en@refs/pr/1", ("allenai/c4", "en", "refs/pr/1")),
    ],
)
def test_hub_names(data: str, parts: tuple[str | None, ...]) -> None:
    source = hub.HubSource.parse("`data`", data)
    assert (source.path, source.config, source.revision) == parts


def test_fingerprints_change_with_names_and_content_only(folder: Path) -> None:
    write("a/x.txt", "one")
    write("b/x.txt", "one")
    write("c/y.txt", "one")
    write("d/x.txt", "two")
    found = [
        sources.open_source("`data`", data).fingerprint()
        for data in ("a", "b/*.txt", "c", "d")
    ]
    assert found[0] == found[1]
    assert len(set(found)) == 3


def test_files_are_hashed_again_only_if_size_or_time_change(folder: Path) -> None:
    write("a/x.txt", "one")
    write("a/y.txt", "two")
    times = os.stat("a/x.txt").st_atime_ns, os.stat("a/x.txt").st_mtime_ns
    first = sources.open_source("`data`", "a").fingerprint()
    write("a/x.txt", "six")
    os.utime("a/x.txt", ns=times)
    assert sources.open_source("`data`", "a").fingerprint() == first
    os.utime("a/x.txt", ns=(times[0], times[1] + 1))
    assert sources.open_source("`data`", "a").fingerprint() != first


def test_a_hub_copy_has_the_fingerprint_of_its_files(folder: Path) -> None:
    write_hub_dataset(folder / "c4")
    before = sources.open_source("`data`", f"hf:{folder}/c4/fr").fingerprint()
    write(
        "c4/fr/c4-train.00000-of-00001.json.gz",
        gzip.compress(json_lines("trois", "quatre")),
    )
    assert sources.open_source("`data`", f"hf:{folder}/c4/fr").fingerprint() != before


def bad_parquet() -> None:
    parquet.write_table(pa.table({"id": [1], "body": ["x"]}), "columns.parquet")
    parquet.write_table(pa.table({"text": [1]}), "number.parquet")
    write("corrupt.parquet", b"PAR1 nothing of the kind PAR1")


@pytest.mark.parametrize(
    ("prepare", "data", "message"),
    [
        (
            None,
            "std",
            "`data` 'std' is unknown; choose one of: stdlib, python, package-docs, or give a file, folder or glob that ex",
        ),
        (
            None,
            "no/*.txt",
            r"`data` 'no/\*.txt' matches no file; give a glob that does",
        ),
        (
            lambda: Path("d").mkdir(),
            "d",
            "`data` 'd' is a folder without files; give one with text",
        ),
        (
            lambda: write("e.txt", ""),
            "e.txt",
            "`data` 'e.txt' has no text in its 1 files; give files",
        ),
        (
            lambda: write("e.jsonl", '{"text": ""}'),
            "e.jsonl",
            "`data` 'e.jsonl' has no text in its 1 files",
        ),
        (
            lambda: write("d/b.bin", b"\x7fELF\0\0"),
            "d",
            r"`data` 'd': d/b.bin is binary, not text .*; leave it out, as with a glob such as 'd/\*.txt'",
        ),
        (
            lambda: write("j.jsonl", '{"text": "x"}\n{"text": \n'),
            "j.jsonl",
            "`data` 'j.jsonl': j.jsonl:2 is not JSON .*; give one JSON object a line",
        ),
        (
            lambda: write("j.jsonl", '\n{"body": "x", "id": 1}\n'),
            "j.jsonl",
            r"j.jsonl:2 has no string called 'text'; its fields are: body \(str\), id \(int\); name the one",
        ),
        (
            lambda: write("j.jsonl", '{"text": 5}'),
            "j.jsonl",
            r"j.jsonl:1 has no string .*: text \(int\); name",
        ),
        (
            lambda: write("j.jsonl", '["x"]'),
            "j.jsonl",
            "j.jsonl item 1 is a str; give JSON objects with a field",
        ),
        (
            lambda: write("j.jsonl.gz", b"plain"),
            "j.jsonl.gz",
            "j.jsonl.gz is not a whole gzip file .*; make or",
        ),
        (
            lambda: write("j.json.gz", gzip.compress(json_lines("x" * 99))[:-20]),
            "j.json.gz",
            "j.json.gz is not a whole gzip file .*; make or get it again",
        ),
        (
            bad_parquet,
            "columns.parquet",
            "columns.parquet has no column 'text'; its columns are: id, body; name",
        ),
        (
            bad_parquet,
            "number.parquet",
            r"number.parquet row 1 has no string called 'text'; .* text \(int\)",
        ),
        (
            bad_parquet,
            "corrupt.parquet",
            "corrupt.parquet is not a readable Parquet file .*; make or get it",
        ),
        (None, "hf:c4", "`data` 'hf:c4' is no name of a data set; give hf:OWNER/NAME"),
        (None, "hf:a/b/c/d", "`data` 'hf:a/b/c/d' is no name of a data set"),
        (
            None,
            "hf:/nowhere",
            "`data` 'hf:/nowhere' cannot be read .*/nowhere.*; check the name",
        ),
        (
            lambda: write_hub_dataset(Path("c4")),
            "hf:./c4/de",
            "cannot be read .*BuilderConfig 'de' not found. Available: .*'en', 'fr'.*; check the name",
        ),
        (
            lambda: write_hub_dataset(Path("c4")),
            "hf:./c4/held-out",
            "has no split 'train'; its splits are: validation; give",
        ),
        (
            lambda: write("c/data.jsonl", '{"body": "x"}\n'),
            "hf:./c",
            r"'hf:./c': row 1 of split 'train' has no string called 'text'; its fields are: body \(str\)",
        ),
        (
            lambda: write("c/data.jsonl", '{"text": ""}\n'),
            "hf:./c",
            "`data` 'hf:./c' has no text in its split 'train'; give another",
        ),
    ],
)
def test_rejects_sources_without_documents(
    folder: Path, prepare: Callable[[], object] | None, data: str, message: str
) -> None:
    if prepare:
        prepare()
    with pytest.raises(UsageError, match=message) as caught:
        list(sources.open_source("`data`", data))
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith(f"`data` {data!r}")


@pytest.mark.skipif(not Path("/proc/self/mem").exists(), reason="needs Linux")
def test_rejects_an_unreadable_file(folder: Path) -> None:
    # A superuser can read any file, but not the first page of memory.
    memory = "/proc/self/mem"
    with pytest.raises(
        UsageError,
        match=f"`data` '{memory}': {memory} cannot be read .*; make it readable",
    ):
        list(sources.open_source("`data`", memory))
    with pytest.raises(
        UsageError, match=f"`validation` '{memory}': {memory} cannot be read"
    ):
        sources.open_source("`validation`", memory).fingerprint()


@pytest.mark.parametrize(
    ("module", "data"), [("pyarrow", "x.parquet"), ("datasets", "hf:./c")]
)
def test_names_missing_packages(
    folder: Path, monkeypatch: pytest.MonkeyPatch, module: str, data: str
) -> None:
    write("c/data.jsonl", json_lines("x"))
    parquet.write_table(pa.table({"text": ["x"]}), "x.parquet")
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(
        UsageError,
        match=rf"`data` '{data}'.* needs .*; run pip install '.\[examples\]' in the clone",
    ):
        list(sources.open_source("`data`", data))


def test_an_unreachable_hub_is_one_line(tmp_path: Path) -> None:
    code = """
from examples.llama.text import sources
from examples.llama.run.errors import UsageError
try:
    list(sources.open_source("`data`", "hf:allenai/c4/en"))
except UsageError as error:
    print(error)
"""
    (line,) = run(code, HF_HUB_OFFLINE="1", HF_HOME=str(tmp_path))
    assert line.startswith(
        "`data` 'hf:allenai/c4/en' cannot be read (Couldn't reach 'allenai/c4' on the Hub"
    )
    assert "check the name, the network" in line


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A standard library of one file, and a folder of packages beside it."""
    write("stdlib/os.py", "import sys\n")
    (folder / "packages").mkdir()
    monkeypatch.setattr(sources, "stdlib_folder", lambda: folder / "stdlib")
    monkeypatch.setattr(
        sources, "site_folders", lambda: {"purelib": folder / "packages"}
    )
    return folder / "packages"


LICENCE = "# Copyright the authors.\n#\n# Licensed under terms.\n\n"


def test_python_has_each_text_and_each_opening_comment_once(installed: Path) -> None:
    write("packages/a/one.py", LICENCE + "one = 1\n")
    write("packages/a/two.py", LICENCE + "two = 2\n")
    write("packages/a/vendored.py", LICENCE + "one = 1\n")
    write("packages/a/only_comment.py", "# Nothing to see.\n")
    write("packages/a/empty.py", "")
    write("packages/a/notes.txt", "not Python")
    documents = {
        document.name: document.text
        for document in sources.open_source("`data`", "python")
    }
    assert documents == {
        "stdlib/os.py": "import sys\n",
        "purelib/a/one.py": LICENCE + "one = 1\n",
        "purelib/a/two.py": "two = 2\n",
    }
    # A second reading gives the same, since each reading looks for repeats anew.
    assert names("python") == list(documents)


def test_the_fingerprint_of_python_follows_its_files(installed: Path) -> None:
    write("packages/a.py", "a = 1\n")
    before = sources.open_source("`data`", "python").fingerprint()
    assert sources.open_source("`data`", "python").fingerprint() == before
    assert sources.open_source("`data`", "stdlib").fingerprint() != before
    write("packages/a.py", "a = 22\n")
    assert sources.open_source("`data`", "python").fingerprint() != before


def test_package_docs_are_the_english_of_packages_each_paragraph_once(
    installed: Path,
) -> None:
    licence = "Licensed under terms.\n\nNo warranty,\nof any kind.\n"
    write("packages/b/LICENSE.txt", licence)
    write("packages/a/README.md", f"# A\n\n    code = 1\n\n{licence}")
    write(
        "packages/a/guide.rst", "Guide\r\n=====\r\n\r\nNo  warranty, of any kind.\r\n"
    )
    write("packages/a/copy.txt", licence)
    write("packages/a/module.py", "one = 1\n")
    write("packages/a/tests/numbers.txt", "1 2 3\n")
    write("packages/a/binary.txt", b"ab\0c\n")
    write("packages/a-1.0.dist-info/top_level.txt", "a\n")
    write("packages/a-1.0.dist-info/METADATA", "Name: a\n\nA package.\n\n\nIt does.\n")
    write("packages/a/METADATA", "Name: none of a package\n\nNothing.\n")
    documents = {
        document.name: document.text
        for document in sources.open_source("--data", "package-docs")
    }
    assert list(documents.items()) == [
        ("purelib/a/README.md", f"# A\n\n    code = 1\n\n{licence}"),
        ("purelib/a/guide.rst", "Guide\n=====\n"),
        ("purelib/a-1.0.dist-info/METADATA", "A package.\n\nIt does.\n"),
    ]
    # A second reading gives the same names, because each looks for repeats anew.
    assert names("package-docs") == list(documents)


def test_long_package_docs_are_cut_as_other_text(installed: Path) -> None:
    paragraphs = [f"{number} ".ljust(1000, "x") + "\n\n" for number in range(100)]
    write("packages/NEWS.md", "".join(paragraphs))
    found = texts("package-docs")
    assert len(found) > 4
    assert "\n".join(found) == "".join(paragraphs).rstrip("\n") + "\n"


def test_an_opening_comment_ends_with_the_first_line_of_code() -> None:
    opening, body = sources.split_opening_comment(
        "#!/bin/python\n\n# Note.\nx = 1  # One.\n# Two.\n"
    )
    assert opening == "#!/bin/python\n\n# Note.\n"
    assert body == "x = 1  # One.\n# Two.\n"
    assert sources.split_opening_comment('"""Doc."""\n')[0] == ""


def test_package_folders_belong_to_this_python() -> None:
    found = list(sources.site_folders().values())
    assert len(set(found)) == len(found)
    assert any((folder / "jax" / "__init__.py").exists() for folder in found)


def test_an_empty_module_of_the_standard_library_is_a_document(
    stdlib: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (stdlib / "empty.py").touch()
    documents = {document.name: document.text for document in sources.stdlib()}
    assert documents["empty.py"] == ""
    assert capsys.readouterr().err == ""


@pytest.mark.usefixtures("folder")
def test_a_readme_above_a_folder_does_not_make_it_a_configuration() -> None:
    """Many projects have a README.md beside their data."""
    pytest.importorskip("datasets")
    write("project/README.md", "# A project\n")
    write("project/set/data.jsonl", json_lines("one", "two"))
    assert texts("hf:project/set") == ["one", "two"]

"""How files of each format are read, and the messages about those that are not."""

import bz2
import codecs
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from examples.llama import tokenise
from examples.llama.hf import config as hf_config
from examples.llama.run.errors import UsageError
from examples.llama.text import chat, corpus, rows, sources
from tests.examples.test_llama_sources import write

ROWS = [{"id": number, "text": f"Document {number}."} for number in range(20)]
TEXTS = [f"Document {number}." for number in range(20)]
LINES = "\n".join(map(json.dumps, ROWS))
TABLE = "id,text\n" + "\n".join(f'{row["id"]},"{row["text"]}"' for row in ROWS)
CONTENTS = {
    "array.json": json.dumps(ROWS, indent=1),
    "compact.json": json.dumps(ROWS),
    "lines.json": LINES,
    "blank.json": "\n\n" + json.dumps(ROWS, indent=1),
    "lines.ndjson": LINES,
    "array.ndjson": json.dumps(ROWS),
    "lines.JSONL": LINES,
    "lines.jsonl.txt": LINES,
    "array.JSON.txt": json.dumps(ROWS, indent=1),
    "table.csv": TABLE,
    "table.CSV": TABLE.replace("\n", "\r\n"),
    "table.csv.txt": TABLE,
    "table.tsv": TABLE.replace(",", "\t"),
}


pytestmark = pytest.mark.usefixtures("folder")


def write_parquet(path: str, **columns: object) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pa.table(columns), path)


def texts(data: str, **options: str) -> list[str]:
    source = sources.open_source("`data`", data, **options)
    return [document.text for document in source]


def refusal(data: str, **options: str) -> str:
    with pytest.raises(UsageError) as caught:
        texts(data, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zstd(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstd,
}

# Formats.


@pytest.mark.parametrize("name", CONTENTS)
def test_rows_are_read_by_suffix_and_content(name: str) -> None:
    write(name, CONTENTS[name])
    assert texts(name) == TEXTS


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_as_their_content(suffix: str) -> None:
    compress = COMPRESS[suffix]
    for name in ("a.jsonl", "a.JSON", "a.csv"):
        content = TABLE if name == "a.csv" else LINES
        # Parallel compressors, and `cat` of two files, write one stream after another.
        halves = content[:100].encode(), content[100:].encode()
        write(name + suffix, b"".join(map(compress, halves)))
        assert texts(name + suffix) == TEXTS
    write("a.txt" + suffix.upper(), compress(b"plain\n"))
    assert texts("a.txt" + suffix.upper()) == ["plain\n"]
    write("a.jsonl" + suffix, compress(LINES.encode())[:-9])
    assert "is not a whole" in refusal("a.jsonl" + suffix)
    write("a.jsonl" + suffix, LINES)
    assert f"a.jsonl{suffix} is not a whole" in refusal("a.jsonl" + suffix)


def test_parquet_has_other_suffixes_too() -> None:
    write_parquet("a.pq", text=["one"])
    write_parquet("b.PARQUET", text=["two"])
    assert texts("*.*") == ["one", "two"]


def test_one_object_over_several_lines_is_a_document() -> None:
    write("paper.json", json.dumps({"text": "body", "pages": 3}, indent=2))
    assert texts("paper.json") == ["body"]


def test_quoted_cells_may_hold_anything() -> None:
    text = 'a "quoted", word\nand a line ' + "x" * 200_000
    quoted = text.replace('"', '""')
    write("table.csv", f'text,id\r\n"{quoted}",1\r\n\r\nplain,2\r\n,3\r\n')
    assert texts("table.csv") == [text, "plain"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("paper.pdf", "a PDF that is not read here; convert it to plain text, as with"),
        ("paper.DOCX", "a document of a word processor that is not read"),
        ("book.ipynb", "a Jupyter notebook that is not read"),
        ("table.xlsx", "a spreadsheet that is not read here; write it as Parquet"),
        ("data.arrow", "an Arrow file that is not read here; write it as Parquet"),
        ("rows.avro", "a table that is not read here; write it"),
        ("rows.jsonl.lz4", "decompress it, or compress it with gzip, bzip2, xz or"),
        ("corpus.tar.gz", "an archive that is not read here; unpack it"),
        ("corpus.ZIP", "an archive that is not read here; unpack it"),
        ("rows.parquet.gz", "a compressed Parquet file that is not read here; decomp"),
    ],
)
def test_rejects_known_formats_without_a_reader(name: str, said: str) -> None:
    write(name, "text that gives no hint")
    write("first.txt", "text")
    error = refusal("*")
    assert error.startswith(f"`data` '*': {name} is ")
    assert said in error
    # The error comes before any file is read, since reading may take hours.
    with pytest.raises(UsageError, match="is not read here"):
        sources.open_source("`data`", "*")


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("data.txt", LINES, "holds JSON, not plain text; name it .json (an array) or"),
        ("data", json.dumps(ROWS), "holds JSON, not plain text"),
        ("data.bak", " [\n {", "holds JSON, not plain text"),
        ("data.txt", '\ufeff{"text": "one"}', "holds JSON, not plain text"),
        ("wide.txt", '{"text": "one"}'.encode("utf-16"), "holds JSON, not plain text"),
        ("paper.txt", b"%PDF-1.7\n", "holds a PDF, not plain text; convert it to"),
        (
            "rows.jsonl",
            gzip.compress(b"{}", mtime=0),
            "holds gzip's output, not JSON lines; add",
        ),
        ("rows.csv", b"PK\3\4", "holds a ZIP archive, not CSV; unpack it"),
        ("rows.txt", zstd(b"text"), "holds zstd's output, not plain text; add .zst"),
        ("rows", b"PAR1", "holds Parquet, not plain text; name it .parquet"),
    ],
)
def test_rejects_a_file_of_another_format_than_its_suffix(
    name: str, content: str | bytes, said: str
) -> None:
    write(name, content)
    assert f"{name} {said}" in refusal(name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl.gz", "a.parquet", "a.json"])
def test_rejects_a_pointer_of_git_lfs(name: str) -> None:
    write(name, "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "is a pointer of Git LFS, not the file itself; run git lfs" in refusal(name)


@pytest.mark.parametrize(
    "text", ["[1] A note.\n", "{x} braces\n", '"quoted"\n', "[link](url)\n", "{}\n"]
)
def test_prose_with_brackets_is_text(text: str) -> None:
    write("notes.txt", text)
    assert texts("notes.txt") == [text]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            'id,text\n1,"open',
            "t.csv:2 is not CSV (unexpected end of data); put the text",
        ),
        (
            "id,text\n1,one, two\n",
            "t.csv:2 ends a row of 3 cells, and the header has 2",
        ),
        (
            "id;text\n1;one\n",
            "t.csv:2 has no string called 'text'; its fields are: id;",
        ),
    ],
)
def test_rejects_broken_tables(content: str, said: str) -> None:
    write("t.csv", content)
    assert said in refusal("t.csv")


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("3" * 5000, "is JSON with a number of more than 4300 digits, too long to be"),
        ("[" * 100_000, "is JSON with brackets nested too deep to be read; remove"),
        ('{"a":' * 100_000, "is JSON with brackets nested too deep to be read"),
        ("nul", "is not JSON (Expecting value: column 24); give one JSON object a"),
    ],
)
def test_rejects_json_that_python_does_not_read(
    name: str, value: str, said: str
) -> None:
    write(name, '{"text": "one"}\n{"text": "pi", "more": ' + value + "}\n")
    assert f"`data` '{name}': {name}:2 {said}" in refusal(name)


def test_rejects_broken_json_arrays() -> None:
    write("a.json", '[\n{"text": "one"},\n{"text" "two"}\n]\n')
    expected = "a.json is not JSON (Expecting ':' delimiter: line 3 column 9); mend it"
    assert expected in refusal("a.json")
    write("a.json", '[\n{"text": "one", "n": ' + "3" * 5000 + "}\n]\n")
    assert "a.json is JSON with a number of more than 4300 digits" in refusal("a.json")


# Rows without text.


@pytest.mark.parametrize(
    "row", ['{"text": null}', "{}", '{"text": " "}', '{"text": NaN}', '{"id": 3}']
)
def test_rows_without_text_are_skipped_and_counted(
    row: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write("nulls.jsonl", f'{row}\n{{"text": "one"}}\n{row}\n{{"text": "two"}}\n')
    assert texts("nulls.jsonl") == ["one", "two"]
    assert capsys.readouterr().err == (
        "--data 'nulls.jsonl': skipped 2 of 4 documents, which have no text (an empty "
        "or null text, or no field for it)\n"
    )


def test_nulls_of_tables_and_data_sets_are_skipped_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_parquet("nulls.parquet", text=["one", None, "two"])
    write("nulls.csv", "id,text\n1,one\n2,\n3\n4,two\n")
    write("hub/data.jsonl", '{"text": null, "id": 1}\n{"text": "one"}\n{"id": 2}\n')
    assert texts("nulls.parquet") == texts("nulls.csv") == ["one", "two"]
    assert texts("hf:./hub") == ["one"]
    said = capsys.readouterr().err.splitlines()
    assert "'nulls.parquet': skipped 1 of 3 documents" in said[0]
    assert "'nulls.csv': skipped 2 of 4 documents" in said[1]
    assert "'hf:./hub', split 'train': skipped 2 of 3 documents" in said[-1]


@pytest.mark.parametrize("content", ['{"text": null}\n' * 3, '{"text": ""}\n'])
def test_rejects_rows_without_any_text(content: str) -> None:
    write("nulls.jsonl", content)
    assert "'nulls.jsonl' has no text in its 1 files" in refusal("nulls.jsonl")


def test_rejects_a_field_that_the_first_rows_lack(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rows, "ROWS_WITHOUT_FIELD", 3)
    row = '{"body": "x"}\n'
    write("late.jsonl", row * 2 + '{"text": "one"}\n' + row * 5)
    assert texts("late.jsonl") == ["one"]
    # The rest of the file is not read.
    write("never.jsonl", row * 3 + "{")
    assert "never.jsonl:1 has no string called 'text'" in refusal("never.jsonl")


def test_a_corpus_says_once_how_many_rows_it_skipped(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The corpus is read twice, for the tokenizer and for the tokens."""
    lines = [json.dumps({"text": f"Document {n} of spam."}) for n in range(60)]
    write("nulls.jsonl", "\n".join([*lines, '{"text": null}']))
    corpus.load_corpus("nulls.jsonl", vocab_size=300)
    said = capsys.readouterr().err
    assert said.count("skipped 1 of 61 documents") == said.count("\n") == 1
    # A reader that stops before the end counts the rows that it has read.
    write("nulls.jsonl", "\n".join(['{"text": null}', *lines]))
    corpus.load_corpus("nulls.jsonl", vocab_size=300, max_tokens=50)
    assert "'nulls.jsonl': skipped 1 of " in capsys.readouterr().err


# Encodings.


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_files_with_a_byte_order_mark(encoding: str) -> None:
    for name, content in {
        "a.txt": "Grüße\r\nHello\n",
        "a.jsonl": '{"text": "Grüße\\nHello\\n"}\n\n',
        "a.json": '[\n{"text": "Grüße\\nHello\\n"}\n]',
        "a.csv": 'text\n"Grüße\nHello\n"\n',
    }.items():
        write(name, content.encode(encoding))
        assert texts(name) == ["Grüße\nHello\n"]
        write(name + ".gz", gzip.compress(content.encode(encoding)))
        assert texts(name + ".gz") == ["Grüße\nHello\n"]


def test_documents_that_are_not_utf_8_are_counted(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A whole corpus in another encoding would be trained on as garbage."""
    contents = {
        "a.txt": "Grüße\n",
        "a.jsonl": '{"text": "Grüße"}\n{"text": "Hello"}\n',
        "a.csv": "text\nGrüße\nHello\n",
    }
    for name, content in contents.items():
        write(name, content.encode("cp1252"))
        count = len(texts(name))
        error = capsys.readouterr().err
        assert f"--data '{name}': 1 of {count} documents have replacement" in error
        assert error.endswith("save it as UTF-8\n")
        write(name, content)
        texts(name)
        assert capsys.readouterr().err == ""
    message = '{"messages": [{"role": "%s", "content": "Grüße"}]}\n'
    write("chat.jsonl", (message % "user").encode("cp1252"))
    assert len(list(chat.open_conversations("--data", "chat.jsonl"))) == 1
    assert "1 of 1 documents have replacement" in capsys.readouterr().err


def test_utf_16_is_read_in_either_order_and_split_as_utf_8() -> None:
    text = "".join(f"{n} ".ljust(1000, "ü") + "\n\n" for n in range(60))
    write("narrow.txt", text)
    write("wide.txt", codecs.BOM_UTF16_BE + text.encode("utf-16-be"))
    assert len(texts("wide.txt")) > 1
    assert texts("wide.txt") == texts("narrow.txt")


def test_the_byte_order_mark_of_each_file_is_dropped() -> None:
    for name in ("a.txt", "b.txt"):
        write(f"d/{name}", "Hello".encode("utf-8-sig"))
    write("d/c.py", "Hello".encode("utf-8-sig"))
    assert texts("d") == ["Hello"] * 3
    assert sources.read_module("m", Path("d/c.py"), "text")[0].text == "Hello"


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_models_config_with_a_byte_order_mark(encoding: str) -> None:
    write("config.json", '{"hidden_size": 3}'.encode(encoding))
    assert hf_config.read_json(Path("config.json")) == {"hidden_size": 3}


# The field with the text.


def test_text_field_names_the_field() -> None:
    write("a.jsonl", '{"content": "one", "text": 3}\n{"content": null}\n')
    write("b.json", '[{"content": "one"}]')
    write("c.csv", "id,content\n1,one\n")
    write_parquet("d.parquet", content=["one"], text=["other"])
    write("hub/data.jsonl", '{"content": "one"}\n')
    for data in ("a.jsonl", "b.json", "c.csv", "d.parquet", "hf:./hub"):
        assert texts(data, field="content") == ["one"]


@pytest.mark.parametrize("data", ["a.jsonl", "b.parquet", "hf:./hub"])
def test_errors_name_the_text_field(data: str) -> None:
    write("a.jsonl", '{"content": "one"}\n')
    write_parquet("b.parquet", content=["one"])
    write("hub/data.jsonl", '{"content": "one"}\n')
    for name, error in {
        "text": refusal(data),
        "article": refusal(data, field="article"),
    }.items():
        assert f" {name!r}; its " in error
        assert "content" in error
        assert error.endswith("name the one with the text with `text_field`")


def test_rejects_a_field_of_another_type() -> None:
    write("a.jsonl", '{"messages": [{"role": "user"}]}\n')
    error = refusal("a.jsonl", field="messages")
    assert (
        "a.jsonl:1 has no string called 'messages'; its fields are: messages (list)"
        in error
    )


def test_rejects_a_text_field_for_files_without_rows() -> None:
    for number in range(3):
        write(f"d/{number}.txt", f"text {number}")
    with pytest.raises(
        UsageError, match="`text_field` 'content' is for rows, and the files of `data`"
    ):
        corpus.load_corpus("d", vocab_size=300, text_field="content")
    write("held.jsonl", '{"content": "held"}\n')
    corpus.load_corpus(
        "d", vocab_size=300, text_field="content", validation="held.jsonl"
    )


def test_the_text_field_changes_cache_and_key() -> None:
    lines = ({"text": f"spam {n}", "content": f"eggs {n}"} for n in range(60))
    write("a.jsonl", "\n".join(map(json.dumps, lines)))
    found = [
        corpus.load_corpus("a.jsonl", vocab_size=300, text_field=field)
        for field in ("text", "content", "text")
    ]
    assert found[0].key == found[2].key != found[1].key


def test_the_command_line_takes_a_text_field(
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = ({"content": f"eggs {n}"} for n in range(60))
    write("a.jsonl", "\n".join(map(json.dumps, lines)))
    tokenise.main(["--data", "a.jsonl", "--vocab", "300", "--text-field", "content"])
    assert "ready for runs" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        tokenise.main(["--data", "a.jsonl", "--text-field", ""])
    assert "--text-field is empty; give it a value" in capsys.readouterr().err


# Folders.


def test_a_clone_of_a_data_set_gives_only_its_rows(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_parquet("clone/data/train.parquet", text=["one", "two"])
    write("clone/README.md", "A card.\n")
    write("clone/LICENSE", "A licence.\n")
    write("clone/dataset_infos.json", '{"default": {}}')
    write("clone/paper.pdf", "%PDF-")
    assert texts("clone") == ["one", "two"]
    assert capsys.readouterr().err == (
        "--data 'clone': files that are read: 1 of 5, those of Parquet; left out: "
        "LICENSE, README.md, dataset_infos.json, paper.pdf; to read others, give a "
        "glob, such as 'clone/**'\n"
    )


@pytest.mark.parametrize("name", ["a.jsonl", "a.json.gz", "a.json", "a.csv"])
def test_the_card_is_left_out_beside_rows_of_any_format(name: str) -> None:
    write("clone/README.md", "A card.\n")
    write("clone/dataset_infos.json", '{"default": {}}')
    content = "text\none\n" if name == "a.csv" else '{"text": "one"}\n'
    write(f"clone/{name}", content)
    if name.endswith(".gz"):
        write(f"clone/{name}", gzip.compress(content.encode()))
    assert texts("clone") == ["one"]


def test_a_folder_of_text_is_read_whole(capsys: pytest.CaptureFixture[str]) -> None:
    write("docs/README.md", "A card.\n")
    write("docs/a.txt", "text\n")
    assert texts("docs") == ["A card.\n", "text\n"]
    assert capsys.readouterr().err == ""


def test_a_glob_reads_what_it_matches_and_says_how(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write("clone/README.md", "A card.\n")
    write("clone/a.jsonl", '{"text": "one"}\n')
    assert texts("clone/**") == ["A card.\n", "one"]
    assert capsys.readouterr().err == (
        "--data 'clone/**': files that are read as rows: 1, of JSON lines; as plain "
        "text: README.md\n"
    )


def test_rejects_a_saved_data_set() -> None:
    """save_to_disk of datasets writes JSON files beside the files with the rows."""
    write("saved/data-00000-of-00001.arrow", b"\xff\xff\xff\xff")
    write("saved/dataset_info.json", "{}")
    write("saved/state.json", "{}")
    assert "datasets.load_from_disk(FOLDER).to_parquet(FILE)" in refusal("saved")

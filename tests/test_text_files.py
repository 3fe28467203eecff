"""A user's own files: every format and compression, and one clear line for each thing that can be wrong with them."""

import gzip
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from workbench.text import Files, load
from workbench.text.files import cut

TEXTS = [f"document {i}: grüße, 😀, \r\nsecond line\n" for i in range(40)]


def texts_of(path: Path, field: str | None = None) -> list[str]:
    return [document.text for document in Files(str(path), field).documents()]


def refusal(path: Path, field: str | None = None) -> str:
    with pytest.raises(ValueError) as raised:
        texts_of(path, field)
    line = str(raised.value)
    assert "\n" not in line
    assert str(path) in line
    return line


def compress(content: bytes, suffix: str) -> bytes:
    half = len(content) // 2
    parts = (content[:half], content[half:])
    if suffix == ".gz":
        return b"".join(gzip.compress(part) for part in parts)
    if suffix == ".zst":
        return b"".join(pa.compress(part, codec="zstd", asbytes=True) for part in parts)
    return content


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_every_format_reads_the_same_texts(tmp_path: Path, suffix: str) -> None:
    folder = tmp_path / "plain"
    folder.mkdir()
    for i, text in enumerate(TEXTS):
        (folder / f"{i:02}.txt{suffix}").write_bytes(compress(text.encode(), suffix))
    lines = tmp_path / f"lines.jsonl{suffix}"
    lines.write_bytes(compress("\n".join(json.dumps({"body": text, "n": 1}) for text in TEXTS).encode(), suffix))
    table = tmp_path / f"table.parquet{suffix}"
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"id": range(40), "body": pa.array(TEXTS).dictionary_encode()}), sink, row_group_size=7)
    table.write_bytes(compress(sink.getvalue().to_pybytes(), suffix))

    assert texts_of(folder) == TEXTS
    assert texts_of(lines, "body") == TEXTS
    assert texts_of(table, "body") == TEXTS
    assert [Files(str(path)).name for path in (folder, lines, table)] == ["plain", "lines", "table"]


def test_folder_is_read_sorted_and_in_depth_without_hidden_and_foreign_files(tmp_path: Path) -> None:
    (tmp_path / "b" / ".git").mkdir(parents=True)
    for name in ("b/2.txt", "a.TXT", "b/1.jsonl", "b/.git/x.txt", ".hidden.txt", "picture.png"):
        (tmp_path / name).write_text(json.dumps({"t": name}) if name.endswith("jsonl") else name)
    assert texts_of(tmp_path, "t") == ["a.TXT", "b/1.jsonl", "b/2.txt"]


def test_missing_and_empty_sources(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere.txt")
    assert "holds no .txt, .jsonl or .parquet" in refusal(tmp_path)
    picture = tmp_path / "picture.png"
    picture.write_bytes(b"x")
    assert "is not a .txt" in refusal(picture)
    blank = tmp_path / "blank.txt"
    blank.write_text(" \n ")
    assert "holds no text" in refusal(blank)
    with pytest.raises(ValueError, match="must name a file or a folder"):
        Files("")


def test_bytes_that_are_not_utf8_are_placed(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_bytes(b"good \xff bad")
    assert "is not UTF-8: byte 0xff at offset 5" in refusal(plain)
    lines = tmp_path / "a.jsonl.gz"
    lines.write_bytes(gzip.compress(b'{"t": "a"}\n{"t": "\xe9"}\n'))
    assert "byte 0xe9 at offset 18" in refusal(lines, "t")
    table = tmp_path / "a.parquet"
    wrong = pa.array([b"fine", b"ab\xff"]).view(pa.string())
    pq.write_table(pa.table({"t": wrong}), table)
    assert "row 2 column 't' is not UTF-8 at offset 2" in refusal(table, "t")


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_bytes(b'\xef\xbb\xbf{"t": "x"}')
    assert texts_of(lines, "t") == ["x"]


def test_fields_that_do_not_exist(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"title": "x", "body": "y"}\n\n{"title": "z"}\n')
    assert "line 1 needs field= to name its text; it has: title, body" in refusal(lines)
    assert "line 1 has no field 'text'; it has: title, body" in refusal(lines, "text")
    assert "line 3 has no field 'body'; it has: title" in refusal(lines, "body")
    table = tmp_path / "a.parquet"
    pq.write_table(pa.table({"n": [1], "body": ["x"]}), table)
    assert "has no field 'text'; it has: n, body" in refusal(table, "text")
    assert "row 1 column 'n' must be text, not int" in refusal(table, "n")
    plain = tmp_path / "a.txt"
    plain.write_text("x")
    assert "field='text' is for .jsonl and .parquet" in refusal(plain, "text")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"t": "a"', "line 2 is not JSON: Expecting ',' delimiter at column 10"),
        ('["t"]', "line 2 must be a JSON object, not list"),
        ('{"t": 5}', "line 2 field 't' must be text, not int"),
        ('{"t": "\\ud800"}', "line 2 field 't' is not Unicode text: lone surrogate at character 0"),
    ],
)
def test_malformed_lines(tmp_path: Path, line: str, complaint: str) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"t": "fine"}\n' + line)
    assert complaint in refusal(lines, "t")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("a.txt.gz", "as gzip"), ("a.txt.zst", "as zstd"), ("a.parquet", "as parquet")],
)
def test_damaged_files(tmp_path: Path, name: str, complaint: str) -> None:
    path = tmp_path / name
    path.write_bytes(b"this is none")
    assert f"cannot be read {complaint}" in refusal(path, None if ".txt" in name else "t")
    if ".txt" in name:
        noise = np.random.default_rng(0).bytes(5000)
        path.write_bytes(compress(noise, path.suffix)[:-100])
        assert f"cannot be read {complaint}" in refusal(path)


def test_null_and_blank_records_are_passed_over(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"t": null}\n{"t": ""}\n{"t": "x"}\n{"t": "y"}\n')
    assert texts_of(lines, "t") == ["x", "y"]


def test_one_book_is_cut_so_that_it_can_be_split(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    paragraphs = [f"Paragraph {i}. " + "It goes on. " * (i % 30) for i in range(2000)]
    book.write_text("\n\n".join(paragraphs))
    pieces = texts_of(book)
    assert "".join(pieces) == book.read_text()
    assert len(pieces) >= 32
    assert all(len(piece) <= 8192 and piece.endswith("\n\n") for piece in pieces[:-1])
    text = load(Files(str(book)), cache_dir=tmp_path)
    assert text.train_tokens("book") > 10 * text.validation_tokens("book") > 0


def test_many_files_are_not_cut(tmp_path: Path) -> None:
    for i in range(32):
        (tmp_path / f"{i}.txt").write_text(f"{i} " + "word " * 4000)
    assert len(texts_of(tmp_path)) == 32


@settings(deadline=None)
@given(st.text(alphabet="ab \n", max_size=200), st.integers(2, 50))
def test_cutting_loses_nothing(text: str, length: int) -> None:
    pieces = cut(text, length)
    assert "".join(pieces) == text
    assert all(length // 2 < len(piece) <= length for piece in pieces[:-1])


def test_a_text_too_short_to_split_or_to_read(tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("one line")
    with pytest.raises(ValueError, match="corpus 'short' holds a single document"):
        load(Files(str(short)), cache_dir=tmp_path)
    copies = tmp_path / "copies.jsonl"
    copies.write_text('{"t": "same"}\n' * 40)
    with pytest.raises(ValueError, match="corpus 'copies' holds 40 copies of one document"):
        load(Files(str(copies), "t"), cache_dir=tmp_path)
    few = tmp_path / "few.jsonl"
    few.write_text('{"t": "first"}\n{"t": "second"}\n')
    text = load(Files(str(few), "t"), cache_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"'few' is too short: its training split has \d tokens, fewer than one sequence"
    ):
        text.batches(0, batch_size=2, sequence_length=16)
    with pytest.raises(ValueError, match=r"'few' is too short: its validation split has \d tokens"):
        text.validation(batch_size=2, sequence_length=16)

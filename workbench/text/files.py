"""A user's own text: a file, or a folder of files."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from workbench.field_types import require_types
from workbench.text.corpus import Corpus, Document

_COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
_KINDS = (".txt", ".jsonl", ".parquet")
_ALLOWED = ".txt, .jsonl or .parquet (also with .gz or .zst)"
# A corpus of fewer documents than this is cut into about as many pieces, of a length between these bounds.
_FEW_DOCUMENTS = 32
_PIECE_CHARACTERS = (512, 8192)


@dataclass(frozen=True)
class Files(Corpus):
    """A `.txt`, `.jsonl` or `.parquet` file, plain or with `.gz` or `.zst`, or every such file below a folder, sorted.

    A `.txt` file is one document, a `.jsonl` line and a `.parquet` row are one each: the text in `field`, which they
    need and `.txt` ignores. Records whose text is null or blank are passed over, as are files whose name starts with a
    dot. A gzip or zstd file may have several members.

    Training and validation are divided by document. So where there are fewer than 32 documents (one book, say) each is
    cut at paragraph borders, or at lines where paragraphs are long, into pieces of at most 8192 characters, shorter
    where the whole text is short; each piece then counts as a document. Joined again they are the text.

    Raises:
        ValueError: `path` is empty.
    """

    path: str
    field: str | None = None

    def __post_init__(self) -> None:
        require_types(self)
        if not self.path:
            raise ValueError("Files path='' must name a file or a folder")

    @property
    def name(self) -> str:
        path = Path(self.path).expanduser()
        name = path.name or path.resolve().name
        for suffix in (*_COMPRESSIONS, *_KINDS):
            name = name.removesuffix(suffix)
        return name or "files"

    def documents(self) -> Iterator[Document]:
        root = Path(self.path).expanduser()
        paths = _files_below(root)
        kinds = {_kind(path) for path in paths}
        if self.field is not None and kinds == {".txt"}:
            raise ValueError(f"{root}: field={self.field!r} is for .jsonl and .parquet; here are only .txt files")
        found = [document for path in paths for document in _read(path, root, self.field) if document.text.strip()]
        if not found:
            raise ValueError(f"{root} holds no text: every document in it is empty")
        return iter(found if len(found) >= _FEW_DOCUMENTS else _cut_all(found))


def _files_below(root: Path) -> list[Path]:
    if root.is_file():
        if _kind(root) is None:
            raise ValueError(f"{root} is not a {_ALLOWED} file")
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root} does not exist; give a file or a folder")
    found = []
    for parent, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [Path(parent, name) for name in files if not name.startswith(".")]
    found = sorted(path for path in found if _kind(path) and path.is_file())
    if not found:
        raise ValueError(f"{root} holds no {_ALLOWED} file")
    return found


def _kind(path: Path) -> str | None:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in _COMPRESSIONS:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else None


def _read(path: Path, root: Path, field: str | None) -> Iterator[Document]:
    name = path.name if path == root else path.relative_to(root).as_posix()
    content = _content(path)
    if _kind(path) == ".txt":
        yield Document(name, _decode(content, path))
        return
    records = _json_lines if _kind(path) == ".jsonl" else _parquet_rows
    for place, text in records(content, path, field):
        yield Document(f"{name} {place}", text)


def _content(path: Path) -> bytes:
    compression = _COMPRESSIONS.get(path.suffix.lower())
    try:
        if compression is None:
            return path.read_bytes()
        with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, compression) as stream:
            return stream.read()
    except OSError as error:
        reason = error.strerror or str(error).splitlines()[0]
        raise ValueError(f"{path} cannot be read{f' as {compression}' if compression else ''}: {reason}") from None


def _decode(content: bytes, path: Path) -> str:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = content[error.start]
        raise ValueError(f"{path} is not UTF-8: byte 0x{byte:02x} at offset {error.start} ({error.reason})") from None
    return text.removeprefix("\ufeff")


def _json_lines(content: bytes, path: Path, field: str | None) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(_decode(content, path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path} line {number} is not JSON: {error.msg} at column {error.colno}") from None
        if not isinstance(record, dict):
            raise ValueError(f"{path} line {number} must be a JSON object, not {type(record).__name__}")
        if field is None or field not in record:
            raise _missing_field(f"{path} line {number}", field, list(record))
        yield f"line {number}", _text(record[field], f"{path} line {number} field {field!r}")


def _parquet_rows(content: bytes, path: Path, field: str | None) -> Iterator[tuple[str, str]]:
    try:
        file = pq.ParquetFile(pa.BufferReader(content))
        columns = file.schema_arrow.names
        if field is None or field not in columns:
            raise _missing_field(str(path), field, columns)
        rows = (value for batch in file.iter_batches(columns=[field]) for value in batch.column(0))
        for number, value in enumerate(rows, start=1):
            place = f"{path} row {number} column {field!r}"
            try:
                text = value.as_py()
            except UnicodeDecodeError as error:
                raise ValueError(f"{place} is not UTF-8 at offset {error.start} ({error.reason})") from None
            yield f"row {number}", _text(text, place)
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{path} cannot be read as parquet: {str(error).splitlines()[0]}") from None


def _missing_field(place: str, field: str | None, existing: list[str]) -> ValueError:
    asked = "needs field= to name its text" if field is None else f"has no field {field!r}"
    return ValueError(f"{place} {asked}; it has: {', '.join(existing) or 'none'}")


def _text(value: Any, place: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise ValueError(f"{place} must be text, not {type(value).__name__}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{place} is not Unicode text: lone surrogate at character {error.start}") from None
    return value


def _cut_all(documents: list[Document]) -> list[Document]:
    shortest, longest = _PIECE_CHARACTERS
    total = sum(len(document.text) for document in documents)
    length = min(max(total // _FEW_DOCUMENTS, shortest), longest)
    pieces = []
    for document in documents:
        texts = cut(document.text, length)
        if len(texts) == 1:
            pieces.append(document)
        else:
            pieces += [Document(f"{document.name} part {i}", text) for i, text in enumerate(texts, start=1)]
    return pieces


def cut(text: str, length: int) -> list[str]:
    """`text` in pieces of at most `length` characters, each ending at a blank line, else a line's end, else a space.

    A border is only taken in the latter half of a piece, so that none is shorter than half of `length` but the last.
    """
    pieces = []
    start = 0
    while len(text) - start > length:
        stop = start + length
        for border in ("\n\n", "\n", " "):
            found = text.rfind(border, start + length // 2, stop)
            if found >= 0:
                stop = found + len(border)
                break
        pieces.append(text[start:stop])
        start = stop
    return [*pieces, text[start:]]

"""The corpora that every machine with Python already has: the standard library's code and its prose."""

from __future__ import annotations

import hashlib
import io
import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from workbench.text.corpus import Document, SlowCorpus
from workbench.text.docstrings import docstrings, parse, strip_docstrings

_SKIPPED_FOLDERS = {"__pycache__", "dist-packages", "idle_test", "site-packages", "test", "tests"}
# To be raised whenever the same sources give other documents than before.
_REVISION = 2


@dataclass(frozen=True)
class StdlibCode(SlowCorpus):
    """The running Python's standard library, one document per file, docstrings stripped.

    Left out: installed packages, tests, `pydoc_data/topics.py` (prose, and part of `StdlibProse`), files that hold this
    machine's build configuration, and files that do not parse or decode (`left_out` names them).
    """

    @property
    def name(self) -> str:
        return "stdlib_code"

    def source_key(self) -> str:
        return _source_key(stdlib_folder())

    def documents(self) -> Iterator[Document]:
        return code_documents(stdlib_folder())


@dataclass(frozen=True)
class StdlibProse(SlowCorpus):
    """The language reference of `pydoc` by topic, and every distinct docstring of the files that `StdlibCode` reads."""

    @property
    def name(self) -> str:
        return "stdlib_prose"

    def source_key(self) -> str:
        return _source_key(stdlib_folder())

    def documents(self) -> Iterator[Document]:
        from pydoc_data import topics

        return prose_documents(stdlib_folder(), topics.topics)


def stdlib_folder() -> Path:
    """Where the running Python's standard library lies."""
    return Path(sysconfig.get_paths()["stdlib"])


def code_documents(folder: Path) -> Iterator[Document]:
    """One document per readable source file below `folder`."""
    for file in _readable(folder, _source_key(folder)):
        if file.code.strip():
            yield Document(file.name, file.code)


def prose_documents(folder: Path, topics: dict[str, str]) -> Iterator[Document]:
    """The topics, then the docstrings of the readable source files below `folder`, each distinct text once."""
    texts = [(f"topic {topic}", text) for topic, text in sorted(topics.items())]
    for file in _readable(folder, _source_key(folder)):
        texts += [(f"{file.name} {name}".rstrip(), text) for name, text in file.docstrings]
    seen = set()
    for name, text in texts:
        # A docstring may hold a lone surrogate, which is a Python string and no Unicode text.
        if text and text not in seen and _is_unicode(text):
            seen.add(text)
            yield Document(name, text)


def left_out(folder: Path) -> list[str]:
    """The source files below `folder` that neither corpus holds, since they do not parse or decode."""
    readable = {file.name for file in _readable(folder, _source_key(folder))}
    return [name for path in source_files(folder) if (name := path.relative_to(folder).as_posix()) not in readable]


def source_files(folder: Path) -> list[Path]:
    """The files below `folder` that both corpora are made of, sorted.

    Raises:
        ValueError: there are none (an embedded Python keeps compiled files only).
    """
    found = []
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in _SKIPPED_FOLDERS and not name.startswith("config-")]
        found += [
            Path(parent, name) for name in files if name.endswith(".py") and not name.startswith("_sysconfigdata")
        ]
    found = sorted(path for path in found if path.parts[-2:] != ("pydoc_data", "topics.py"))
    if not found:
        raise ValueError(f"the standard library in {folder} has no source files; use Files(path) as the corpus instead")
    return found


def _source_key(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in [*source_files(folder), folder / "pydoc_data" / "topics.py"]:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(hashlib.sha256(path.read_bytes() if path.exists() else b"").digest())
    # The parser decides what is a docstring and which files are left out.
    return f"revision {_REVISION}, Python {platform.python_version()}, sources {digest.hexdigest()}"


@dataclass(frozen=True)
class _SourceFile:
    name: str
    code: str
    docstrings: tuple[tuple[str, str], ...]


@lru_cache(maxsize=1)
def _readable(folder: Path, source_key: str) -> tuple[_SourceFile, ...]:
    """The files below `folder` that parse. Kept, since parsing takes most of the time and both corpora need it."""
    found = []
    for path in source_files(folder):
        content = path.read_bytes()
        try:
            encoding, _ = tokenize.detect_encoding(io.BytesIO(content).readline)
            source = io.TextIOWrapper(io.BytesIO(content), encoding).read()
            tree = parse(source)
        except (SyntaxError, ValueError):
            continue
        name = path.relative_to(folder).as_posix()
        found.append(_SourceFile(name, strip_docstrings(source, tree), tuple(docstrings(tree))))
    return tuple(found)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True

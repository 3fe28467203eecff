"""Files that can always be rebuilt, kept between processes: the standard library's documents, tokenizers, token ids."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

_DIGEST_BYTES = hashlib.sha256().digest_size


def default_folder() -> Path:
    """`moe-workbench` below `XDG_CACHE_HOME`, or below `~/.cache` where that is unset."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "moe-workbench"


class Cache:
    """Byte strings by key. An entry starts with its own sha256, so a damaged one is noticed and built anew."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, key: str) -> Path:
        """Where the entry of `key` lies, whether or not it exists."""
        return self.folder / f"{key.split()[0]}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"

    def fetch(self, key: str, build: Callable[[], bytes]) -> bytes:
        """The entry of `key`, or `build()`, which is then kept.

        `key` begins with a word for the kind of entry and names everything that its content depends on. A folder that
        cannot be written is a warning, not an error: the only loss is time.
        """
        path = self.path(key)
        try:
            stored = path.read_bytes()
        except OSError:
            stored = b""
        payload = stored[_DIGEST_BYTES:]
        if hashlib.sha256(payload).digest() == stored[:_DIGEST_BYTES]:
            return payload
        payload = build()
        try:
            _write(path, hashlib.sha256(payload).digest() + payload)
        except OSError as error:
            warnings.warn(f"cannot keep {path}: {error.strerror}; it is built again next time", stacklevel=2)
        return payload


def _write(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
